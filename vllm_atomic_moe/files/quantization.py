"""Quantized experts in checkpoints: the tensors of a matrix, and the blocks of its scales.

A matrix [N, K] (N outputs, K inputs) arrives as several tensors, its *parts*, named by a suffix of
the projection's name. The parts, their dtypes and shapes tell how it is quantized; config.json must
agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.files.config import quantization_name
from vllm_atomic_moe.files.row_formats import CODES, PLAIN, Block, Code, Factor, RowFormat

# A part's dtype as safetensors spells it, and its shape.
Part = tuple[str, tuple[int, ...]]

FP8, FLOATS = "F8_E4M3", ("F32", "BF16", "F16")
E8M0 = ("U8", "F8_E8M0")
SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.float8_e8m0fnu,  # older versions of safetensors lack that name
}
# Parts without information about weights: scales of activations, which stay in 16 bits here, and
# shapes that the tensors have already.
IGNORED = ("input_scale", "input_global_scale", "weight_shape", "k_scale", "v_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A way to store a quantized matrix.

    Attributes:
        parts: of a matrix: its codes, their scales, and others.
        dtype: of the codes, as safetensors spells it.
        code: what they are.
        per_element: numbers of outputs and of inputs in one element of the codes.
        transposed: whether codes and scales are [K, N].
        fused: whether a part holds all experts, and the codes of a group have an axis of their own.
        scales: dtypes that scales may have.
        group: inputs of a group, if the kind fixes them.
        zeros, factor, scattered: as of `RowFormat`.
        methods: first words of `quantization` for checkpoints that may hold this kind.
        algorithm: what is in ModelOpt's name for it.
        served: settings whose other values are not served.
    """

    parts: tuple[str, ...]
    dtype: str
    code: Code
    per_element: tuple[int, int] = (1, 1)
    transposed: bool = False
    fused: bool = False
    scales: tuple[str, ...] = FLOATS
    group: int = 0
    zeros: bool = False
    factor: Factor = "none"
    scattered: bool = False
    methods: tuple[str, ...]
    algorithm: str = ""
    served: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[int, str]:
        """Bits and type of the weights in compressed-tensors' words."""
        return CODES[self.code][:2]

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """N and K of a matrix with codes of this shape."""
        if self.fused:
            _, outputs, groups, elements = shape
            shape = (outputs, groups * elements)
        outputs, inputs = shape[::-1] if self.transposed else shape
        return outputs * self.per_element[0], inputs * self.per_element[1]


# The name of every kind -> what is to know of it, except for how `encoding.py` reads its parts.
KINDS: Mapping[str, Kind] = {
    "fp8": Kind(
        parts=("weight", "weight_scale"),
        dtype=FP8,
        code="e4m3",
        methods=("fp8", "compressed-tensors", "modelopt"),
        algorithm="FP8",
        served={"fmt": ("e4m3", None)},
    ),
    "int4": Kind(
        parts=("weight_packed", "weight_scale"),
        dtype="I32",
        code="int4",
        per_element=(1, 8),
        methods=("compressed-tensors",),
    ),
    "gptq": Kind(
        parts=("qweight", "scales", "qzeros", "g_idx"),
        dtype="I32",
        code="int4",
        per_element=(1, 8),
        transposed=True,
        scattered=True,
        methods=("gptq",),
        # Version 2 differs only in its zero points, which symmetric weights do not need.
        served={
            "sym": (True, None),
            "bits": (4, None),
            "checkpoint_format": ("gptq", "gptq_v2", None),
        },
    ),
    "awq": Kind(
        parts=("qweight", "scales", "qzeros"),
        dtype="I32",
        code="uint4",
        per_element=(8, 1),
        transposed=True,
        zeros=True,
        methods=("awq",),
        served={"bits": (4, None), "zero_point": (True, None), "version": ("gemm", "GEMM", None)},
    ),
    "mxfp4": Kind(
        parts=("weight_packed", "weight_scale"),
        dtype="U8",
        code="e2m1",
        per_element=(1, 2),
        scales=E8M0,
        group=32,
        methods=("compressed-tensors",),
    ),
    "mxfp4-blocks": Kind(
        parts=("blocks", "scales"),
        dtype="U8",
        code="e2m1",
        per_element=(1, 2),
        fused=True,
        scales=E8M0,
        group=32,
        methods=("mxfp4", "gpt_oss_mxfp4"),
    ),
    "nvfp4": Kind(
        parts=("weight_packed", "weight_scale", "weight_global_scale"),
        dtype="U8",
        code="e2m1",
        per_element=(1, 2),
        scales=(FP8,),
        group=16,
        factor="over",
        methods=("compressed-tensors",),
    ),
    "nvfp4-2": Kind(
        parts=("weight", "weight_scale", "weight_scale_2"),
        dtype="U8",
        code="e2m1",
        per_element=(1, 2),
        scales=(FP8,),
        group=16,
        factor="times",
        methods=("modelopt", "modelopt_fp4"),
        algorithm="NVFP4",
    ),
}
# Parts that hold a matrix itself -> their dimensions.
MATRICES = {"weight": 2, **{kind.parts[0]: 4 if kind.fused else 2 for kind in KINDS.values()}}
# ModelOpt's name -> what has a scale of its own.
MODELOPT_SCALES = {
    "FP8": "tensor",
    "FP8_PB_WO": "block",
    "FP8_PER_CHANNEL_PER_TOKEN": "channel",
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the expert matrices of a layer are quantized.

    Attributes:
        kind: plain, or one of KINDS.
        parts: the parts that every matrix must have.
        rows, columns: block of one scale, of N and of K; 0 means all.
        scale: dtype of the scales, as safetensors spells it.
        plain_down: whether an export has plain rows of down beside codes of gate and up.
    """

    kind: str = "plain"
    parts: tuple[str, ...] = ("weight",)
    rows: int = 0
    columns: int = 0
    scale: str = "F32"
    plain_down: bool = False

    def of(self, part: str) -> Scheme:
        """How the rows of one part of the packed layout are quantized."""
        return PLAIN_SCHEME if self.plain_down and part == "down_t" else self

    @property
    def plain(self) -> bool:
        """Whether the matrices are not quantized."""
        return self.kind == "plain"

    @property
    def facts(self) -> Kind:
        """Of its kind; not for plain matrices."""
        return KINDS[self.kind]

    @property
    def name(self) -> str:
        """For display: fp8 128x128, fp8 channel, gptq g128, nvfp4, "mxfp4, down plain"."""
        if self.plain_down:
            return f"{replace(self, plain_down=False).name}, down plain"
        kind = self.kind.split("-")[0]
        if self.plain or self.facts.group:
            return kind
        if not self.columns:
            return f"{kind} {'channel' if self.rows else 'tensor'}"
        return f"{kind} g{self.columns}" if self.rows == 1 else f"{kind} {self.rows}x{self.columns}"

    def row_format(self, hidden_size: int, intermediate_size: int) -> RowFormat:
        """The format of packed rows of such experts.

        Args:
            hidden_size: H.
            intermediate_size: I.
        """
        if self.plain:
            return PLAIN
        return RowFormat(
            self.facts.code,
            rows=Block(self.rows or intermediate_size, self.columns or hidden_size),
            columns=Block(self.columns or intermediate_size, self.rows or hidden_size),
            scale=SCALE_DTYPES[self.scale],
            zeros=self.facts.zeros,
            factor=self.facts.factor,
            scattered=self.facts.scattered,
            plain_down=self.plain_down,
        )

    def told(self) -> dict[str, Any]:
        """Its entry in an exported checkpoint's index; `stored_scheme` reads it."""
        if self.plain:
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
        if whole and scale in KINDS[kind].scales:
            return Scheme(kind, ("weight",), rows, columns, scale)
    except (KeyError, TypeError):
        pass
    raise ValueError(f"a row format that is not known, {told!r:.80}")


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
    settings = settings_of(where, settings)
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
    if "weight_g_idx" in parts:
        return "activation order"
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
    for name in names & MATRICES.keys():
        if len(shapes[name]) != MATRICES[name] or 0 in shapes[name]:
            raise ValueError(
                f"a layout that is not known: {name} {[*shapes[name]]} of {dtypes[name]}"
            )
    for name in ("weight", "weight_packed"):
        if name in names and shapes[name][0] != hidden_size:
            raise ValueError(
                f"{name} has {shapes[name][0]} rows, config.json says hidden_size {hidden_size}"
            )
    if dtypes.get("weight") == FP8:
        return _fp8(parts, settings)
    kind = kind_of(parts)
    if kind == "int4" and _bits(settings) not in (None, 4):
        raise KeyError
    return _grouped(kind, parts, hidden_size, settings)


def kind_of(parts: Mapping[str, Part]) -> str:
    """The kind with these parts; of FP8, which spells scales in two ways, the usual one.

    Raises:
        KeyError: there is none.
    """
    for name, kind in KINDS.items():
        if parts.keys() == {*kind.parts} and parts[kind.parts[0]][0] == kind.dtype:
            return name
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
    kind: str, parts: Mapping[str, Part], outputs: int, settings: Mapping[str, Any]
) -> tuple[Scheme, int]:
    """The scheme with scales [N, K / group], and K."""
    facts = KINDS[kind]
    (_, codes), (dtype, shape) = (parts[name] for name in facts.parts[:2])
    found, size = facts.sizes(codes)
    if facts.fused and (found, shape[:1]) != (outputs, codes[:1]):
        raise ValueError(
            f"{facts.parts[0]} are {[*codes]}, scales {[*shape]}, for {outputs} outputs"
        )
    if found != outputs or dtype not in facts.scales:
        raise KeyError
    table = shape[1:] if facts.fused else shape[::-1] if facts.transposed else shape
    if len(table) != 2 or table[0] != outputs or size % table[1]:
        raise ValueError(
            f"scales are {[*shape]} for {outputs} outputs and {size} inputs, which are not whole "
            "groups"
        )
    group = size // table[1]
    if group != (facts.group or group):
        raise ValueError(f"scales are of groups of {group} inputs, {kind} has {facts.group}")
    # A single scale for all inputs of down may be one of many for gate, which has more inputs.
    told = facts.group or group in _group_sizes(settings)
    return Scheme(kind, facts.parts, 1, group if table[1] > 1 or told else 0, dtype), size


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


def settings_of(matrix: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization settings without the groups that are for other matrices.

    Args:
        matrix: its name; "" leaves the settings as they are.
        settings: of config.json. A group's `targets` are names, patterns after `re:`, or classes;
            the first group with a name or a pattern for the matrix counts, else those of classes.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not matrix:
        return settings
    of_classes = {}
    for key, group in groups.items():
        targets = group.get("targets") if isinstance(group, dict) else None
        targets = [it for it in targets if isinstance(it, str)] if isinstance(targets, list) else []
        if matrix in targets or any(_matches(matrix, target) for target in targets):
            return {**settings, "config_groups": {key: group}}
        if not targets or not all(map(_is_of_others, targets)):
            of_classes[key] = group
    return {**settings, "config_groups": of_classes or groups}


def _is_of_others(target: str) -> bool:
    """Whether a target is a name or a pattern, which no class is, or the class of attention."""
    return "." in target or ":" in target or target.endswith("Attention")


def _matches(matrix: str, target: str) -> bool:
    """Whether a target is a pattern for the matrix."""
    with suppress(re.error):
        return target.startswith("re:") and re.match(target[3:], matrix) is not None
    return False


def check_told(directory: Path, settings: Mapping[str, Any], scheme: Scheme, matrix: str) -> None:
    """Refuse quantized experts that config.json does not mention, or describes differently.

    Args:
        directory: for messages.
        settings: the quantization settings of config.json.
        matrix: name of one of the matrices with this scheme.

    Raises:
        ValueError: one line.
    """
    if scheme.plain:
        return
    told = quantization_name(settings)
    if told is None:
        raise ValueError(
            f"{directory}: its experts are quantized ({scheme.kind}), config.json has no "
            "quantization_config; fetch the checkpoint again"
        )
    method = told.split()[0]
    if not any(method in kind.methods for kind in KINDS.values()):
        raise ValueError(
            f"not served by this version: the quantization method {told} ({directory}); use the "
            "checkpoint that it was made from"
        )
    settings = settings_of(matrix, settings)
    if other := told if method not in scheme.facts.methods else _other_weights(settings, scheme):
        raise ValueError(
            f"{directory}: its experts are quantized as {scheme.name}, config.json says {other}; "
            "is this the right config.json?"
        )
    for key, values in scheme.facts.served.items():
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
    if not algorithm or "MIXED" in algorithm or scheme.facts.algorithm in algorithm:
        return ""
    return algorithm[:40]


def _same_weights(settings: Mapping[str, Any], scheme: Scheme) -> list[Mapping[str, Any]]:
    wanted, groups = scheme.facts.weights, _weight_groups(settings)
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
