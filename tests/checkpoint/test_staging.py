"""Copies in host memory: of the same kind, in memory that is used again."""

import torch
from torchao.optim.subclass_8bit import OptimState8bit

from ditty_di.checkpoint.staging import Staging


def test_memory_is_used_again_and_holds_the_new_values():
    staging, weight = Staging(), torch.arange(6.0).reshape(2, 3).T
    first = staging.copies({"a": {"w": weight, "n": b"1"}})["a"]
    at = first["w"].data_ptr()
    weight += 1
    second = staging.copies({"a": {"w": weight, "n": b"2"}})["a"]
    assert second["w"].data_ptr() == at != weight.data_ptr()
    assert torch.equal(second["w"], weight) and second["w"].stride() == weight.stride()
    assert second["n"] == b"2"


def test_another_shape_or_dtype_gets_other_memory():
    staging = Staging()
    for value in (torch.ones(3), torch.zeros(2), torch.zeros(2).bfloat16(), torch.tensor(5)):
        copy = staging.copies({"a": {"w": value}})["a"]["w"]
        assert torch.equal(copy, value) and copy.dtype == value.dtype
    staging.copies({"a": {}})
    assert not staging._buffers, "what is gone holds no memory"


def test_states_of_one_name_and_tensors_in_tensors():
    """Two states, and the parts of a tensor that is made of tensors, have keys of their own."""
    low = OptimState8bit.zeros((256,), signed=True, block_size=256)
    staging = Staging()
    for value in (1.0, 2.0):
        low.copy_(torch.full((256,), value))
        copies = staging.copies({"a": {"w": low}, "b": {"w": torch.full((3,), value)}})
        low.copy_(torch.zeros(256))
        assert isinstance(copies["a"]["w"], OptimState8bit)
        assert copies["a"]["w"].dequantize().allclose(torch.tensor(value))
        assert copies["b"]["w"].eq(value).all()
