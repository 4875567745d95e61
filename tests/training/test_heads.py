"""Classifiers, embeddings, masked language models: two ranks train as one, and resume exactly."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from transformers import BertConfig

from ditty_di.batch import Batch
from ditty_di.checkpoint import Checkpointer
from ditty_di.data import (
    EncodedDataset,
    EncoderCollate,
    LabeledTexts,
    LabeledTokens,
    Loader,
    MaskedTokens,
    PairsCollate,
    PlainTexts,
    TextPairs,
    in_memory,
)
from ditty_di.losses import ClassificationLoss, CrossEntropyLoss, InfoNCELoss
from ditty_di.models import encoder, masked_lm, sequence_classification, token_classification
from ditty_di.parallelize.data_parallel import shard
from ditty_di.processors import Pooling
from ditty_di.runtime import Runtime
from ditty_di.training.metrics import ClassificationScores, EntityScores, Recall
from ditty_di.training.trainer import Trainer
from ditty_di.training.validation import Validator
from tests.checkpoint import ranks
from tests.data.words import word_tokenizer

LABELS = ["even", "odd"]
ROWS, HELD_OUT, STEPS = 8, 13, 3
WORDS = "abcdefgh"


def text(n):
    return " ".join(WORDS[(n * k + k) % 8] for k in range(1, 3 + n % 5))


def lines(kind, rows):
    """Texts of other lengths, and what is to be learned of them."""
    for n in rows:
        if kind == "texts":
            yield {"text": text(n), "label": LABELS[n % 2]}
        elif kind == "tokens":
            tokens = text(n).split()
            yield {"tokens": tokens, "tags": [LABELS[WORDS.index(t) % 2] for t in tokens]}
        elif kind == "masked":
            yield {"text": text(n)}
        else:
            pair = {"anchor": text(n), "positive": text(n + 1)}
            yield pair | ({"negative": text(n + 3)} if kind == "negatives" else {})


def config():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return partial(BertConfig, **sizes, **dropout, num_attention_heads=2, initializer_range=0.1)


def parts(kind, tokenizer):
    """Encoder of lines, collate function, model, loss, postprocessors and metrics of a task."""
    model = {"tokenizer": tokenizer}
    if kind in ("texts", "tokens"):
        per_token = kind == "tokens"
        encode = (LabeledTokens if per_token else LabeledTexts)(tokenizer, LABELS)
        task = token_classification if per_token else sequence_classification
        collate = EncoderCollate(pad_id=0, label_per_token=per_token)
        model["labels"] = LABELS
        loss, metrics = ClassificationLoss(), [ClassificationScores()]
    elif kind == "masked":
        encode, task = PlainTexts(tokenizer), masked_lm
        collate = EncoderCollate(pad_id=0, label_per_token=True)
        loss, metrics = CrossEntropyLoss(output="logits"), []
    else:
        negatives = kind == "negatives"
        encode, task = TextPairs(tokenizer, negatives=negatives), encoder
        collate = PairsCollate(pad_id=0, negatives=negatives)
        options = {"cosine": False, "matryoshka_dims": [16, 4]} if negatives else {}
        loss, metrics = InfoNCELoss(temperature=0.2, **options), [Recall(k=(1, 3))]
    processors = [Pooling(mode="mean")] if task is encoder else []
    return encode, collate, task.from_config(config(), **model), loss, processors, metrics


def trained(kind, folder, *, accumulation=1, layout="fsdp", steps=STEPS, save=False):
    """The result of a training, and the parameters after it."""
    degrees = {"fsdp": {}, "ddp": {"dp_replicate": -1, "dp_shard": 1}}[layout]
    runtime = Runtime(seed=3, **degrees)
    tokenizer = word_tokenizer(mask_token="<unk>", model_max_length=32)
    encode, collate, model, loss, processors, metrics = parts(kind, tokenizer)

    def loader(rows, **options):
        dataset = EncodedDataset(
            in_memory([*lines(kind, rows)]), encode, cache_dir=folder / "cache"
        )
        if kind == "masked":
            dataset = MaskedTokens(dataset, tokenizer, fraction=0.4)
        size = ROWS // accumulation // runtime.dp_world_size
        return partial(Loader, dataset, micro_batch_size=size, collate_fn=collate, **options)

    losses = []
    trainer = Trainer(
        model=model,
        loss_fn=loss,
        postprocessors=processors,
        # Steps of the size of the gradients: what differs in one of them is seen afterwards.
        optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.5),
        dataloader=loader(range(40), seed=3),
        validator=partial(
            Validator,
            dataloader=loader(range(100, 100 + HELD_OUT), shuffle=False, epochs=1),
            eval_interval=100,
            metrics=metrics,
        ),
        checkpointer=partial(Checkpointer, str(folder / "checkpoints"), save_interval=2)
        if save
        else None,
        runtime=runtime,
        parallelize_fn=shard,
        max_steps=steps,
        max_grad_norm=math.inf,
        global_batch_size=ROWS,
    )
    result = trainer.train()
    losses = {name: value for name, value in result.items() if name.startswith("validation/")}
    whole = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().numpy()
        for name, p in trainer.model_parts[0].named_parameters()
    }
    trainer.close()
    runtime.close()
    return losses, {name.removeprefix("module."): value for name, value in whole.items()}


KINDS = ("texts", "tokens", "pairs", "negatives", "masked")


def everything(folder):
    return {
        (kind, layout): trained(kind, folder, layout=layout)
        for kind in KINDS
        for layout in ("fsdp", "ddp")
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {kind: trained(kind, folder) for kind in KINDS}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.run(everything, 2, tmp_path_factory.mktemp("two"))[0]


def same(here, there, tolerance=1e-5):
    (values, parameters), (others, other_parameters) = here, there
    assert values == pytest.approx(others, abs=tolerance)
    assert parameters.keys() == other_parameters.keys()
    for name, value in parameters.items():
        np.testing.assert_allclose(value, other_parameters[name], atol=tolerance, err_msg=name)


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_every_parameter_as_one(one, two, kind, layout):
    same(two[kind, layout], one[kind])
    values = one[kind][0]
    assert {"texts": "validation/f1", "pairs": "validation/recall@3"}.get(
        kind, "validation/loss"
    ) in values


@pytest.mark.parametrize("kind", ["texts", "tokens", "masked"])
def test_one_micro_batch_or_four_train_alike(one, tmp_path, kind):
    same(trained(kind, tmp_path, accumulation=4), one[kind])


def test_accumulated_pairs_have_fewer_candidates(one, tmp_path):
    """Each micro-batch is a search of its own: another loss, as the documentation says."""
    (values, _), (others, _) = trained("pairs", tmp_path, accumulation=2), one["pairs"]
    assert values["validation/loss"] < others["validation/loss"] - 0.1
    # Recall is that of the whole validation set, whatever its micro-batches are.
    assert 0 <= values["validation/recall@1"] <= values["validation/recall@3"] <= 1


@pytest.mark.parametrize("kind", ["texts", "pairs", "masked"])
def test_a_resumed_training_is_the_same_to_the_bit(tmp_path, kind):
    whole = trained(kind, tmp_path / "whole", steps=4)
    trained(kind, tmp_path / "parts", steps=2, save=True)
    resumed = trained(kind, tmp_path / "parts", steps=4, save=True)
    same(resumed, whole, tolerance=0.0)


# -- metrics ---------------------------------------------------------------------------------------


def test_f1_is_that_of_all_rows_and_not_a_mean_of_batches():
    scores = ClassificationScores()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator)
    labels = torch.randint(4, (50,), generator=generator)
    labels[::7] = -100
    kept = [
        scores.rows(logits[start:stop], Batch({}, labels[start:stop]))
        for start, stop in ((0, 3), (3, 40), (40, 50))
    ]
    rows = {name: torch.cat([part[name] for part in kept]) for name in kept[0]}
    valid = labels >= 0
    expected = f1_score(labels[valid], logits.argmax(-1)[valid], average="macro")
    found = scores.compute(rows)
    assert found["f1"] == pytest.approx(expected) and len(rows["label"]) == int(valid.sum())
    assert found["accuracy"] == pytest.approx(
        float((logits.argmax(-1) == labels)[valid].float().mean())
    )


def test_entities_count_if_type_and_both_ends_are_right():
    """By hand: three predicted, four there, one of them found."""
    pytest.importorskip("nervaluate")
    names = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    there = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "B-LOC", "O"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["O", "I-PER", "O"]]
    labels = torch.full((2, 6), -100)
    logits = torch.zeros(2, 6, len(names))
    for row, (tags, guesses) in enumerate(zip(there, found, strict=True)):
        for word, (tag, guess) in enumerate(zip(tags, guesses, strict=True), start=1):
            labels[row, word] = names.index(tag)
            logits[row, word, names.index(guess)] = 1
    metric = EntityScores(names)
    kept = [metric.rows(logits[n : n + 1], Batch({}, labels[n : n + 1])) for n in (0, 1)]
    rows = {name: torch.cat([part[name] for part in kept]) for name in kept[0]}
    expected = {"entity_precision": 1 / 3, "entity_recall": 1 / 4, "entity_f1": 2 / 7}
    assert metric.compute(rows) == pytest.approx(expected)
    assert EntityScores(["name", "number"]).compute(rows) == {}
    assert EntityScores(["O", "PLACE"]).compute(rows) == {}


def test_recall_among_fewer_pairs_than_k_is_left_out_with_a_warning(caplog):
    rows = dict.fromkeys(("anchor", "positive"), torch.eye(4))
    assert Recall(k=(1, 4, 10)).compute(rows) == {"recall@1": 1.0, "recall@4": 1.0}
    assert "4 pairs, among which recall@10 would always be 1" in caplog.text


def test_recall_counts_positives_that_are_among_the_first(monkeypatch):
    anchors = F.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    positives = anchors + 0.5 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    output = torch.cat([anchors, positives])
    labels = torch.zeros(40, dtype=torch.int64)
    labels[-2:] = -100
    metric = Recall(k=(1, 5, 38))
    rows = metric.rows(output, Batch({}, labels))
    scores = anchors[:38] @ F.normalize(positives[:38], dim=-1).T
    order = scores.argsort(-1, descending=True)
    place = (order == torch.arange(38)[:, None]).int().argmax(-1)
    expected = {f"recall@{k}": float((place < k).double().mean()) for k in (1, 5, 38)}
    assert 0 < expected["recall@1"] < expected["recall@5"] <= expected["recall@38"] == 1
    assert metric.compute(rows) == pytest.approx(expected)
    monkeypatch.setattr("ditty_di.training.metrics._PIECE", 100)  # in pieces
    assert metric.compute(rows) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"k=\[0\]: write numbers of candidates"):
        Recall(k=[0])
