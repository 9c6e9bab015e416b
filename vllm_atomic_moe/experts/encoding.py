"""From the parts of a quantized matrix in a checkpoint to codes and scales of packed rows.

Nothing is requantized: codes are unpacked and reordered; scales keep their dtype.

Legend: H hidden size, I full intermediate size, N outputs and K inputs of a matrix, G scale rows
and C scale columns of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_atomic_moe.experts.formats import Encoded, check_values, unpack_codes
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.quantization import SCALE_DTYPES, Scheme
from vllm_atomic_moe.files.row_formats import Projection

# AWQ's order of the eight codes within an int32.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def dense_bytes(model: CheckpointInfo, itemsize: int, gated: bool = True) -> int:
    """Bytes of all experts of a checkpoint, scales included, biases not.

    Args:
        itemsize: bytes of a plain weight as it is served.
        gated: whether there is a gate_proj.
    """
    sizes = model.hidden_size, model.intermediate_size
    return model.num_experts * sum(
        model.scheme(layer).row_format(*sizes).expert_bytes(*sizes, itemsize, gated)
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
        ValueError: a part has the wrong dtype or shape, or does not encode a finite weight; one
            line without the expert's name.
    """
    sizes = hidden_size, intermediate_size
    scales = encode_scales(scheme, projection, parts, *sizes)
    codes_NK = _read_codes(scheme, parts)
    outputs, inputs = sizes if projection == "down" else sizes[::-1]
    if tuple(codes_NK.shape) != (outputs, inputs):
        raise ValueError(
            f"holds {codes_NK.shape[0]} x {codes_NK.shape[1]} codes, the model has "
            f"{outputs} x {inputs}"
        )
    encoded = scales._replace(codes_SH=codes_NK.t() if projection == "down" else codes_NK)
    check_values(encoded, scheme.row_format(*sizes), projection)
    return encoded


def encode_scales(
    scheme: Scheme,
    projection: Projection,
    parts: Mapping[str, torch.Tensor],
    hidden_size: int,
    intermediate_size: int,
) -> Encoded:
    """As `encode`, but with empty codes, which are not read; values are not checked."""
    down = projection == "down"
    outputs, inputs = (hidden_size, intermediate_size) if down else (intermediate_size, hidden_size)
    if missing := [name for name in scheme.parts if name not in parts]:
        raise ValueError(f"{missing[0]} is missing")
    rows, columns = scheme.rows or outputs, scheme.columns or inputs
    wanted = (-(-outputs // rows), -(-inputs // columns))
    scales_NK, zeros_NK, factor = _read_scales(scheme, parts)
    if tuple(scales_NK.shape) != wanted:
        raise ValueError(f"scales are {list(scales_NK.shape)}, wanted {list(wanted)}")
    if scales_NK.dtype != SCALE_DTYPES[scheme.scale]:
        raise ValueError(f"scales are {scales_NK.dtype}, those of other experts {scheme.scale}")
    if zeros_NK is not None and zeros_NK.shape != scales_NK.shape:
        raise ValueError(f"zeros are {list(zeros_NK.shape)}, wanted {list(wanted)}")
    group_K = None
    if scheme.facts.scattered:
        group_K = _part(parts, "g_idx", torch.int32, 1).long()
        if len(group_K) != inputs or bool(((group_K < 0) | (group_K >= wanted[1])).any()):
            raise ValueError(f"g_idx does not give a group to each of {inputs} inputs")
        if not down and not torch.equal(
            group_K, torch.arange(inputs, device=group_K.device) // columns
        ):
            raise ValueError("activation order (g_idx) in gate_proj or up_proj is not served")
    codes = torch.empty(0, 0, dtype=torch.uint8)
    if not down:
        return Encoded(codes, scales_NK, zeros_NK, factor)
    return Encoded(
        codes, scales_NK.t(), None if zeros_NK is None else zeros_NK.t(), factor, group_K
    )


def _read_codes(scheme: Scheme, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Codes [N, K] of a matrix, uint8."""
    name, facts = scheme.parts[0], scheme.facts
    if facts.dtype == "F8_E4M3":
        return _part(parts, name, torch.float8_e4m3fn, 2).view(torch.uint8)
    if facts.dtype == "U8":
        codes = _part(parts, name, torch.uint8, 3 if facts.fused else 2)
        return unpack_codes(codes.flatten(1), 4)
    packed = _part(parts, name, torch.int32, 2)
    if not facts.transposed:
        return _nibbles(packed)
    # [K / 8, N] of GPTQ, [K, N / 8] of AWQ
    return _in_awq_order(packed).t() if facts.per_element[0] > 1 else _nibbles(packed.t())


def _read_scales(
    scheme: Scheme, parts: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scales, zero points [N, K / group], and the factor of a matrix."""
    if scheme.facts.transposed:
        scales_NG = _part(parts, "scales", None, 2).t()
        packed = _part(parts, "qzeros", torch.int32, 2)
        if scheme.facts.zeros:
            return scales_NG, _in_awq_order(packed).t(), None
        # 8 in both versions of the format; the first version stores 7.
        stored = _nibbles(packed)
        if not any(bool((stored == zero).all()) for zero in (7, 8)):
            raise ValueError("zero points are not 8, so that its weights are not symmetric")
        return scales_NG, None, None
    scales, *others = (_part(parts, name) for name in scheme.parts[1:])
    scales = scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
    if scheme.facts.code == "e4m3" and scales.dim() < 2:
        scales = scales.reshape(-1, 1)
    if others and (others[0].dtype != torch.float32 or others[0].numel() != 1):
        raise ValueError(
            f"{scheme.parts[2]} is {others[0].dtype} {list(others[0].shape)}, wanted one float32"
        )
    return scales, None, others[0].reshape(()) if others else None


def _part(
    parts: Mapping[str, torch.Tensor],
    name: str,
    dtype: torch.dtype | None = None,
    dims: int | None = None,
) -> torch.Tensor:
    """One part, checked for its dtype and number of dimensions."""
    part = parts[name]
    if not part.numel():
        raise ValueError(f"{name} is {part.dtype} {list(part.shape)}, which is empty")
    if (dtype or part.dtype) != part.dtype or (dims or part.dim()) != part.dim():
        wanted = f"{dtype} of {dims} dimensions" if dtype else f"{dims} dimensions"
        raise ValueError(f"{name} is {part.dtype} {list(part.shape)}, wanted {wanted}")
    return part


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The 8 codes of every int32, the lowest first: uint8 [N, 8 · columns]."""
    # Flat first: one column is contiguous with any strides, and cannot be viewed as bytes.
    stored = packed.contiguous().view(-1).view(torch.uint8).view(len(packed), -1)
    return unpack_codes(stored, 4)


def _in_awq_order(packed: torch.Tensor) -> torch.Tensor:
    """The same of AWQ, which interleaves them."""
    return _nibbles(packed).unflatten(1, (packed.shape[1], 8))[..., AWQ_ORDER].flatten(1)
