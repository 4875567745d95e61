"""Labeled texts, tagged tokens, pairs of texts and hidden tokens: from lines to micro-batches."""

import json
from functools import partial

import pytest
import torch

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
    label_names,
    records,
    train_bpe,
)
from ditty_di.models.tokenizer import add_to
from tests.data.words import word_tokenizer

LABELS = ["no", "yes"]


@pytest.fixture(scope="module")
def bpe(cache_dir):
    """Words are several tokens; id 1 is padding."""
    return add_to(train_bpe(["one two three"], 300, cache_dir=cache_dir), mask_token="<mask>")


def encoded(lines, encode, cache_dir):
    return EncodedDataset(in_memory(lines), encode, cache_dir=cache_dir)


def in_file(tmp_path, lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return records(path, validation_fraction=0)


def test_labels_are_those_of_the_records_in_a_fixed_order():
    def names(*labels):
        return label_names(in_memory([{"label": label} for label in labels]))

    assert names("b", "a", "b") == ["a", "b"]
    assert names(10, 9, 0) == names("10", "9", "0") == ["0", "9", "10"]
    assert names(["B-x", "O"], ["O"]) == ["B-x", "O"]
    with pytest.raises(ValueError, match='all training records have the label "x" in "label"'):
        label_names(in_memory([{"label": "x"}] * 3))
    with pytest.raises(ValueError, match='no record has a label in "label"'):
        names(None, "")
    with pytest.raises(ValueError, match='example 2: more than 2 different labels in "label"'):
        label_names(in_memory([{"label": n} for n in range(9)]), limit=2)


def test_texts_and_pairs_with_their_labels(cache_dir):
    tokenizer = word_tokenizer(eos_after=True)
    lines = [
        {"text": "a b", "label": "yes"},
        {"text": "c", "text_pair": "d e", "label": "no"},
        {"text": "a b c d e f", "label": "no", "text_pair": None},
    ]
    rows = encoded(lines, LabeledTexts(tokenizer, LABELS, max_tokens=6), cache_dir)
    texts = [tokenizer.decode(inputs["input"]) for inputs, _ in (rows[n] for n in range(3))]
    assert texts[0] == "a b<eos>" and "c" in texts[1] and "d e" in texts[1]
    assert texts[2] == "a b c<eos>", "it loses its end, not its special token"
    assert [labels.tolist() for _, labels in (rows[n] for n in range(3))] == [[1], [0], [0]]
    assert rows.lengths.tolist() == [len(rows[n][0]["input"]) for n in range(3)]
    inputs, labels = EncoderCollate(pad_id=7)([rows[0], rows[2], None])
    assert labels.tolist() == [1, 0, -100]
    assert inputs["input"].shape == inputs["attention_mask"].shape == (3, 6)
    assert inputs["attention_mask"].sum(1).tolist() == [4, 6, 1], "attention to nothing is NaN"
    assert (inputs["input"][0, 4:] == 7).all() and (inputs["input"][2] == 7).all()
    assert EncoderCollate()([None])[1].tolist() == [-100]


def test_bad_lines_are_named_all_together_with_file_and_line(tmp_path, cache_dir):
    tokenizer = word_tokenizer()
    rows = in_file(
        tmp_path,
        [
            {"text": "a", "label": "yes"},
            {"text": "a"},
            {"text": "a", "label": "maybe"},
            {"text": " ", "label": "no"},
            {"label": "no"},
            {"text": "a", "label": 1.5},
            {"text": "a", "label": 3},
        ],
    )
    encode = LabeledTexts(tokenizer, LABELS)
    with pytest.raises(ValueError) as error:
        EncodedDataset(rows, encode, cache_dir=cache_dir)
    file = tmp_path / "rows.jsonl"
    assert str(error.value).splitlines() == [
        "6 of 7 records cannot be used:",
        f'{file}:2: no "label"',
        f"{file}:3: \"label\" is 'maybe', which no training record has: no, yes",
        f'{file}:4: "text" is empty',
        f'{file}:5: no "text"',
        f'{file}:6: "label" is 1.5, neither text nor an integer',
        f'{file}:7: "label" is 3, a number, and other labels are text: no, yes',
    ]
    # task=check finds them too, without encoding everything.
    with pytest.raises(ValueError, match=r"rows.jsonl:2"):
        EncodedDataset.rehearse({"records": rows, "encode": encode}.get)


def test_the_first_token_of_a_word_has_its_label(bpe, cache_dir):
    words = ["one", "zzz", "two"]
    encode = LabeledTokens(bpe, ["a", "b"], max_tokens=12)
    rows = encoded([{"tokens": words, "tags": ["a", "b", "a"]}] * 2, encode, cache_dir)
    inputs, labels = rows[0]
    assert bpe.decode(inputs["input"]) == "onezzztwo"
    learned = labels >= 0
    assert labels[learned].tolist() == [0, 1, 0]
    first = [bpe(word)["input_ids"][0] for word in words]
    assert inputs["input"][learned].tolist() == first and len(labels) > 3
    batch = EncoderCollate(pad_id=1, label_per_token=True)([rows[0], None])
    assert batch[1].shape == batch[0]["input"].shape and (batch[1][1] == -100).all()
    lines = [{"tokens": words, "tags": ["a"]}, {"tokens": words}, {"tokens": [], "tags": []}]
    with pytest.raises(ValueError) as error:
        encoded(lines, encode, cache_dir)
    assert str(error.value).splitlines()[1:] == [
        "example 0: 1 tags for 3 tokens",
        'example 1: no "tags"',
        'example 2: "tokens" is not a list of words',
    ]


def test_pairs_are_a_batch_of_anchors_and_one_of_positives(cache_dir):
    tokenizer = word_tokenizer()
    lines = [{"anchor": "a", "positive": "b c"}, {"query": "d", "positive": "e"}]
    rows = encoded(lines, TextPairs(tokenizer), cache_dir)
    inputs, labels = PairsCollate(pad_id=0)([rows[0], None, rows[1]])
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input"], inputs["attention_mask"], strict=True)
    ]
    assert texts == ["a", "d", "<pad>", "b c", "e", "<pad>"] and labels.tolist() == [0, 0, -100]
    with_negatives = [{**line, "negative": "f g h"} for line in lines]
    rows = encoded(with_negatives, TextPairs(tokenizer, negatives=True), cache_dir)
    inputs, _ = PairsCollate(pad_id=0, negatives=True)([rows[0], rows[1]])
    assert len(inputs["input"]) == 6 and tokenizer.decode(inputs["input"][-1]) == "f g h"
    # Otherwise ranks would have other numbers of candidates.
    with pytest.raises(ValueError, match='example 0: there is a "negative"'):
        encoded(with_negatives, TextPairs(tokenizer), cache_dir)
    with pytest.raises(ValueError, match='example 0: no "negative"'):
        encoded(lines, TextPairs(tokenizer, negatives=True), cache_dir)


# -- hidden tokens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(bpe, cache_dir):
    lines = [{"text": f"one two three {n} <|endoftext|> " * (1 + n % 5)} for n in range(48)]
    return encoded(lines, PlainTexts(bpe), cache_dir)


def masked_loader(texts, bpe, rows=4, **options):
    return Loader(
        MaskedTokens(texts, bpe),
        rows,
        collate_fn=EncoderCollate(pad_id=1, label_per_token=True),
        **options,
    )


def rows_of(batches):
    """Return what is hidden in each row that has labels, without padding."""
    return [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for inputs, of_batch in batches
        for ids, mask, labels in zip(
            inputs["input"], inputs["attention_mask"], of_batch, strict=True
        )
        if mask.sum() > 1
    ]


def test_hidden_tokens_are_masked_replaced_or_kept_in_their_shares(bpe):
    ids = torch.arange(3, 259).repeat(40)
    ids[::2] = bpe.eos_token_id
    hidden = MaskedTokens([({"input": ids}, ids)], bpe)
    torch.manual_seed(0)
    inputs, labels = hidden[0]
    chosen = labels >= 0
    assert not chosen[::2].any(), "special tokens are never hidden"
    assert (labels[chosen] == ids[chosen]).all() and (
        inputs["input"][~chosen] == ids[~chosen]
    ).all()
    assert chosen[1::2].float().mean().item() == pytest.approx(0.15, abs=0.02)
    now = inputs["input"][chosen]
    shares = [(now == bpe.mask_token_id).float().mean(), (now == labels[chosen]).float().mean()]
    assert shares == [pytest.approx(0.8, abs=0.04), pytest.approx(0.1, abs=0.03)]


def test_padding_of_a_row_is_neither_hidden_nor_seen(bpe):
    ids = torch.tensor([5, 6, 7, 1, 1])
    hidden = MaskedTokens([({"input": ids}, torch.tensor([6, 7, 8, -100, -100]))], bpe, fraction=1)
    inputs, labels = hidden[0]
    assert len(inputs["input"]) == 3 and labels.tolist() == [5, 6, 7]


def test_the_same_tokens_are_hidden_on_any_layout_and_after_a_resume(texts, bpe):
    def first(loader, batches):
        return [batch for batch, _ in zip(loader, range(batches), strict=False)]

    one = masked_loader(texts, bpe, 8, seed=3, epochs=2)
    whole = rows_of(one)
    halves = [masked_loader(texts, bpe, 4, seed=3, dp_rank=r, dp_world_size=2) for r in (0, 1)]
    pairs = zip(*(first(half, 12) for half in halves), strict=True)
    assert [row for pair in pairs for row in rows_of(pair)] == whole
    workers = masked_loader(texts, bpe, 8, seed=3, epochs=2, num_workers=1)
    assert rows_of(workers) == whole
    stopped = masked_loader(texts, bpe, 8, seed=3)
    first(stopped, 5)
    resumed = masked_loader(texts, bpe, 16, seed=3, epochs=2)
    resumed.load_state_dict({**stopped.state_dict(), "consumed": 40})
    assert rows_of(resumed) == whole[40:]
    epochs = [sorted(map(str, part)) for part in (whole[:48], whole[48:])]
    assert epochs[0] != epochs[1], "the second epoch hides other tokens"


def test_a_validation_hides_the_same_tokens_each_time(texts, bpe):
    make = partial(masked_loader, texts, bpe, shuffle=False, epochs=1)
    torch.manual_seed(1)
    before = rows_of(make(4))
    torch.manual_seed(2)
    assert rows_of(make(4)) == rows_of(make(16)) == before


def test_what_cannot_be_hidden_is_refused(texts, bpe, cache_dir):
    plain = train_bpe(["one two three"], 300, cache_dir=cache_dir)
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        MaskedTokens(texts, plain)
    with pytest.raises(ValueError, match="fraction=0 must be above 0"):
        MaskedTokens(texts, bpe, fraction=0)
    with pytest.raises(ValueError, match="more than 1 together"):
        MaskedTokens(texts, bpe, random_share=0.3)
