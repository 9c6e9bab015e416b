"""The table of names and layouts of routed experts in checkpoints.

Names start with the MoE block of a decoder layer, which also holds its router:
`model.layers.3.mlp`, or the layer itself. Three layouts follow:

    per expert   experts.{expert}.{spelling}.weight    gate and up [I, H], down [H, I]
    fused        one of FUSED, also with .weight appended    gate_up [E, 2I, H], or gate and up
                 [E, I, H]; down [E, H, I]; or all of them transposed. gpt-oss has transposed ones
                 with alternating rows of gate and up, and biases [E, 2I] and [E, H]. DBRX has
                 gate, up and transposed down, all [E·I, H]
    packed       experts.packed.{part}, which `atomic-moe export` writes: gate, up and down_t
                 [P, H], the stored atoms in checkpoint order; offsets int64 [E+1], the first row of
                 every expert; keep bool [E, I], the stored atoms. If experts are quantized, the
                 rows are codes, and {part}_{table} decodes them; a refitted down_t is plain

Legend: E experts, H hidden size, I full intermediate size, P stored atoms of a layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Maps tensors to shards.
INDEX = "model.safetensors.index.json"
# Prefix of Qwen3-Omni's model of speech, an MoE of its own, which vLLM leaves out.
SPEECH = "talker."
# Part of a layout -> its spelling; one entry per family of models.
PER_EXPERT = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
)
# If the end of the MoE block's name is part of the spelling, it comes before a bar.
FUSED = (
    {"gate_up": "experts.gate_up_proj", "down": "experts.down_proj"},
    {"gate_up": "experts.w13", "down": "experts.w2"},
    {"gate_up": "experts.fc1", "down": "experts.fc2"},  # Aria
    {"gate": "experts.mlp.w1", "up": "experts.mlp.v1", "down": "experts.mlp.w2"},  # DBRX
    # Granite; its shared expert has the same names
    {"gate_up": "block_sparse_moe|input_linear", "down": "block_sparse_moe|output_linear"},
    {"gate": "moe|gate_proj", "up": "moe|up_proj", "down": "moe|down_proj"},  # Step
)
# Names of the parts of a quantized matrix: of one expert's, and of gpt-oss's fused ones.
QUANTITIES = (
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed", "weight_shape"),
    *("weight_global_scale", "weight_zero_point", "weight_g_idx", "qscale_weight", "qscale_act"),
    *("input_scale", "input_global_scale", "qweight", "qzeros", "scales", "g_idx", "scale"),
)
# Mistral's and DeepSeek-V4's spelling -> the common one.
OTHER_QUANTITIES = {
    "qscale_weight": "weight_scale",
    "qscale_act": "input_scale",
    "scale": "weight_scale_inv",
}
FUSED_CODES = ("blocks", "scales")
FUSED_QUANTITIES = (*FUSED_CODES, "bias")
PACKED_ROWS = ("gate", "up", "down_t")
PACKED = (*PACKED_ROWS, "offsets", "keep")
# Tables beside packed rows: scales [G, C]; scale row of every row, within its expert; zero points
# [G, C]; a factor of every expert; biases, for down_t [E, H].
PACKED_TABLES = ("scales", "groups", "zeros", "factors", "bias")


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """The parts of a tensor's name.

    Attributes:
        block: name of the MoE block.
        layer: decoder layer index.
        part: gate, up, down, gate_up, or one of PACKED.
        packed: whether the layout is the packed one.
        expert: the matrix's expert; None if the tensor holds all experts of the layer.
        quantity: weight, or one of QUANTITIES, FUSED_QUANTITIES or PACKED_TABLES.
    """

    block: str
    layer: int
    part: str
    packed: bool = False
    expert: int | None = None
    quantity: str = "weight"


def atom_bytes(hidden_size: int, itemsize: int) -> int:
    """Bytes of one atom: a gate row, an up row and a down column of `itemsize` bytes per weight."""
    return len(PACKED_ROWS) * hidden_size * itemsize


def packed_name(block: str, part: str, quantity: str = "weight") -> str:
    """Name of a packed tensor of a MoE block.

    Args:
        part: one of PACKED.
        quantity: weight for the part itself, or one of PACKED_TABLES.
    """
    table = "" if quantity == "weight" else f"_{quantity}"
    return f"{block}.experts.packed.{part}{table}"


def quantized_tensor(name: str) -> ExpertTensor | None:
    """As `expert_tensor`, including the parts of quantized matrices."""
    if (plain := expert_tensor(name)) or (match := _QUANTITY.fullmatch(name)) is None:
        return plain
    block, layer = match["block"], int(match["layer"])
    if match["fused"]:
        return ExpertTensor(block, layer, _FUSED_PARTS[match["fused"]], quantity=match["whole"])
    part, expert = _PARTS[match["own"]], int(match["expert"])
    quantity = OTHER_QUANTITIES.get(match["one"], match["one"])
    return ExpertTensor(block, layer, part, expert=expert, quantity=quantity)


def expert_tensor(name: str) -> ExpertTensor | None:
    """The expert tensor called `name`; None if the table does not have the name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    block, layer = match["block"], int(match["layer"])
    if match["packed"]:
        quantity = match["table"] or "weight"
        return ExpertTensor(block, layer, match["packed"], packed=True, quantity=quantity)
    if match["fused"]:
        return ExpertTensor(block, layer, _FUSED_PARTS[match["fused"]])
    if match["within"]:
        spelling = f"{block.rpartition('.')[2]}|{match['within']}"
        return ExpertTensor(block, layer, _FUSED_PARTS[spelling])
    return ExpertTensor(block, layer, _PARTS[match["own"]], expert=int(match["expert"]))


def decoder_layer(name: str) -> int | None:
    """The decoder layer of a tensor; None if its name has none, or several."""
    found = _LAYER.findall(name)
    return int(found[0]) if len(found) == 1 and not name.startswith(SPEECH) else None


_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.")
_PARTS = {spelling: part for names in PER_EXPERT for part, spelling in names.items()}
_FUSED_PARTS = {spelling: part for names in FUSED for part, spelling in names.items()}
_OWN = "|".join(_PARTS)
_OF_EXPERTS = "|".join(spelling for spelling in _FUSED_PARTS if "|" not in spelling)
_WITHIN = "|".join(
    rf"(?<=\.{block}\.){name}"
    for block, _, name in (it.partition("|") for it in _FUSED_PARTS)
    if name
)
_BLOCK = (
    rf"(?!{re.escape(SPEECH)})"
    r"(?P<block>(?:.*\.)?(?:layers|blocks)\.(?P<layer>\d+)(?:\..*)?)\."
)
_MATRIX = rf"experts\.(?P<expert>\d+)\.(?P<own>{_OWN})"
_NAME = re.compile(
    rf"{_BLOCK}(?:{_MATRIX}\.weight"
    rf"|(?P<fused>{_OF_EXPERTS})(?:\.weight)?"
    rf"|(?P<within>{_WITHIN})\.weight"
    rf"|experts\.packed\.(?P<packed>{'|'.join(PACKED)})"
    rf"(?:(?<!offsets)(?<!keep)_(?P<table>{'|'.join(PACKED_TABLES)}))?)"
)
_QUANTITY = re.compile(
    rf"{_BLOCK}(?:{_MATRIX}\.(?P<one>{'|'.join(QUANTITIES)})"
    rf"|(?P<fused>{_OF_EXPERTS})_(?P<whole>{'|'.join(FUSED_QUANTITIES)}))"
)
