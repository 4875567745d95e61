"""Moving tensors about before they are read: the right elements, and no others."""

from __future__ import annotations

import pytest
import torch

from ditty_di.models.deferred import Deferred, deferred


class Log:
    """A tensor in a file, and how many of its elements were read."""

    def __init__(self, *shape):
        self.tensor, self.read = torch.randn(shape), 0

    def deferred(self):
        def into(out, index):
            self.read += out.numel()
            out.copy_(self.tensor[index])

        return Deferred(self.tensor.shape, self.tensor.dtype, into)


def merged_experts(tensors):
    gate, up = tensors[:3], tensors[3:]
    return torch.cat([torch.stack(gate, dim=0), torch.stack(up, dim=0)], dim=1)


def third_of_a_transposed_row(tensors):
    whole = torch.transpose(torch.cat(tensors), dim0=0, dim1=-1)
    return torch.chunk(whole, 3, dim=1)[1].contiguous()


def experts_again(tensors):
    stacked = torch.stack(tensors, dim=1)
    return torch.chunk(stacked, stacked.size(1), dim=1)[2].squeeze(1)


def split(tensors):
    return torch.split(torch.cat(tensors, dim=-1), [5, 1, 24], dim=1)[2]


@pytest.mark.parametrize("move", [merged_experts, third_of_a_transposed_row, experts_again, split])
def test_a_slice_is_that_of_the_whole_and_reads_nothing_else(move):
    logs = [Log(4, 5) for _ in range(6)]
    made = move([log.deferred() for log in logs])
    whole = move([log.tensor for log in logs])
    assert isinstance(made, Deferred) and made.shape == whole.shape and made.ndim == whole.ndim
    assert torch.equal(made.read(), whole)
    for log in logs:
        log.read = 0
    part = tuple(slice(n // 3, n - n // 4) for n in whole.shape)
    out = torch.empty(whole[part].shape, dtype=torch.float64)
    made.copy_into(out, part)
    assert torch.equal(out, whole[part].double())
    assert sum(log.read for log in logs) == out.numel()


def test_any_other_function_reads_and_computes():
    tensor = torch.randn(4, 6)
    assert torch.equal(deferred(tensor).reshape(2, 12), tensor.reshape(2, 12))
    assert torch.equal(torch.add(deferred(tensor), 1), tensor + 1)
    pad = torch.nn.functional.pad
    assert torch.equal(pad(deferred(tensor), (1, 0)), pad(tensor, (1, 0)))


@pytest.mark.parametrize("move", [torch.cat, torch.stack])
def test_parts_that_do_not_fit_are_named_by_their_shapes(move):
    with pytest.raises(ValueError, match=r"\[4, 5\].*\[4, 6\]|\[1, 4, 5\].*\[1, 4, 6\]"):
        move([deferred(torch.zeros(4, 5)), deferred(torch.zeros(4, 6))])
