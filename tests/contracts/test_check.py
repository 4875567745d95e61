from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditty_di.contracts.check import compatible
from ditty_di.contracts.render import render
from ditty_di.processors import Contract, ContractError, Stage, examine
from tests.contracts.test_grammar import contracts

DIFFUSION = {
    "loader": "-> x:4:f, y:1:i64 | ctx.target:1:i64",
    "preprocessor noise": "x:n:f -> x:n:f | ctx.noise:n:f, ctx.forward_kwargs.t:1:i64",
    "model unet": "x:4:f, t:1:i64, y:1:i64 -> eps:4:f, features:2:f",
    "postprocessor scale": "eps:n:f, features:2:f -> eps:n:f, features:2:f | ctx.scale:0:f",
    "loss all": [
        ("mse", "0:n:f | ctx.noise:n:f, ctx.scale:0:f -> loss:0:f"),
        ("ce", "features:n+1:f | ctx.target:n:i64 -> loss:0:f"),
    ],
}


def stages(changes=()):
    made = []
    for label, text in {**DIFFUSION, **dict(changes)}.items():
        kind, _, name = label.partition(" ")
        if isinstance(text, list):
            parts = tuple(Stage(kind, n, Contract.parse(t)) for n, t in text)
            made.append(Stage(kind, name, None, parts))
        elif text != "gone":
            made.append(Stage(kind, name, Contract.parse(text) if text else None))
    return made


def problems(**changes):
    named = {label: changes[label.split()[0]] for label in DIFFUSION if label.split()[0] in changes}
    return [str(p) for p in examine(stages(named)).problems]


def test_a_sound_pipeline_has_nothing_to_say():
    report = examine(stages())
    assert (report.problems, report.unproven, report.unchecked) == ([], [], [])
    report.verify(strict=True)


@pytest.mark.parametrize(
    "stage, old, new, who, says",
    [
        # a writer removed
        ("preprocessor", ", ctx.forward_kwargs.t:1:i64", "", "unet", "t:1:i64: nothing before"),
        ("preprocessor", "ctx.noise:n:f, ", "", "mse", "ctx.noise:n:f: nothing before writes"),
        ("loader", ", y:1:i64", "", "unet", "nothing before gives 'y'; what flows is x"),
        ("model", ", features:2:f", "", "scale", "nothing before gives 'features'"),
        ("postprocessor", "eps:n:f, features:2:f |", "eps:n:f |", "ce", "nothing before gives"),
        # a rank changed
        ("loader", "x:4", "x:3", "unet", "needs rank 4, but preprocessor noise gives x:3:f"),
        ("preprocessor", "ctx.noise:n", "ctx.noise:3", "mse", "needs rank 4 because of 0:n:f"),
        ("model", "t:1", "t:2", "unet", "t:2:i64: needs rank 2, but preprocessor noise gives"),
        ("loader", "target:1", "target:2", "ce", "needs rank 1 because of features:n+1:f"),
        ("postprocessor", "scale:0", "scale:1", "mse", "needs rank 0, but postprocessor scale"),
        # a dtype changed
        ("loader", "x:4:f", "x:4:i", "noise", "x:n:f: needs dtype f, but loader gives x:4:i"),
        ("preprocessor", "t:1:i64", "t:1:f", "unet", "t:1:i64: needs dtype i64"),
        ("loader", "target:1:i64", "target:1:i32", "ce", "ctx.target:n:i64: needs dtype i64"),
        ("preprocessor", "noise:n:f", "noise:n:u8", "mse", "ctx.noise:n:f: needs dtype f"),
        # renamed
        ("preprocessor", "ctx.noise", "ctx.noises", "mse", "did you mean 'noises'?"),
    ],
)
def test_every_mutation_is_found(stage, old, new, who, says):
    label = next(label for label in DIFFUSION if label.startswith(stage))
    assert old in DIFFUSION[label]
    found = problems(**{stage: DIFFUSION[label].replace(old, new)})
    assert f" {who}: " in found[0]
    assert says in found[0]


def test_all_problems_are_told_at_once():
    report = examine(stages({"preprocessor noise": "z:4:f -> x:4:f"}))
    with pytest.raises(ContractError) as caught:
        report.verify()
    told = str(caught.value).split("\n")
    assert [line.split(":")[0] for line in told] == ["preprocessor noise", "model unet", "loss mse"]


def test_a_removed_preprocessor_is_missed_by_all_that_read_it():
    found = problems(preprocessor="gone")
    assert len(found) == 2
    assert "ctx.noise" in found[1]


def test_a_context_key_does_not_reach_forward_by_itself():
    text = DIFFUSION["preprocessor noise"].replace("forward_kwargs.", "")
    (found,) = problems(preprocessor=text)
    assert "let preprocessor noise write ctx.forward_kwargs.t" in found


def test_each_way_to_give_forward_an_argument():
    assert not problems(preprocessor="x:n:f -> x:n:f, t:1:i64 | ctx.noise:n:f")
    assert not problems(
        loader="-> x:4:f, y:1:i64, t:1:f | ctx.target:1:i64"  # the preprocessor's replaces it
    )


def test_entries_on_the_wrong_side_of_the_bar_are_named():
    (found,) = problems(postprocessor="eps:4:f, noise:4:f -> eps:4:f, features:2:f | ctx.scale:0:f")
    assert "write it behind a |, as ctx.noise" in found
    (found,) = problems(postprocessor="| ctx.eps:4:f -> eps:4:f, features:2:f | ctx.scale:0:f")
    assert "write it before the |, as eps:4:f" in found


def test_what_a_postprocessor_gives_is_all_that_there_is():
    assert any("'features'" in p for p in problems(postprocessor="eps:4:f -> eps:4:f"))
    # but one that gives context alone changes nothing that flows
    assert not problems(postprocessor="eps:4:f -> | ctx.scale:0:f")


def test_positions_are_those_of_what_the_stage_before_gives():
    loss = [("mse", "2:n:f | ctx.noise:n:f -> loss:0:f")]
    (found,) = problems(loss=loss)
    assert "no position 2: what flows is eps, features" in found
    (found,) = problems(loss=[("mse", "1:n:f | ctx.noise:n:f -> loss:0:f")])
    assert "needs rank 2 because of 1:n:f, but preprocessor noise gives noise:4:f" in found


# -- without a contract ---------------------------------------------------------------------------


def test_an_unchecked_processor_passes_on_names_with_rank_and_dtype():
    made = stages()
    made.insert(2, Stage("preprocessor", "odd"))
    report = examine(made)
    assert (report.problems, report.unproven) == ([], [])
    assert [str(s) for s in report.unchecked] == ["preprocessor odd"]

    made = stages({"model unet": DIFFUSION["model unet"].replace("t:1", "t:2")})
    made.insert(2, Stage("preprocessor", "odd"))
    (found,) = examine(made).problems
    assert "(if preprocessor odd changes that, its contract has to say so)" in str(found)
    assert "noise gives" in str(found)


def test_what_only_an_unchecked_stage_can_give_is_unproven_and_not_silent():
    made = stages({"preprocessor noise": ""})
    report = examine(made)
    assert not report.problems
    assert [p.entry for p in report.unproven] == ["t:1:i64", "ctx.noise:n:f"]
    assert "may come from preprocessor noise, which has no contract" in render(report)
    report.verify()
    with pytest.raises(ContractError, match=r"ctx\.noise"):
        report.verify(strict=True)


def test_a_stage_without_a_contract_does_not_end_the_check_of_the_others():
    made = stages({"model unet": "", "preprocessor noise": "x:n:f -> x:n:f | ctx.noisy:n:f"})
    report = examine(made)
    assert [p.entry for p in report.problems] == ["ctx.noise:n:f"]  # no model writes context
    made = stages({"postprocessor scale": "", "loader": "-> y:4:f"})
    assert any("x" in p.entry for p in examine(made).problems)


def test_an_unchecked_model_passes_nothing_on():
    report = examine(stages({"model unet": ""}))
    assert not report.problems
    assert report.arrows[2].flow is None


def test_the_trainer_s_own_context_is_known():
    reads = "x:4:f | ctx.epoch:0:i, ctx.device:*, ctx.original_batch:* -> x:4:f"
    made = [Stage("loader", "", Contract.parse("-> x:4:f")), Stage("preprocessor", "p",
            Contract.parse(reads))]  # fmt: skip
    assert not examine(made).problems
    made[1] = Stage("preprocessor", "p", Contract.parse("| ctx.mask:2:b, ctx.step:1:i ->"))
    found = [str(p) for p in examine(made).problems]
    assert "nothing before writes ctx.mask" in found[0]
    assert "needs rank 1, but the trainer gives step:0:i64" in found[1]


def test_the_picture_shows_every_arrow_and_what_is_wrong_on_it():
    made = stages({"loader": "-> x:4:f", "postprocessor scale": ""})
    text = render(examine(made))
    lines = text.split("\n")
    assert any(re.match(r"model unet +x:4:f, t:1:i64, y:1:i64 -> eps", line) for line in lines)
    assert "  │ x:4:f | ctx.noise:4:f, ctx.forward_kwargs.t:1:i64" in lines
    assert any(line.startswith("  │ ! y:1:i64: nothing before gives 'y'") for line in lines)
    assert any(re.match(r"postprocessor scale +\(no contract: unchecked\)", x) for x in lines)
    assert any(line.strip().startswith("? ctx.scale:0:f") for line in lines)
    assert "loss all             2 parts" in lines


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["preprocessor", "postprocessor"]), contracts | st.none()))
)
def test_no_chain_crashes(chain):
    report = examine([Stage(kind, "s", contract) for kind, contract in chain])
    assert len(report.arrows) == len(chain)
    assert render(report) or not chain


def test_dtypes():
    assert compatible("f", "bf16") and compatible("i8", "i") and compatible(None, "b")
    assert not compatible("f", "i64") and not compatible("i", "u8") and not compatible("i", "b")
