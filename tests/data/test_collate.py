import pickle
from types import SimpleNamespace

import pytest
import torch

from ditty_di.data import (
    PackedCollate,
    PaddedCollate,
    PaddingFreeCollate,
    Seq2SeqCollate,
    decoder_start_token_id,
)


def row(ids, labels):
    return {"input": torch.tensor(ids)}, torch.tensor(labels)


ROWS = [row([5, 6, 7], [-100, 7, 2]), row([8], [2])]


def test_padded_on_the_right_to_the_longest():
    inputs, labels = PaddedCollate(pad_id=2)(ROWS)
    assert inputs["input"].tolist() == [[5, 6, 7], [8, 2, 2]] and inputs.keys() == {"input"}
    assert labels.tolist() == [[-100, 7, 2], [2, -100, -100]], "masked by place: pad may be EOS"
    inputs, labels = PaddedCollate(pad_to_multiple_of=4)(ROWS)
    assert inputs["input"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert labels.shape == (2, 4)


def test_padding_free_is_one_row_whose_positions_begin_again():
    inputs, labels = PaddingFreeCollate()(ROWS)
    assert inputs["input"].tolist() == [[5, 6, 7, 8]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert labels.tolist() == [[-100, 7, 2, 2]]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 3, 4]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_q"] == inputs["max_length_k"] == 3
    assert PaddingFreeCollate(varlen=False)(ROWS)[0].keys() == {"input", "position_ids"}


def test_packed_rows_have_their_bounds_over_the_whole_micro_batch():
    rows = []
    for positions in ([0, 1, 0, 1], [0, 1, 2, 3]):
        inputs, labels = row([1] * 4, [1] * 4)
        rows.append(({**inputs, "position_ids": torch.tensor(positions)}, labels))
    inputs, labels = PackedCollate()(rows)
    assert inputs["input"].shape == labels.shape == inputs["position_ids"].shape == (2, 4)
    assert inputs["cu_seq_lens_q"].tolist() == [0, 2, 4, 8] and inputs["max_length_k"] == 4


def test_the_decoder_reads_its_labels_one_later():
    rows = [row([5, 6], [7, 8, 2]), row([9], [2])]
    inputs, labels = Seq2SeqCollate(decoder_start_token_id=1, pad_id=0)(rows)
    assert inputs["input"].tolist() == [[5, 6], [9, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert inputs["decoder_input_ids"].tolist() == [[1, 7, 8], [1, 2, 0]]
    assert labels.tolist() == [[7, 8, 2], [2, -100, -100]]


@pytest.mark.parametrize(
    "collate", [PaddedCollate(), PaddingFreeCollate(), Seq2SeqCollate(1)], ids=lambda c: str(c)
)
def test_rows_that_fill_up_have_no_label_and_change_nothing(collate):
    _, alone = collate(ROWS)
    inputs, filled = collate([*ROWS, None])
    assert filled[filled != -100].tolist() == alone[alone != -100].tolist()
    inputs, nothing = collate([None, None])
    assert (nothing == -100).all() and inputs["input"].numel() >= 1
    if "attention_mask" in inputs:
        assert (inputs["attention_mask"].sum(1) > 0).all(), "attention to nothing is not a number"


@pytest.mark.parametrize(
    "collate", [PaddedCollate(), PaddingFreeCollate(), PackedCollate(), Seq2SeqCollate(1)]
)
def test_workers_can_take_them(collate):
    assert pickle.loads(pickle.dumps(collate)) == collate


def test_the_start_of_the_decoder_is_the_models():
    model = SimpleNamespace(config=SimpleNamespace(decoder_start_token_id=0))
    assert decoder_start_token_id(model) == 0
    with pytest.raises(ValueError, match="no decoder_start_token_id"):
        decoder_start_token_id(SimpleNamespace(config=SimpleNamespace()))
