"""Experts in MXFP4, as gpt-oss is published: dequantized while they are read, by slices.

`gate_up_proj_blocks` has two 4-bit floats a byte in blocks of 32, `gate_up_proj_scales` the power
of two of each block (OCP Microscaling Formats 1.0, section 5.3). The values are those of
`transformers.integrations.mxfp4.convert_moe_packed_tensors`, exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import QuantizationMethod

from ditty_di.models.deferred import Deferred, Index, deferred

#: Values that share a scale.
BLOCK = 32


def is_mxfp4(config: Any) -> bool:
    """Return whether a configuration of transformers says that its experts are in MXFP4."""
    quantized = getattr(config, "quantization_config", None)
    return isinstance(quantized, dict) and quantized.get("quant_method") == QuantizationMethod.MXFP4


def converters(names: Iterable[str]) -> list[WeightConverter]:
    """Return converters that dequantize the packed tensors among `names`."""
    ends = {name.rpartition(".")[2] for name in names}
    packed = sorted(end.removesuffix("_blocks") for end in ends if end.endswith("_blocks"))
    return [WeightConverter([f"{n}_blocks", f"{n}_scales"], n, [Dequantize()]) for n in packed]


class Dequantize(ConversionOps):
    """Make a weight `[experts, rows, columns]` of its blocks and scales, without reading them."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the weight by its name.

        Raises:
            ValueError: the files have blocks without scales, or the reverse.
        """
        parts = {n: t[0] if isinstance(t, list) else t for n, t in input_dict.items()}
        blocks = next((t for n, t in parts.items() if n.endswith("_blocks")), None)
        scales = next((t for n, t in parts.items() if n.endswith("_scales")), None)
        if blocks is None or scales is None:
            raise ValueError(f"MXFP4 needs {'blocks' if blocks is None else 'scales'} too")
        return {full_layer_name: dequantized(deferred(blocks), deferred(scales))}


def dequantized(blocks: Deferred, scales: Deferred) -> Deferred:
    """Return a weight that is dequantized where it is read.

    Args:
        blocks: `[experts, columns, rows / 32, 16]` bytes.
        scales: `[experts, columns, rows / 32]`.
    """
    experts, columns, groups, _ = blocks.shape

    def into(out: Tensor, index: Index) -> None:
        which, rows, own = index
        first = rows.start // BLOCK
        groups_read = slice(first, -(-rows.stop // BLOCK))
        wanted = slice(rows.start - first * BLOCK, rows.stop - first * BLOCK)
        for n, expert in enumerate(range(which.start, which.stop)):  # little memory at a time
            part = (slice(expert, expert + 1), own, groups_read)
            values = convert_moe_packed_tensors(blocks.read(part), scales.read(part))
            out[n].copy_(values[0, wanted])

    return Deferred((experts, groups * BLOCK, columns), torch.bfloat16, into)
