from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ditty_di.contracts.grammar import as_contract
from ditty_di.data import PackedCollate, PaddingFreeCollate
from ditty_di.losses import (
    CompositeLoss,
    CrossEntropyCalculator,
    CrossEntropyLoss,
    LossCalculator,
    LossOutput,
    MSELoss,
)
from ditty_di.processors import KeepInput, PreProcessor, Teacher, contract_of, examine, pipeline

HERE = __name__


class Attribute(PreProcessor):
    contract = "x:1:f -> x:1:f"

    def process(self, batch, ctx):
        return batch, ctx


class Literal(Attribute):
    """The spelling of the public README."""

    contract = None

    def __init__(self):
        super().__init__(contract="batch:3:i64 -> batch:3:i64 | ctx.my_key:0:i64")


class Default(Attribute):
    def __init__(self, contract="y:1:f -> y:1:f"):
        super().__init__(contract=contract)


class Made(Attribute):
    def __init__(self, key="k", **options):
        super().__init__(contract=self.contract_for(key=key), **options)

    @classmethod
    def contract_for(cls, *, key="k", **others):
        return f"-> | ctx.{key}:1:f"


class Fixed(MSELoss):
    def __init__(self):
        super().__init__(output_index=1, target_key="height")


class Silent(LossCalculator):
    def __init__(self):
        super().__init__(mask_key="mask")

    def compute(self, model_output, ctx):
        return LossOutput(self.get_prediction(model_output).mean(), {})


class Kept(KeepInput):
    def __init__(self):
        super().__init__(key="height")


class Net(nn.Module):
    contract = "x:2:f -> logits:2:f"

    @classmethod
    def from_file(cls, path):
        raise AssertionError("nothing is built")


class OfItsOwn(CrossEntropyLoss):
    contract = "0:3:f32 -> loss:0:f"


def found(target, **kwargs):
    contract = contract_of(target, kwargs)
    return None if contract is None else str(contract)


def test_a_contract_is_found_without_building():
    assert found(Attribute) == "x:1:f -> x:1:f"
    assert found(Attribute, contract="z:2 -> z:2") == "z:2 -> z:2"
    assert found(Attribute, contract=None) == "x:1:f -> x:1:f"
    assert found(Default) == "y:1:f -> y:1:f"
    assert found(Made) == "-> | ctx.k:1:f"
    assert found(Made, key="q") == "-> | ctx.q:1:f"
    assert found(Made, _args_=["w"]) == "-> | ctx.w:1:f"
    assert found(Net) == "x:2:f -> logits:2:f"
    assert found(nn.Linear, in_features=2) is None
    assert found(CrossEntropyLoss, output="logits").startswith("logits:n+1:f | ctx.target:n")
    assert found(CrossEntropyLoss, output="a.b") is None
    assert found(OfItsOwn, output="logits") == "0:3:f32 -> loss:0:f"
    assert found(torch.zeros) is None


def test_what_is_found_is_what_the_object_has():
    for target, kwargs in (
        (Attribute, {}),
        (Default, {}),
        (Made, {"key": "q"}),
        (MSELoss, {"output_index": 2, "mask_key": "m"}),
        (MSELoss, {"contract": "eps:4:f | ctx.noise:4:f -> loss:0:f"}),
        (CrossEntropyLoss, {"output": "logits"}),
        (OfItsOwn, {}),
        (PackedCollate, {"varlen": False}),
        (PaddingFreeCollate, {}),
        (Silent, {}),
        (CrossEntropyCalculator, {"output_index": "logits", "target_key": "labels"}),
    ):
        assert contract_of(target, kwargs) == as_contract(target(**kwargs).contract)


def test_what_a_constructor_passes_on_by_itself_only_the_object_knows():
    for target, text in (
        (Literal, "batch:3:i64 -> batch:3:i64 | ctx.my_key:0:i64"),
        (Fixed, "1:n:f | ctx.height:n:f -> loss:0:f"),
    ):
        assert found(target) is None
        assert str(pipeline(loss=target())[-1].contract) == text
    assert found(Kept) is None and Kept().contract is None, "and not that of another key"


def test_nodes_and_objects_make_the_same_pipeline():
    def node(target, **kwargs):
        return {"_target_": f"{target.__module__}.{target.__qualname__}", **kwargs}

    from_nodes = pipeline(
        preprocessors=[node(Attribute), node(Made, key="q", name="other")],
        model=node(Net),
        loss=node(
            CompositeLoss,
            losses=[
                [node(MSELoss, target_key="q"), 1.0],
                [node(MSELoss), 0.5],
                [node(CrossEntropyCalculator), 0],
            ],
        ),
        key="",
    )
    from_objects = pipeline(
        preprocessors=[Attribute(), Made("q", name="other")],
        model=Net(),
        loss=CompositeLoss(
            [(MSELoss(target_key="q"), 1.0), (MSELoss(), 0.5), (CrossEntropyCalculator(), 0)]
        ),
    )
    assert from_nodes == from_objects
    assert [part.name for part in from_nodes[-1].parts] == ["mse_loss", "mse_loss_2"]
    assert str(from_nodes[1]) == "preprocessor attribute"
    assert from_nodes[2].name == "other"


def test_the_loader_s_contract_may_be_its_data_set_s():
    class Rows(torch.utils.data.Dataset):
        contract = "-> x:2:f | ctx.target:1:i64"

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return i

    text = "-> x:2:f | ctx.target:1:i64"
    loader = torch.utils.data.DataLoader
    assert str(pipeline(loader=loader(Rows()))[0].contract) == text
    assert str(pipeline(loader=partial(loader, Rows(), batch_size=2))[0].contract) == text
    node = {"_target_": "torch.utils.data.DataLoader", "dataset": {"_target_": f"{HERE}.Net"}}
    assert str(pipeline(loader=node)[0].contract) == "x:2:f -> logits:2:f"
    given = pipeline(loader=loader(Rows()), loader_contract="-> y:1:f")
    assert str(given[0].contract) == "-> y:1:f"


def test_a_text_that_cannot_be_read_is_one_problem_among_others():
    node = {"_target_": f"{HERE}.Attribute"}
    stages = pipeline(
        loader_contract="-> x:1:f",
        preprocessors=[{**node, "contract": "x:1:f ->> x:1:f"}, {**node, "contract": "z:1 -> z:1"}],
        model_contract="z:2 -> y:1",
        key="trainer",
    )
    report = examine(stages)
    assert [p.stage.key for p in report.problems] == [
        "trainer.preprocessors.0",
        "trainer.model_contract",
    ]
    assert "^" in str(report.problems[0])
    assert [p.entry for p in report.unproven] == ["z:1"]


def test_the_teacher_and_other_things_with_strange_attributes():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.contract = [1, 2], 3

    assert pipeline(model=Parts())[1].contract is None
    assert str(Teacher(nn.Linear(1, 1), key="k").contract) == "-> | ctx.k:*:f"
    method = {"_target_": f"{HERE}.Net.from_file", "path": "x"}  # makes one of its class
    assert str(pipeline(model=method)[1].contract) == Net.contract
