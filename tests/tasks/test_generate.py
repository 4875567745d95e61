"""Text out of a checkpoint, an export, or a model in memory; alone or in batches."""

import json

import pytest
import torch
from torch import nn

from ditty_di.tasks.export import export
from ditty_di.tasks.generate import Options, generate, hugging_face, plain, read_prompts
from ditty_di.tasks.loading import ready

PROMPTS = ["Document 3 says", "D", "that 4 follows, and 2 does", "no"]
CPU = {"device": "cpu"}


@pytest.fixture
def model(build, checkpoint):
    model = build()
    ready(model, checkpoint, torch.device("cpu"))
    return model


def asked(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def answers(path):
    return [json.loads(line) for line in path.open()]


def test_prints_the_continuation_of_one_prompt(build, tokenizer, checkpoint, capsys):
    result = generate(build(), tokenizer, checkpoint, prompt="Document 3", max_new_tokens=9, **CPU)
    assert capsys.readouterr().out == "Document 3" + result["text"] + "\n"
    assert result["prompts"] == 1 and 0 < result["tokens"] <= 9


def test_checkpoint_export_and_transformers_agree(build, tokenizer, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(tmp_path / "export")
    export(build(), tokenizer, checkpoint, path=folder)
    exported, words = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    for prompt in PROMPTS:
        options = {"prompt": prompt, "max_new_tokens": 12, **CPU}
        from_run = generate(build(), tokenizer, checkpoint, **options)
        from_export = generate(exported, words, **options)
        assert (
            from_run["text"] == from_export["text"] and from_run["tokens"] == from_export["tokens"]
        )
        ids = words(prompt, return_tensors="pt")
        stock = exported.generate(**ids, do_sample=False, max_new_tokens=12)[0]
        new = words.decode(stock[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert new == from_run["text"]


def test_a_batch_gives_what_each_prompt_gives_alone(model, tokenizer, tmp_path):
    source = asked(tmp_path / "in.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)])
    outputs = []
    for batch_size in (1, 3, 8):
        outputs.append(tmp_path / f"out-{batch_size}.jsonl")
        result = generate(
            model,
            tokenizer,
            prompts=source,
            output=str(outputs[-1]),
            batch_size=batch_size,
            max_new_tokens=12,
            **CPU,
        )
    alone, *batched = (answers(output) for output in outputs)
    assert batched == [alone, alone]
    assert [(a["input"], a["id"]) for a in alone] == [(p, i) for i, p in enumerate(PROMPTS)]
    assert result["tokens"] == sum(a["tokens"] for a in alone)
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", *(o.name for o in outputs)}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_both_decoders_agree_and_never_attend_to_padding(positions, model):
    if positions == "learned":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=60,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.5,
            eos_token_id=None,
        )
        model = GPT2LMHeadModel(config).eval()
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    for pad in (0, 1, 50):
        options = Options(max_new_tokens=10, pad_token_id=pad)
        assert hugging_face(model, prompts, options=options) == plain(
            model, prompts, options=options
        )


class Says(nn.Module):
    """A model without `generate` that goes through `tokens` one by one, from any of them."""

    def __init__(self, tokens, size):
        super().__init__()
        table = torch.zeros(size, size)
        table[tokens[:-1], tokens[1:]] = 1.0
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, ids):
        return self.table(ids)


def test_counts_tokens_without_eos_and_stops_there(tokenizer, tmp_path):
    ids = tokenizer("Document says that")["input_ids"]
    eos = tokenizer.eos_token_id
    says = Says([*ids, eos, ids[0]], len(tokenizer))
    start = tokenizer.decode(ids[:1])
    source = asked(tmp_path / "in.jsonl", [{"input": start}, {"prompt": "that"}])
    generate(
        says, tokenizer, prompts=source, output=str(tmp_path / "out"), max_new_tokens=30, **CPU
    )
    first, _ = answers(tmp_path / "out")
    assert first == {
        "input": start,
        "text": tokenizer.decode(ids[1:]),
        "tokens": len(ids) - 1,
    }


def test_pad_that_is_eos_changes_nothing(model, tokenizer):
    prompts = [[5, 6, 7], [8]]
    apart, same = (
        hugging_face(model, prompts, options=Options(12, pad_token_id=pad, eos_token_id=0))
        for pad in (1, 0)
    )
    assert apart == same


def test_end_tokens_of_the_model_count_beside_the_tokenizers(model):
    (row,) = hugging_face(model, [[5, 6]], options=Options(max_new_tokens=8))
    stop = row[4]
    model.generation_config.eos_token_id = [stop, 299]
    (cut,) = hugging_face(model, [[5, 6]], options=Options(max_new_tokens=8, eos_token_id=298))
    assert cut == row[: row.index(stop)]


def test_sampling_options(model):
    def sampled(seed, **options):
        torch.manual_seed(seed)
        return hugging_face(model, [[5, 6]], options=Options(12, temperature=1.5, **options))

    greedy = hugging_face(model, [[5, 6]], options=Options(max_new_tokens=12))
    # What a published model recommends must not leak into what was asked for.
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.1)
    assert hugging_face(model, [[5, 6]], options=Options(max_new_tokens=12)) == greedy
    assert sampled(0) == sampled(0) != sampled(1)
    assert sampled(0, top_k=1) == sampled(1, top_p=1e-6) == greedy
    torch.manual_seed(0)
    draws = [plain(model, [[5, 6]], options=Options(12, temperature=2.0)) for _ in range(2)]
    assert draws[0] != draws[1], "two batches must not get the same random numbers"


def test_a_long_prompt_keeps_its_end(model, tokenizer, tmp_path):
    long = " ".join(f"Document {i} says" for i in range(30))
    ids = tokenizer(long)["input_ids"]
    source = asked(tmp_path / "in.jsonl", [{"prompt": long}, {"prompt": "no"}])
    output = tmp_path / "out"
    generate(model, tokenizer, prompts=source, output=str(output), max_new_tokens=10, **CPU)
    first, second = answers(output)
    assert first["cut"] == len(ids) - (96 - 10) and "cut" not in second
    rest = hugging_face(model, [ids[first["cut"] :]], options=Options(10, eos_token_id=0))
    assert first["text"] == tokenizer.decode(rest[0], skip_special_tokens=True)


def test_bad_lines_are_named_with_their_number(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n{"prompt": \n["x"]\n{"input": 3}\n{"text": "b"}\n"prompt"\n'
    )
    with pytest.raises(ValueError) as error:
        read_prompts(str(path))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path} has lines that are no prompts:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        f"line {n}" for n in (3, 4, 5, 6, 7)
    ]
    assert "no JSON" in lines[1] and 'no object with a text as "prompt" or "input"' in lines[4]
    path.write_text('{"prompt": "x\u2028y", "id": 0}\n{"input": ""}\n')
    assert read_prompts(str(path)) == [{"input": "x\u2028y", "id": 0}, {"input": ""}]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompts; write lines such as"):
        read_prompts(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either prompt"),
        ({"prompt": "a", "prompts": "b"}, "give either prompt"),
        ({"prompt": "a", "max_new_tokens": 96}, "leaves no room for a prompt: the tokenizer's"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"prompt": "a", "temperature": -1}, "0 is greedy"),
        ({"prompt": "a", "top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"prompt": "a", "top_k": 0}, "top_k=0 must be at least 1, or null"),
        ({"prompt": "a", "batch_size": 0}, "batch_size=0"),
        ({"prompt": "a"}, "the model is on the meta device"),
    ],
)
def test_what_cannot_be_done_is_said(options, message, build, tokenizer):
    with pytest.raises(ValueError, match=message):
        generate(build(), tokenizer, **options, **CPU)


def test_weights_that_leave_something_unset_are_refused(build, tokenizer, checkpoint):
    from functools import partial

    from ditty_di.checkpoint.read import from_checkpoint

    bare = partial(from_checkpoint, path=checkpoint.keywords["path"])
    with pytest.raises(ValueError, match=r"no value: .*inv_freq.*`initialize`"):
        generate(build(), tokenizer, bare, prompt="a", **CPU)


def test_an_answer_file_is_whole_or_not_there(model, tokenizer, tmp_path):
    source = asked(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    output = tmp_path / "out.jsonl"
    output.write_text("of an earlier time")
    calls = []

    def decode(model, prompts, /, *, options):
        calls.append(prompts)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return [[5]]

    options = {"prompts": source, "output": str(output), "batch_size": 1, **CPU}
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, tokenizer, decode=decode, **options)
    assert output.read_text() == "of an earlier time"


def test_only_the_first_of_several_ranks_works(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert generate(model, tokenizer, prompt="a", **CPU) == {}
    assert capsys.readouterr().out == ""
