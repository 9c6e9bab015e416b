"""Quantized experts in checkpoints: the tensors of a matrix, and the blocks of its scales.

A matrix [N, K] (N outputs, K inputs) arrives as several tensors, its *parts*, named by a suffix of
the projection's name. The parts, their dtypes and shapes tell how it is quantized; config.json must
agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vllm_atomic_moe.files.config import quantization, quantization_settings

Kind = Literal["plain", "fp8", "int4", "gptq", "awq", "mxfp4", "mxfp4-blocks", "nvfp4", "nvfp4-2"]

# A part's dtype as safetensors spells it, and its shape.
Part = tuple[str, tuple[int, ...]]

FP8, FLOATS = "F8_E4M3", ("F32", "BF16", "F16")
E8M0 = ("U8", "F8_E8M0")
# Parts without information about weights: scales of activations, which stay in 16 bits here, and
# shapes that the tensors have already.
IGNORED = ("input_scale", "input_global_scale", "weight_shape", "k_scale", "v_scale")
# Parts that hold a matrix itself.
MATRICES = ("weight", "weight_packed", "qweight", "blocks")
PARTS: Mapping[Kind, tuple[str, ...]] = {
    "plain": ("weight",),
    "fp8": ("weight", "weight_scale"),
    "int4": ("weight_packed", "weight_scale"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "mxfp4": ("weight_packed", "weight_scale"),
    "mxfp4-blocks": ("blocks", "scales"),
    "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"),
    "nvfp4-2": ("weight", "weight_scale", "weight_scale_2"),
}
# Dtypes that scales may have.
SCALES: Mapping[Kind, tuple[str, ...]] = {
    "fp8": FLOATS,
    "int4": FLOATS,
    "gptq": FLOATS,
    "awq": FLOATS,
    "mxfp4": E8M0,
    "mxfp4-blocks": E8M0,
    "nvfp4": (FP8,),
    "nvfp4-2": (FP8,),
}
# Inputs of a group, if the kind fixes them.
GROUPS: Mapping[Kind, int] = {"mxfp4": 32, "mxfp4-blocks": 32, "nvfp4": 16, "nvfp4-2": 16}
# First words of `quantization` for checkpoints that may hold a kind.
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
# Bits and type of the weights in compressed-tensors' words, and what is in ModelOpt's name.
WEIGHTS: Mapping[Kind, tuple[int, str]] = {
    "fp8": (8, "float"),
    "int4": (4, "int"),
    "mxfp4": (4, "float"),
    "nvfp4": (4, "float"),
}
ALGORITHMS: Mapping[Kind, str] = {"fp8": "FP8", "nvfp4-2": "NVFP4"}
# ModelOpt's name -> what has a scale of its own.
MODELOPT_SCALES = {
    "FP8": "tensor",
    "FP8_PB_WO": "block",
    "FP8_PER_CHANNEL_PER_TOKEN": "channel",
}
# Settings whose other values are not served.
SERVED: Mapping[Kind, Mapping[str, tuple[Any, ...]]] = {
    "gptq": {"sym": (True, None), "bits": (4, None)},
    "awq": {"bits": (4, None), "zero_point": (True, None), "version": ("gemm", "GEMM", None)},
    "fp8": {"fmt": ("e4m3", None)},
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the expert matrices of a layer are quantized.

    Attributes:
        kind: names the encoding.
        parts: the parts that every matrix must have.
        rows, columns: block of one scale, of N and of K; 0 means all.
        scale: dtype of the scales, as safetensors spells it.
        plain_down: whether an export has plain rows of down beside codes of gate and up.
    """

    kind: Kind = "plain"
    parts: tuple[str, ...] = ("weight",)
    rows: int = 0
    columns: int = 0
    scale: str = "F32"
    plain_down: bool = False

    def of(self, part: str) -> Scheme:
        """How the rows of one part of the packed layout are quantized."""
        return PLAIN_SCHEME if self.plain_down and part == "down_t" else self

    @property
    def bits(self) -> int:
        """Of one code; 0 of plain weights."""
        return {"plain": 0, "fp8": 8}.get(self.kind, 4)

    @property
    def name(self) -> str:
        """For display: fp8 128x128, fp8 channel, gptq g128, nvfp4, "mxfp4, down plain"."""
        if self.plain_down:
            return f"{replace(self, plain_down=False).name}, down plain"
        kind = self.kind.split("-")[0]
        if self.kind == "plain" or self.kind in GROUPS:
            return kind
        if not self.columns:
            return f"{kind} {'channel' if self.rows else 'tensor'}"
        return f"{kind} g{self.columns}" if self.rows == 1 else f"{kind} {self.rows}x{self.columns}"

    def told(self) -> dict[str, Any]:
        """Its entry in an exported checkpoint's index; `stored_scheme` reads it."""
        if self.kind == "plain":
            return {"kind": self.kind}
        names = ("kind", "rows", "columns", "scale")
        return {name: getattr(self, name) for name in names}


PLAIN_SCHEME = Scheme()


def stored_scheme(told: Any) -> Scheme:
    """Parse `Scheme.told`, without the parts, which packed rows do not need.

    Raises:
        ValueError: it is not a valid scheme.
    """
    if told == PLAIN_SCHEME.told():
        return PLAIN_SCHEME
    try:
        kind, rows, columns, scale = (told[key] for key in ("kind", "rows", "columns", "scale"))
        whole = all(type(size) is int and size >= 0 for size in (rows, columns))
        if kind in SCALES and whole and scale in SCALES[kind]:
            return Scheme(kind, ("weight",), rows, columns, scale)
    except (KeyError, TypeError):
        pass
    raise ValueError(f"a row format that is not known, {told!r:.80}")


def stored_tables(kind: Kind, part: str) -> tuple[str, ...]:
    """The PACKED_TABLES that an exported checkpoint holds for quantized rows.

    Args:
        part: one of PACKED_ROWS.
    """
    if kind == "plain":
        return ()
    if kind == "gptq" and part == "down_t":  # where the order of activations may tell the groups
        return ("scales", "groups")
    more = {"awq": ("zeros",), "nvfp4": ("factors",), "nvfp4-2": ("factors",)}
    return ("scales", *more.get(kind, ()))


def scheme_of_down(
    where: str, parts: Mapping[str, Part], hidden_size: int, settings: Mapping[str, Any]
) -> tuple[Scheme, int]:
    """How one down_proj [H, I], or any matrix of that shape, is quantized, and I.

    Args:
        where: names the matrix in messages.
        parts: its parts, without scales of activations.
        hidden_size: H.
        settings: the quantization settings of config.json.

    Raises:
        ValueError: the parts are of an unknown format, or do not fit together.
    """
    try:
        return _scheme_of_down(parts, hidden_size, settings)
    except (KeyError, ZeroDivisionError, IndexError):
        pass
    except ValueError as error:
        raise ValueError(f"{where}: {error}; fetch the checkpoint again") from None
    if reason := _unserved(parts, settings):
        raise ValueError(
            f"not served by this version: {reason} ({where}); use the checkpoint that it was made "
            "from"
        )
    found = ", ".join(f"{name} {dtype} {[*shape]}" for name, (dtype, shape) in parts.items())
    raise ValueError(
        f"{where}: quantized in a way that is not known: {found:.120}; use the checkpoint that it "
        "was made from"
    )


def _unserved(parts: Collection[str], settings: Mapping[str, Any]) -> str:
    """What is known and not served; "" if it is unknown."""
    if "weight_zero_point" in parts:
        return "asymmetric weights"
    bits = settings.get("bits", settings.get("w_bit")) if "qweight" in parts else _bits(settings)
    return f"integers of {bits!r:.20} bits" if bits not in (None, 4) else ""


def _scheme_of_down(
    parts: Mapping[str, Part], hidden_size: int, settings: Mapping[str, Any]
) -> tuple[Scheme, int]:
    names = frozenset(parts)
    dtypes = {name: dtype for name, (dtype, _) in parts.items()}
    shapes = {name: shape for name, (_, shape) in parts.items()}
    if names == {"weight"} and dtypes["weight"] in (*FLOATS, "F64"):
        rows, columns = shapes["weight"][-2:]
        return PLAIN_SCHEME, columns if rows == hidden_size else rows
    for name in names & {*MATRICES}:
        if len(shapes[name]) != (4 if name == "blocks" else 2) or 0 in shapes[name]:
            raise ValueError(
                f"a layout that is not known: {name} {[*shapes[name]]} of {dtypes[name]}"
            )
    if names == {*PARTS["mxfp4-blocks"]} and dtypes["blocks"] == "U8":
        experts, outputs, groups, pairs = shapes["blocks"]
        if (outputs, pairs) != (hidden_size, 16):
            raise ValueError(f"blocks are {[*shapes['blocks']]} for {hidden_size} outputs")
        if shapes["scales"] != (experts, outputs, groups):
            raise ValueError(f"scales are {[*shapes['scales']]}, blocks {[*shapes['blocks']]}")
        scheme = _scheme("mxfp4-blocks", dtypes["scales"], GROUPS["mxfp4-blocks"])
        return scheme, groups * 32
    for name in ("weight", "weight_packed"):
        if name in names and shapes[name][0] != hidden_size:
            raise ValueError(
                f"{name} has {shapes[name][0]} rows, config.json says hidden_size {hidden_size}"
            )
    if dtypes.get("weight") == FP8:
        return _fp8(parts, settings)
    if names == {*PARTS["nvfp4-2"]} and dtypes["weight"] == "U8":
        size = shapes["weight"][1] * 2
        return _grouped("nvfp4-2", parts["weight_scale"], hidden_size, size, settings), size
    if "weight_packed" in names:
        if dtypes["weight_packed"] == "I32" and names == {*PARTS["int4"]}:
            size = shapes["weight_packed"][1] * 8
            kind: Kind = "int4"
        elif dtypes["weight_packed"] == "U8" and names == {*PARTS["nvfp4"]}:
            size, kind = shapes["weight_packed"][1] * 2, "nvfp4"
        elif dtypes["weight_packed"] == "U8" and names == {*PARTS["mxfp4"]}:
            size, kind = shapes["weight_packed"][1] * 2, "mxfp4"
        else:
            raise KeyError
        if kind == "int4" and _bits(settings) not in (None, 4):
            raise KeyError
        return _grouped(kind, parts["weight_scale"], hidden_size, size, settings), size
    if "qweight" in names and dtypes["qweight"] == "I32":
        packed = shapes["qweight"]
        if packed[1] == hidden_size and names == {*PARTS["gptq"]}:
            kind, size = "gptq", packed[0] * 8
        elif packed[1] * 8 == hidden_size and names == {*PARTS["awq"]}:
            kind, size = "awq", packed[0]
        else:
            raise KeyError
        dtype, shape = parts["scales"]
        return _grouped(kind, (dtype, shape[::-1]), hidden_size, size, settings), size
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
    high, wide = _block(settings)
    wanted = (-(-rows // high), -(-columns // wide))
    if shape != wanted:
        raise ValueError(f"{scale} is {[*shape]}, wanted {[*wanted]} for blocks of {high}x{wide}")
    return Scheme("fp8", parts_wanted, high, wide, dtype), columns


def _grouped(
    kind: Kind, scales: Part, outputs: int, size: int, settings: Mapping[str, Any]
) -> Scheme:
    """Scales [N, K / group]."""
    dtype, shape = scales
    if len(shape) != 2 or shape[0] != outputs or size % shape[1]:
        raise ValueError(
            f"scales are {[*shape]} for {outputs} outputs and {size} inputs, which are not whole "
            "groups"
        )
    group = size // shape[1]
    if group != GROUPS.get(kind, group):
        raise ValueError(f"scales are of groups of {group} inputs, {kind} has {GROUPS[kind]}")
    # A single scale for all inputs of down may be one of many for gate, which has more inputs.
    told = kind in GROUPS or group in _group_sizes(settings)
    return _scheme(kind, dtype, group if shape[1] > 1 or told else 0)


def _scheme(kind: Kind, dtype: str, group: int) -> Scheme:
    if dtype not in SCALES[kind]:
        raise KeyError
    return Scheme(kind, PARTS[kind], 1, group, dtype)


def _bits(settings: Mapping[str, Any]) -> int | None:
    """Of compressed-tensors' integers, if all groups agree."""
    groups = [group for group in _weight_groups(settings) if group.get("type", "int") == "int"]
    found = [group["num_bits"] for group in groups if "num_bits" in group]
    return found[0] if found and all(bits == found[0] for bits in found) else None


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    block = settings.get("weight_block_size")
    for group in () if block else _weight_groups(settings):
        if group.get("strategy") == "block":
            block = block or group.get("block_structure")
    if not block:
        return 128, 128
    if isinstance(block, list) and len(block) == 2:
        rows, columns = block
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(f"config.json says blocks of {block!r:.40}, wanted two numbers")


def _weight_groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict):
        return []
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return [entry for entry in weights if isinstance(entry, dict)]


def check_told(directory: Path, config: Mapping[str, Any], scheme: Scheme) -> None:
    """Refuse quantized experts that config.json does not mention, or describes differently.

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
    method = told.split()[0]
    if not any(method in methods for methods in METHODS.values()):
        raise ValueError(
            f"not served by this version: the quantization method {told} ({directory}); use the "
            "checkpoint that it was made from"
        )
    settings = quantization_settings(directory, config)
    if other := told if method not in METHODS[scheme.kind] else _other_weights(settings, scheme):
        raise ValueError(
            f"{directory}: its experts are quantized as {scheme.name}, config.json says {other}; "
            "is this the right config.json?"
        )
    for key, values in SERVED.get(scheme.kind, {}).items():
        if settings.get(key) not in values:
            raise ValueError(
                f"not served by this version: {scheme.kind.upper()} with {key} "
                f"{settings[key]!r:.40} ({directory}); use the checkpoint that it was made from"
            )
    same = _same_weights(settings, scheme)
    if same and all(group.get("symmetric") is False for group in same):
        raise ValueError(
            f"not served by this version: asymmetric weights ({directory}/config.json); use the "
            "checkpoint that it was made from"
        )
    sizes = list(_group_sizes(settings))
    if scheme.kind == "fp8":
        _check_strategy(directory, settings, scheme)
    elif sizes and scheme.columns not in sizes:
        raise ValueError(
            f"{directory}: config.json says quantization groups of {sizes[0] or 'all'} inputs, the "
            f"files hold scales of {scheme.columns or 'all'}; is this the right config.json?"
        )


def _other_weights(settings: Mapping[str, Any], scheme: Scheme) -> str:
    """The weights that the settings describe; "" if they have the scheme's bits and type."""
    groups = [group for group in _weight_groups(settings) if {"num_bits", "type"} <= group.keys()]
    if groups and not _same_weights(settings, scheme):
        return f"{groups[0]['num_bits']!r:.20} bits, type {groups[0]['type']!r:.20}"
    algorithm = str(settings.get("quant_algo") or "").upper()
    if not algorithm or "MIXED" in algorithm or ALGORITHMS.get(scheme.kind, "") in algorithm:
        return ""
    return algorithm[:40]


def _same_weights(settings: Mapping[str, Any], scheme: Scheme) -> list[Mapping[str, Any]]:
    wanted = WEIGHTS.get(scheme.kind)
    groups = _weight_groups(settings)
    return [group for group in groups if (group.get("num_bits"), group.get("type")) == wanted]


def _check_strategy(directory: Path, settings: Mapping[str, Any], scheme: Scheme) -> None:
    """Refuse FP8 scales of other blocks, channels or tensors than the settings say."""
    found = "tensor" if not scheme.rows else "block" if scheme.columns else "channel"
    groups = [it for it in _weight_groups(settings) if it.get("num_bits") == 8]
    told = [it["strategy"] for it in groups if isinstance(it.get("strategy"), str)]
    if settings.get("weight_block_size"):
        told = ["block"]
    elif (of := MODELOPT_SCALES.get(str(settings.get("quant_algo")))) is not None:
        told = [of]
    if told and found not in told:
        raise ValueError(
            f"{directory}: config.json says FP8 with a scale per {told[0]}, the files hold one per "
            f"{found}; is this the right config.json?"
        )


def _group_sizes(settings: Mapping[str, Any]) -> Iterator[int]:
    """Inputs of a group, 0 for all; with several settings, those of any."""
    for entry in (settings, *_weight_groups(settings)):
        size = entry.get("group_size", entry.get("q_group_size"))
        if type(size) is int:
            yield max(size, 0)
        elif entry.get("strategy") == "channel":
            yield 0
