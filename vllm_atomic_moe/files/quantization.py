"""How checkpoints hold quantized experts: which tensors there are of a matrix, and in which blocks.

A matrix [N, K] (N outputs, K inputs) arrives as several tensors, told apart by what stands behind
the projection's name: its *parts*. Which parts there are, their dtypes and shapes say how it is
quantized; config.json must say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_atomic_moe.files.config import quantization

Kind = Literal["plain", "fp8", "int4", "gptq", "awq", "mxfp4", "mxfp4-blocks", "nvfp4", "nvfp4-2"]

# A part's dtype as safetensors spells it, and its shape.
Part = tuple[str, tuple[int, ...]]

FP8, FLOATS = "F8_E4M3", ("F32", "BF16", "F16")
# Parts that say nothing about weights: scales of activations, which stay in 16 bits here, and what
# shapes say already.
IGNORED = ("input_scale", "input_global_scale", "weight_shape", "k_scale", "v_scale")
# Parts that hold a matrix itself.
MATRICES = ("weight", "weight_packed", "qweight", "blocks")
PARTS: Mapping[Kind, tuple[str, ...]] = {
    "plain": ("weight",),
    "int4": ("weight_packed", "weight_scale"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "mxfp4": ("weight_packed", "weight_scale"),
    "mxfp4-blocks": ("blocks", "scales"),
    "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"),
    "nvfp4-2": ("weight", "weight_scale", "weight_scale_2"),
}
# The first word of what `quantization` calls checkpoints that may hold a kind.
METHODS: Mapping[Kind, tuple[str, ...]] = {
    "fp8": ("fp8", "compressed-tensors", "modelopt"),
    "int4": ("compressed-tensors",),
    "gptq": ("gptq",),
    "awq": ("awq",),
    "mxfp4": ("compressed-tensors",),
    "mxfp4-blocks": ("mxfp4", "gpt_oss_mxfp4"),
    "nvfp4": ("compressed-tensors",),
    "nvfp4-2": ("modelopt", "modelopt_fp4"),
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the expert matrices of a layer are quantized.

    Attributes:
        kind: names the encoding.
        parts: what must arrive of every matrix.
        rows, columns: block of one scale, of N and of K; 0 stands for all.
        scale: dtype of the scales, as safetensors spells it.
    """

    kind: Kind = "plain"
    parts: tuple[str, ...] = ("weight",)
    rows: int = 0
    columns: int = 0
    scale: str = "F32"


PLAIN_SCHEME = Scheme()


def scheme_of_down(
    where: str, parts: Mapping[str, Part], hidden_size: int, settings: Mapping[str, Any]
) -> tuple[Scheme, int]:
    """How one down_proj [H, I] is quantized, and I.

    Args:
        where: names the matrix in messages.
        parts: what there is of it, scales of activations left out.
        hidden_size: H.
        settings: what config.json says of quantization.

    Raises:
        ValueError: the parts are of no known format, or do not fit together.
    """
    try:
        return _scheme_of_down(parts, hidden_size, settings)
    except (KeyError, ZeroDivisionError, IndexError):
        pass
    except ValueError as error:
        raise ValueError(f"{where}: {error}; fetch the checkpoint again") from None
    found = ", ".join(f"{name} {dtype} {[*shape]}" for name, (dtype, shape) in parts.items())
    raise ValueError(
        f"{where}: experts quantized in a way that is not known: {found}; use the checkpoint that "
        "it was made from"
    )


def _scheme_of_down(
    parts: Mapping[str, Part], hidden_size: int, settings: Mapping[str, Any]
) -> tuple[Scheme, int]:
    names = frozenset(parts)
    dtypes = {name: dtype for name, (dtype, _) in parts.items()}
    shapes = {name: shape for name, (_, shape) in parts.items()}
    if names == {"weight"} and dtypes["weight"] in (*FLOATS, "F64"):
        rows, columns = shapes["weight"][-2:]
        return PLAIN_SCHEME, columns if rows == hidden_size else rows
    if names >= {"blocks", "scales"} and dtypes["blocks"] == "U8":
        _, outputs, groups, pairs = shapes["blocks"]
        if (outputs, pairs) != (hidden_size, 16):
            raise ValueError(f"blocks are {[*shapes['blocks']]} for {hidden_size} outputs")
        return Scheme("mxfp4-blocks", PARTS["mxfp4-blocks"], 1, 32, "F8_E8M0"), groups * 32
    for name in ("weight", "weight_packed"):
        if name in names and shapes[name][0] != hidden_size:
            raise ValueError(
                f"{name} has {shapes[name][0]} rows, config.json says hidden_size {hidden_size}"
            )
    if dtypes.get("weight") == FP8:
        return _fp8(parts, settings)
    if names == {*PARTS["nvfp4-2"]} and dtypes["weight"] == "U8":
        size = shapes["weight"][1] * 2
        return _grouped("nvfp4-2", "F8_E4M3", shapes["weight_scale"], size), size
    if "weight_packed" in names:
        if dtypes["weight_packed"] == "I32" and names == {*PARTS["int4"]}:
            size = shapes["weight_packed"][1] * 8
            kind: Kind = "int4"
        elif dtypes["weight_packed"] == "U8" and names == {*PARTS["nvfp4"]}:
            size, kind = shapes["weight_packed"][1] * 2, "nvfp4"
        elif dtypes["weight_packed"] == "U8" and dtypes["weight_scale"] in ("U8", "F8_E8M0"):
            size, kind = shapes["weight_packed"][1] * 2, "mxfp4"
        else:
            raise KeyError
        if kind == "int4" and _bits(settings) not in (None, 4):
            raise KeyError
        return _grouped(kind, dtypes["weight_scale"], shapes["weight_scale"], size), size
    if "qweight" in names:
        packed = shapes["qweight"]
        if packed[1] == hidden_size and names >= {"qweight", "qzeros", "scales"}:
            kind, size = "gptq", packed[0] * 8
        elif packed[1] * 8 == hidden_size:
            kind, size = "awq", packed[0]
        else:
            raise KeyError
        if names - {"g_idx"} != {*PARTS["awq"]}:
            raise KeyError
        return _grouped(kind, dtypes["scales"], shapes["scales"][::-1], size), size
    raise KeyError


def _fp8(parts: Mapping[str, Part], settings: Mapping[str, Any]) -> tuple[Scheme, int]:
    scales = parts.keys() - {"weight"}
    if not scales:
        raise ValueError("weight is float8 and has no weight_scale")
    scale = scales.pop()
    if scales or scale not in ("weight_scale", "weight_scale_inv"):
        raise KeyError
    (rows, columns), (dtype, shape) = parts["weight"][1], parts[scale]
    if dtype not in FLOATS:
        raise KeyError
    parts_wanted = ("weight", scale)
    if len(shape) == 0 or shape == (1,):
        return Scheme("fp8", parts_wanted, 0, 0, dtype), columns
    if shape in ((rows, 1), (rows,)):
        return Scheme("fp8", parts_wanted, 1, 0, dtype), columns
    high, wide = settings.get("weight_block_size") or _group_blocks(settings) or (128, 128)
    wanted = (-(-rows // high), -(-columns // wide))
    if shape != wanted:
        raise ValueError(f"{scale} is {[*shape]}, wanted {[*wanted]} for blocks of {high}x{wide}")
    return Scheme("fp8", parts_wanted, high, wide, dtype), columns


def _grouped(kind: Kind, dtype: str, shape: tuple[int, ...], size: int) -> Scheme:
    """Scales [N, K / group]."""
    group, rest = divmod(size, shape[1])
    if rest:
        raise ValueError(f"scales are {[*shape]} for {size} inputs, which is not a whole group")
    return Scheme(kind, PARTS[kind], 1, 0 if shape[1] == 1 else group, dtype)


def _bits(settings: Mapping[str, Any]) -> int | None:
    """Of compressed-tensors' weights, where all groups agree."""
    found = {group["num_bits"] for group in _weight_groups(settings) if "num_bits" in group}
    return found.pop() if len(found) == 1 else None


def _group_blocks(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    for group in _weight_groups(settings):
        if group.get("strategy") == "block" and group.get("block_structure"):
            rows, columns = group["block_structure"]
            return rows, columns
    return None


def _weight_groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict):
        return []
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return [entry for entry in weights if isinstance(entry, dict)]


def check_told(directory: Path, config: Mapping[str, Any], scheme: Scheme) -> None:
    """Refuse experts that config.json knows nothing of, or which are not computed as it says.

    Raises:
        ValueError: one line.
    """
    if scheme.kind == "plain":
        return
    told = quantization(directory, config)
    if told is None:
        raise ValueError(
            f"{directory}: its experts are quantized ({scheme.kind}), config.json has no "
            "quantization_config; fetch the checkpoint again"
        )
    if told.split()[0] not in METHODS[scheme.kind]:
        raise ValueError(
            f"{directory}: its experts are quantized as {scheme.kind}, config.json says {told}; is "
            "config.json of this checkpoint?"
        )
    settings = config.get("quantization_config") or {}
    wanted = {"sym": (True, None), "bits": (4, None)} if scheme.kind == "gptq" else {}
    for key, values in wanted.items():
        if settings.get(key) not in values:
            raise ValueError(
                f"not served by this version: GPTQ with {key} {settings[key]!r} ({directory}); use "
                "the checkpoint that it was made from"
            )
