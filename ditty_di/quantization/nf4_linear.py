"""NormalFloat4: 4-bit codes in blocks, as in QLoRA (https://arxiv.org/abs/2305.14314, section 3).

The packed bytes are those of bitsandbytes' `nf4`. Blocks never cross rows, so that any rank can
quantize its own rows. A row that is not a multiple of the block is padded with zeros.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditty_di.models.weights import local
from ditty_di.quantization.linear import (
    Decoder,
    QuantizedLinear,
    frozen,
    require_bitsandbytes,
    taken,
)

log = logging.getLogger(__name__)

#: The 16 values of a code (QLoRA, appendix E).
CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


#: Weights that are decoded at a time.
_CPU_PIECE, _PIECE = 1 << 18, 1 << 23


def pairs(device: torch.device | None) -> Tensor:
    """Return the two values of each byte, `[256, 2]` in float32: one look-up decodes two codes."""
    codes = torch.tensor(CODES, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((codes[byte >> 4], codes[byte & 15]), dim=1)


@lru_cache
def _bounds(device: torch.device) -> Tensor:
    codes = torch.tensor(CODES, device=device)
    return (codes[1:] + codes[:-1]) / 2


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight in blocks.

    Args:
        weight: `[out, in]`, of any dtype.
        block_size: weights that share a scale.

    Returns:
        Bytes `[out, blocks * block_size / 2]`, and the largest absolute value of each block,
        `[out, blocks]` in float32; `blocks` is `in / block_size`, rounded up.
    """
    rows = weight.shape[0]
    values = F.pad(weight.float(), (0, -weight.shape[1] % block_size))
    blocks = values.view(rows, values.shape[1] // block_size, block_size)
    scale = blocks.abs().amax(-1)
    # Times the reciprocal, as bitsandbytes does it, for the same bytes.
    scaled = blocks * (1.0 / scale.clamp_min(1e-38))[..., None]
    codes = torch.bucketize(scaled, _bounds(weight.device), out_int32=True).to(torch.uint8)
    codes = codes.view(rows, -1)
    return (codes[:, ::2] << 4) | codes[:, 1::2], scale


def decode(
    dtype: torch.dtype,
    in_features: int,
    qweight: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    pairs: Tensor,
) -> Tensor:
    """Return the weight `[out, in]` of bytes and the blocks' scales, computed in float32.

    Outside of compiled code it is computed piece by piece, which stays in the cache and needs
    little memory.

    Args:
        dtype: of the result.
        in_features: size of the input.
        qweight: `[out, blocks * block_size / 2]` uint8.
        scale: `[out, blocks]`.
        row_scale: `[out, 1]` of double quantization, or None.
        pairs: see `pairs`.
    """
    scales = _scales(scale, row_scale)
    if torch.compiler.is_compiling():
        values = F.embedding(qweight.int(), pairs).view(*scale.shape, -1) * scales[..., None]
        return values.to(dtype).view(len(scale), -1)[:, :in_features]
    columns = 2 * qweight.shape[1]
    weight = torch.empty(len(scale), columns, dtype=dtype, device=qweight.device)
    rows = max(1, (_CPU_PIECE if qweight.device.type == "cpu" else _PIECE) // columns)
    for codes, factors, out in zip(
        *(t.split(rows) for t in (qweight, scales, weight)), strict=True
    ):
        values = F.embedding(codes.int(), pairs).view(*factors.shape, -1)
        torch.mul(values, factors[..., None], out=out.view(values.shape))
    return weight[:, :in_features]


def decode_with_bitsandbytes(dtype: torch.dtype, in_features: int, *packed: Any) -> Tensor:
    """Return what `decode` returns, by bitsandbytes' kernel; the arguments are the same."""
    qweight, scale, row_scale, _ = packed
    rows, blocks = scale.shape
    columns = 2 * qweight.shape[1]
    absmax = _scales(scale, row_scale).view(-1)
    weight = torch.ops.bitsandbytes.dequantize_4bit.default(
        qweight.view(-1, 1), absmax, columns // blocks, "nf4", [rows, columns], dtype
    )
    return weight[:, :in_features]


def _scales(scale: Tensor, row_scale: Tensor | None) -> Tensor:
    return scale.float() if row_scale is None else scale.float() * (row_scale.float() / 255)


#: Weights that share a scale, as bitsandbytes' kernels take them.
_BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _decoders(kernels: str, block_size: int) -> tuple[Decoder, Decoder]:
    """Return the decoders for CUDA devices and for others."""
    if kernels not in ("auto", "torch", "bitsandbytes"):
        raise ValueError(
            f"quantize: kernels={kernels!r}; it can be 'auto', 'torch' or 'bitsandbytes'"
        )
    known = block_size in _BITSANDBYTES_BLOCKS
    if kernels == "bitsandbytes":
        require_bitsandbytes()
        if not known:
            raise ValueError(
                f"quantize: block_size={block_size} with kernels=bitsandbytes; it takes "
                f"{', '.join(map(str, _BITSANDBYTES_BLOCKS))}"
            )
        return decode_with_bitsandbytes, decode_with_bitsandbytes
    if kernels == "torch" or not known or importlib.util.find_spec("bitsandbytes") is None:
        return decode, decode
    # On a CPU bitsandbytes has no kernel for larger blocks, and compiles torch code for each shape.
    fast = block_size < 2048 and same_on_cpu()
    return (
        decode_with_bitsandbytes if torch.cuda.is_available() else decode,
        decode_with_bitsandbytes if fast else decode,
    )


@lru_cache
def same_on_cpu() -> bool:
    """Return whether bitsandbytes' CPU kernel gives the values of `decode`, to the bit.

    Tried once; the kernel takes a sixth to a ninth of the time.
    """
    try:
        require_bitsandbytes()
        weight = torch.linspace(-3, 3, 6 * 256, device="cpu").sin().view(6, 256).cumsum(1)
        qweight, scale = quantize(weight, 64)
        tried = [
            [
                by(dtype, 256, qweight, scales, None, pairs(torch.device("cpu")))
                for by in (decode, decode_with_bitsandbytes)
            ]
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for scales in (scale, scale.bfloat16())
        ]
        return all(torch.equal(ours, theirs) for ours, theirs in tried)
    except Exception as error:  # a library built for another machine may raise anything
        log.warning("bitsandbytes is installed and cannot be used on this CPU: %s", error)
        return False


class NF4Linear(QuantizedLinear):
    """4 bits a weight: `qweight` uint8 `[out, in / 2]`, `scale` bfloat16 `[out, in / block_size]`.

    The weight is cast to `dtype` before it is quantized. With bfloat16 the scales, which are the
    blocks' largest values, are exact; those of other dtypes are rounded by up to 1/512.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        block_size: weights that share a scale, even.
        double_quant: scales of 8 bits (`scale` uint8) times 1/255 of the row's largest (`row_scale`
            bfloat16 `[out, 1]`): 0.517 bytes a weight instead of 0.531.
        kernels: "torch", "bitsandbytes", or "auto": bitsandbytes' where it is installed and the
            input is on a CUDA device, or on a CPU where its kernel gives torch's values.
        **layer: `bias`, `dtype` and `device`, as for `QuantizedLinear`.

    Raises:
        ValueError: an odd block size, or other kernels.
        ImportError: bitsandbytes is asked for and not installed.
    """

    row_scale: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int = 64,
        double_quant: bool = False,
        kernels: str = "auto",
        **layer: Any,
    ) -> None:
        options: dict[str, Any] = {
            "block_size": block_size,
            "double_quant": double_quant,
            "kernels": kernels,
        }
        super().__init__(in_features, out_features, **layer, **options)

    def allocate(  # type: ignore[override]
        self,
        device: torch.device | str | None,
        *,
        block_size: int,
        double_quant: bool,
        kernels: str,
    ) -> None:
        """Create `qweight`, `scale` and, if the scales are quantized too, `row_scale`."""
        if block_size < 2 or block_size % 2:
            raise ValueError(f"quantize: block_size={block_size} must be even, such as 64")
        self.block_size = self.column_step = block_size
        self.double_quant = double_quant
        self._on_cuda, self._elsewhere = _decoders(kernels, block_size)
        rows, blocks = self.out_features, -(-self.in_features // block_size)
        scale_dtype = torch.uint8 if double_quant else torch.bfloat16
        self.qweight = frozen(rows, blocks * block_size // 2, torch.uint8, device)
        self.scale = frozen(rows, blocks, scale_dtype, device)
        row_scale = frozen(rows, 1, torch.bfloat16, device) if double_quant else None
        self.register_parameter("row_scale", row_scale)
        self._pairs = pairs(self.qweight.device)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return rows of the weight as `qweight`, `scale` and, if it is doubled, `row_scale`."""
        qweight, scale = quantize(weight.to(self.dtype), self.block_size)
        if not self.double_quant:
            return {"qweight": qweight, "scale": scale}
        row_scale = scale.amax(1, keepdim=True).bfloat16()
        steps = 255 * scale / row_scale.float().clamp_min(1e-38)
        return {
            "qweight": qweight,
            "scale": steps.round().clamp(0, 255).to(torch.uint8),
            "row_scale": row_scale,
        }

    def packed(self, rows: slice | None = None) -> tuple[Tensor | None, ...]:
        """Return the tensors that `decode` takes, or those of some rows of the weight."""
        own = taken(rows, self.qweight, self.scale, self.row_scale)
        return *own, self._pairs.to(self.qweight.device)

    def decoder(self, device: torch.device) -> Decoder:
        """Return the function that decodes on a device."""
        return self._on_cuda if device.type == "cuda" else self._elsewhere

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)
        # Not a buffer: those lose their values where a model is emptied.
        self._pairs = pairs(local(self.qweight).device)
        return self
