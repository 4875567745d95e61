"""Packed and padding-free batches on the attentions that only a GPU has, with backward passes."""

import importlib.util

import pytest
import torch

from ditty_di.data import PackedCollate, PackedDataset, PaddedCollate, PaddingFreeCollate
from tests.data.ragged import Documents, make_model, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DOCUMENTS = Documents([9, 3, 16, 1, 7, 12, 5])
FLASH = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("flash_attn") is None, reason="flash_attn is not installed"
    ),
)


def on_gpu(batch):
    inputs, labels = batch
    moved = {k: v.cuda() if torch.is_tensor(v) else v for k, v in inputs.items()}
    return moved, labels.cuda()


def results(model, batches):
    """Sum of squares of the logits where there are labels, and its gradients."""
    total = torch.zeros((), device="cuda")
    for inputs, labels in map(on_gpu, batches):
        total = total + run(model, inputs)[labels != -100].float().square().sum()
    total.backward()
    found = {name: p.grad.float().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return total.item(), found


@pytest.mark.parametrize("rows_at_once", [1, 3])
@pytest.mark.parametrize("how", ["packed", "padding_free"])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", FLASH])
def test_documents_are_apart(attention, how, rows_at_once):
    """Several packed rows at once too: flash attention finds documents by `cu_seq_lens` alone."""
    dtype = torch.bfloat16 if attention.startswith("flash") else torch.float32
    # flex attention on CUDA needs heads of 16 dimensions at least: those of this one
    model = make_model("qwen3", "eager", dtype=dtype).cuda()
    alone = [PaddedCollate()([DOCUMENTS[i]]) for i in range(len(DOCUMENTS))]
    expected, gradients = results(model, alone)
    model.set_attn_implementation(attention)
    dataset, collate = DOCUMENTS, PaddingFreeCollate()
    if how == "packed":
        dataset, collate = PackedDataset(DOCUMENTS, 20), PackedCollate()
    rows = [dataset[i] for i in range(len(dataset))]
    chunks = [rows[i : i + rows_at_once] for i in range(0, len(rows), rows_at_once)]
    found, mine = results(model, map(collate, chunks))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert found == pytest.approx(expected, rel=tolerance)
    for name, value in gradients.items():
        difference = (mine[name] - value).norm() / value.norm()
        assert difference < tolerance * 5, name
