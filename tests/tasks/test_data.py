"""What preview and stats say about rows whose content is known."""

import json

import numpy as np
import pytest
import torch

from ditty_di.data import (
    Loader,
    Mixture,
    PackedCollate,
    PackedDataset,
    PaddedCollate,
    Renderer,
    Seq2SeqCollate,
    Shards,
    TokenBudgetDataset,
    TokenDataset,
    TokenizedDataset,
    TokenizedSeq2SeqDataset,
    in_memory,
)
from ditty_di.data.shards import IndexWriter
from ditty_di.tasks.data import preview, stats
from tests import warm
from tests.data.words import word_tokenizer

RECORDS = [
    {"input": "a b", "output": "c"},
    {"input": "d", "output": "e f"},
    {"input": "a b", "output": "c"},
]


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def examples(tokenizer, tmp_path):
    return TokenizedDataset(in_memory(RECORDS), Renderer(tokenizer), cache_dir=tmp_path)


def shown(capsys, rows, collate, tokenizer, micro=2, **options):
    loader = Loader(rows, micro, shuffle=False, epochs=1, collate_fn=collate)
    preview(dataloader=loader, tokenizer=tokenizer, **options)
    return capsys.readouterr().out


def test_documents_of_a_packed_row_and_their_loss_are_shown(capsys, examples, tokenizer):
    text = shown(capsys, PackedDataset(examples, 14, pad_id=0), PackedCollate(False), tokenizer, 1)
    assert "micro-batch 0: input int64 [1, 14], position_ids int64 [1, 14], labels int64" in text
    assert text.count("5 tokens, 2 in the loss:\n    a b⟦c<eos>⟧") == 2
    assert "    d⟦e f<eos>⟧" in text and "  2 tokens of padding" in text


def test_padding_is_counted_and_long_documents_are_cut(capsys, examples, tokenizer):
    text = shown(capsys, examples, PaddedCollate(pad_id=0, pad_to_multiple_of=8), tokenizer)
    assert "5 tokens, 2 in the loss and 3 of padding:\n    a b⟦c<eos>⟧" in text
    text = shown(capsys, examples, PaddedCollate(), tokenizer, max_chars=3)
    assert "a b... (8 more characters)" in text


def test_inputs_and_outputs_of_an_encoder_decoder(capsys, examples, tokenizer):
    collate = Seq2SeqCollate(pad_id=0, decoder_start_token_id=0)
    text = shown(capsys, TokenizedSeq2SeqDataset(examples), collate, tokenizer)
    assert "    a b\n" in text and "    ⟦e f<eos>⟧" in text


def test_other_rows_are_shapes(capsys, tokenizer):
    rows = [(torch.zeros(2, 3), torch.tensor(1))] * 4
    assert "input float32 [2, 2, 3], labels int64 [2]" in shown(capsys, rows, None, tokenizer)
    with pytest.raises(ValueError, match="number=0 must be at least 1"):
        preview(dataloader=[], number=0)


def test_statistics_of_examples(capsys, examples, tokenizer, tmp_path):
    found = stats(dataset=examples, tokenizer=tokenizer, output=str(tmp_path / "stats.json"))
    report = found["sources"]["all"]
    assert (report["documents"], report["duplicates"], report["tokens"]) == (3, 1, 15)
    assert report["tokens_in_loss"] == 2 + 4 + 2
    assert report["length_histogram"] == {"1": 0, "2": 0, "4": 3}
    assert report["length"] == {"median": 5.0, "p95": 5.0, "max": 5.0}
    assert report["common_tokens"]["<eos>"] == 3
    assert json.loads((tmp_path / "stats.json").read_text())["sources"]["all"] == report
    assert "documents by tokens" in (tmp_path / "stats.svg").read_text()
    assert "3 documents (1 duplicates), 15 tokens, 8 in the loss" in capsys.readouterr().out


def test_packed_examples_are_counted_as_examples_and_sources_apart(examples, tokenizer):
    packed = stats(dataset=PackedDataset(examples, 12, pad_id=0), tokenizer=tokenizer)
    assert packed["sources"]["all"]["documents"] == 3
    rows = [({**examples[i][0], "source": "ab"[i % 2]}, examples[i][1]) for i in range(3)]
    found = stats(dataset=rows, tokenizer=tokenizer)["sources"]
    assert {name: report["documents"] for name, report in found.items()} == {"a": 2, "b": 1}


def test_sources_of_a_mixture_are_named(capsys, examples, tokenizer):
    mixture = Mixture({"web": examples, "code": examples})
    text = shown(capsys, mixture, PaddedCollate(), tokenizer, number=2)
    assert [line for line in text.splitlines() if " row " in line] == [
        *(" row 0, source web", " row 1, source web", " row 0, source web", " row 1, source code")
    ]
    packed = PackedDataset(mixture, 32)
    text = shown(capsys, packed, PackedCollate(False), tokenizer, 1)
    assert " row 0, source web, code\n" in text
    for dataset in (mixture, packed, TokenBudgetDataset(mixture, 20)):
        found = stats(dataset=dataset, tokenizer=tokenizer)["sources"]
        assert {name: report["documents"] for name, report in found.items()} == {
            "web": 3,
            "code": 3,
        }


def test_documents_of_a_token_array_end_at_eos_and_odd_characters_are_named(tokenizer):
    ids = tokenizer("a b<eos>c<eos>d e f")["input_ids"]
    dataset = TokenDataset(np.asarray(ids, np.uint16), seq_len=3)
    report = stats(dataset=dataset, tokenizer=tokenizer)["sources"]["all"]
    assert report["documents"] == 3 and report["length"]["max"] == 5.0
    tokenizer.add_tokens(["\u200b", "\ufffd"])
    ids = torch.tensor(tokenizer("a\u200b\ufffd")["input_ids"])
    rows = [({"input": ids[:-1]}, ids[1:])]
    report = stats(dataset=rows, tokenizer=tokenizer)["sources"]["all"]
    assert report["odd_characters"] == {"U+200B": 1, "U+FFFD": 1}


def test_documents_of_shards_are_counted_whole(tokenizer, tmp_path):
    texts = ["a b " * 90, "c d", "c d", "e"]
    with IndexWriter.open(tmp_path / "train-0", "<u2") as writer:
        for text in texts:
            writer.add([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    shards = Shards(tmp_path, 8)
    report = stats(dataset=shards, tokenizer=tokenizer)["sources"]["all"]
    assert (report["documents"], report["duplicates"]) == (4, 1)
    assert report["tokens"] == shards.tokens and report["length"]["max"] > 90
    few = stats(dataset=shards, tokenizer=tokenizer, rows=1)["sources"]["all"]
    assert few["documents"] == 1


def test_the_commands_leave_no_run(tmp_path):
    text = warm.ditty_di(tmp_path, "task=preview", "max_chars=50", "number=2")
    assert "micro-batch 1: input int64 [8, 256]" in text
    text = warm.ditty_di(tmp_path, "task=stats", "split=validation", "rows=20", "output=s.json")
    assert "20 of " in text and {p.name for p in tmp_path.iterdir()} == {"s.json", "s.svg"}
