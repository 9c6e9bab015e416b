"""From what a checkpoint holds of a quantized matrix to codes and scales of packed rows.

Nothing is quantized anew: codes are unpacked, and change places; scales keep their dtype.

Legend: H hidden size, I full intermediate size, N outputs and K inputs of a matrix, G scale rows
and C scale columns of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_atomic_moe.experts.formats import (
    PLAIN,
    Block,
    Code,
    Encoded,
    Factor,
    Projection,
    RowFormat,
    unpack_codes,
)
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.quantization import Scheme

SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.float8_e8m0fnu,  # which older versions of safetensors have no name for
}
_CODES: Mapping[str, tuple[Code, Factor]] = {
    "fp8": ("e4m3", "none"),
    "int4": ("int4", "none"),
    "gptq": ("int4", "none"),
    "awq": ("uint4", "none"),
    "mxfp4": ("e2m1", "none"),
    "mxfp4-blocks": ("e2m1", "none"),
    "nvfp4": ("e2m1", "over"),
    "nvfp4-2": ("e2m1", "times"),
}
# Where in an int32 the eight codes of AWQ stand.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def row_format(scheme: Scheme, hidden_size: int, intermediate_size: int) -> RowFormat:
    """The format of a layer's packed rows.

    Args:
        hidden_size: H.
        intermediate_size: I.
    """
    if scheme.kind == "plain":
        return PLAIN
    code, factor = _CODES[scheme.kind]
    return RowFormat(
        code,
        rows=Block(scheme.rows or intermediate_size, scheme.columns or hidden_size),
        columns=Block(scheme.columns or intermediate_size, scheme.rows or hidden_size),
        scale=SCALE_DTYPES[scheme.scale],
        zeros=scheme.kind == "awq",
        factor=factor,
        scattered=scheme.kind == "gptq",
    )


def codes_of(model: CheckpointInfo) -> frozenset[Code]:
    """What the rows of a checkpoint's layers are, packed."""
    sizes = model.hidden_size, model.intermediate_size
    return frozenset(row_format(model.scheme(layer), *sizes).code for layer in model.layers)


def dense_bytes(model: CheckpointInfo, itemsize: int, gated: bool = True) -> int:
    """Bytes of all experts of a checkpoint, scales included, biases not.

    Args:
        itemsize: bytes of a plain weight as it is served.
        gated: whether there is a gate_proj.
    """
    sizes = model.hidden_size, model.intermediate_size
    return model.num_experts * sum(
        row_format(model.scheme(layer), *sizes).expert_bytes(*sizes, itemsize, gated)
        for layer in model.layers
    )


def encode(
    scheme: Scheme,
    projection: Projection,
    parts: Mapping[str, torch.Tensor],
    hidden_size: int,
    intermediate_size: int,
) -> Encoded:
    """One projection of one expert, atoms as rows.

    Args:
        parts: part -> tensor, those of `scheme.parts`, as the checkpoint has them.

    Raises:
        ValueError: a part has the wrong dtype or shape, or scales that no weights come from; one
            line without the expert's name.
    """
    down = projection == "down"
    outputs, inputs = (hidden_size, intermediate_size) if down else (intermediate_size, hidden_size)
    codes_NK, scales_NK, zeros_NK, factor, group_K = _read(scheme, parts)
    assert scales_NK is not None
    if tuple(codes_NK.shape) != (outputs, inputs):
        raise ValueError(
            f"holds {codes_NK.shape[0]} x {codes_NK.shape[1]} codes, the model has "
            f"{outputs} x {inputs}"
        )
    rows, columns = scheme.rows or outputs, scheme.columns or inputs
    wanted = (-(-outputs // rows), -(-inputs // columns))
    if tuple(scales_NK.shape) != wanted:
        raise ValueError(f"scales are {list(scales_NK.shape)}, wanted {list(wanted)}")
    if scales_NK.dtype != SCALE_DTYPES[scheme.scale]:
        raise ValueError(f"scales are {scales_NK.dtype}, those of other experts {scheme.scale}")
    as_floats = scales_NK.float()
    if factor is not None:
        as_floats = as_floats * factor
    if not as_floats.isfinite().all() or (factor is not None and not factor):
        raise ValueError("scales are not finite, or their factor is zero")
    if zeros_NK is not None and zeros_NK.shape != scales_NK.shape:
        raise ValueError(f"zeros are {list(zeros_NK.shape)}, wanted {list(wanted)}")
    if group_K is not None and not down:
        if not torch.equal(group_K, torch.arange(inputs) // columns):
            raise ValueError("activation order (g_idx) in gate_proj or up_proj is not served")
        group_K = None
    if down:
        codes_NK, scales_NK = codes_NK.t(), scales_NK.t()
        zeros_NK = None if zeros_NK is None else zeros_NK.t()
    return Encoded(codes_NK, scales_NK, zeros_NK, factor, group_K)


def _read(scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> Encoded:
    """Codes [N, K] and scales of a matrix as it stands in the checkpoint."""
    if scheme.kind in ("gptq", "awq"):
        return _read_transposed(scheme, parts)
    codes, scales, *others = (parts[name] for name in scheme.parts)
    scales = scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
    if scheme.kind == "fp8":
        if codes.dtype != torch.float8_e4m3fn:
            raise ValueError(f"weights are {codes.dtype}, those of other experts float8_e4m3fn")
        codes = codes.view(torch.uint8)
        if bool(((codes & 127) == 127).any()):
            raise ValueError("weights are not finite")
        scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
        return Encoded(codes, scales)
    if scheme.kind == "int4":
        if codes.dtype != torch.int32:
            raise ValueError(f"weights are {codes.dtype}, those of other experts int32")
        return Encoded(_nibbles(codes), scales)
    if scheme.kind == "mxfp4-blocks":
        codes = codes.flatten(-2)
    if codes.dtype != torch.uint8:
        raise ValueError(f"weights are {codes.dtype}, those of other experts uint8")
    factor = others[0].float().reshape(()) if others else None
    return Encoded(unpack_codes(codes, 4), scales, factor=factor)


def _read_transposed(scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> Encoded:
    """GPTQ's and AWQ's matrices, which are stored [K, N]."""
    packed, zeros = parts["qweight"], parts["qzeros"]
    if packed.dtype != torch.int32 or zeros.dtype != torch.int32:
        raise ValueError(f"weights and zeros are {packed.dtype} and {zeros.dtype}, wanted int32")
    scales_NG = parts["scales"].t()
    if scheme.kind == "awq":
        codes_NK, zeros_NG = (
            _nibbles(matrix).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).t()
            for matrix in (packed, zeros)
        )
        return Encoded(codes_NK, scales_NG, zeros_NG)
    # 8 in both versions of the format; the first stores one less.
    stored = _nibbles(zeros)
    if not bool(((stored == stored[0, 0]) & ((stored == 7) | (stored == 8))).all()):
        raise ValueError("zero points are not 8, so that its weights are not symmetric")
    group = parts["g_idx"].long()
    return Encoded(_nibbles(packed.t().contiguous()), scales_NG, group_S=group)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The 8 codes of every int32, the lowest first: uint8 [N, 8 · columns]."""
    return unpack_codes(packed.contiguous().view(torch.uint8), 4)
