"""Matrices quantized as in published checkpoints, and their exact values.

Written from the formats' descriptions, independent of the package's own decoding.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_atomic_moe.experts.formats import Encoded
from vllm_atomic_moe.experts.packing import PackedExperts, projections_of
from vllm_atomic_moe.files.quantization import Scheme

FP8, FP8_MOST = torch.float8_e4m3fn, 448.0
HALVES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of e2m1, without sign
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)

# Parts of a matrix [N, K] as the checkpoint has them, and the matrix that they encode, float32.
Quantized = tuple[dict[str, torch.Tensor], torch.Tensor]


def fp8_block(matrix: torch.Tensor, block: tuple[int, int] = (128, 128)) -> Quantized:
    (N, K), (rows, columns) = matrix.shape, block
    n, k = -(-N // rows), -(-K // columns)
    padded = torch.zeros(n * rows, k * columns)
    padded[:N, :K] = matrix.float()
    scale = padded.view(n, rows, k, columns).abs().amax((1, 3)).clamp(min=1e-6) / FP8_MOST

    def spread(table: torch.Tensor) -> torch.Tensor:
        return table.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]

    codes = (matrix.float() / spread(scale)).to(FP8)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread(scale)


def fp8_channel(matrix: torch.Tensor) -> Quantized:
    scale = matrix.float().abs().amax(1, keepdim=True).clamp(min=1e-6) / FP8_MOST
    codes = (matrix.float() / scale).to(FP8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def fp8_tensor(matrix: torch.Tensor) -> Quantized:
    scale = (matrix.float().abs().amax() / FP8_MOST).reshape(1)
    codes = (matrix.float() / scale).to(FP8)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
    return parts, codes.float() * scale


def int4(
    matrix: torch.Tensor, group: int = 32, scale_dtype: torch.dtype = torch.bfloat16
) -> Quantized:
    codes, scale = _symmetric(matrix, group, scale_dtype)
    parts = {
        "weight_packed": _into_int32(codes + 8, dim=1),
        "weight_scale": scale,
        "weight_shape": torch.tensor(matrix.shape),
    }
    return parts, codes * _spread(scale, group)


def gptq(matrix: torch.Tensor, group: int = 32, order: torch.Tensor | None = None) -> Quantized:
    """`order` gives the group of every input, for activation order."""
    K = matrix.shape[1]
    g_idx = torch.arange(K) // group if order is None else order
    places = g_idx.argsort(stable=True)
    codes, scale = _symmetric(matrix[:, places], group, torch.float16)
    back = places.argsort()
    codes = codes[:, back]
    parts = {
        "qweight": _into_int32((codes + 8).t(), dim=0),
        "qzeros": torch.full((K // group, matrix.shape[0] // 8), 0x77777777, dtype=torch.int32),
        "scales": scale.t().contiguous(),
        "g_idx": g_idx.int(),
    }
    return parts, codes * scale.float()[:, g_idx]


def awq(matrix: torch.Tensor, group: int = 32) -> Quantized:
    N, K = matrix.shape
    grouped = matrix.float().view(N, K // group, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-5).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = ((grouped / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15).view(N, K)
    parts = {
        "qweight": _into_int32(codes.t(), dim=1, places=AWQ_PLACES),
        "qzeros": _into_int32(zero.t(), dim=1, places=AWQ_PLACES),
        "scales": scale.t().contiguous(),
    }
    return parts, (codes - _spread(zero, group)) * _spread(scale, group)


def mxfp4(matrix: torch.Tensor) -> Quantized:
    codes, exponents, dense = _mxfp4(matrix)
    return {"weight_packed": _into_bytes(codes), "weight_scale": exponents}, dense


def mxfp4_blocks(matrix: torch.Tensor) -> Quantized:
    """The blocks of one expert, as in gpt-oss."""
    codes, exponents, dense = _mxfp4(matrix)
    blocks = _into_bytes(codes).view(matrix.shape[0], -1, 16)
    return {"blocks": blocks, "scales": exponents}, dense


def nvfp4(matrix: torch.Tensor) -> Quantized:
    codes, scale, factor = _nvfp4(matrix)
    dense = _e2m1(codes) * _spread(scale.float() / factor, 16)
    parts = {
        "weight_packed": _into_bytes(codes),
        "weight_scale": scale,
        "weight_global_scale": factor,
        "input_global_scale": torch.ones(1),
    }
    return parts, dense


def nvfp4_modelopt(matrix: torch.Tensor) -> Quantized:
    codes, scale, factor = _nvfp4(matrix)
    second = (1 / factor).reshape(())
    dense = _e2m1(codes) * _spread(scale.float() * second, 16)
    parts = {"weight": _into_bytes(codes), "weight_scale": scale, "weight_scale_2": second}
    return parts, dense


def _symmetric(
    matrix: torch.Tensor, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = matrix.shape
    grouped = matrix.float().view(N, K // group, group)
    scale = (grouped.abs().amax(2) / 7.5).clamp(min=1e-5).to(dtype)
    return (grouped / scale.float()[..., None]).round().clamp(-8, 7).view(N, K), scale


def _mxfp4(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, K = matrix.shape
    grouped = matrix.float().view(N, K // 32, 32)
    exponent = grouped.abs().amax(2).clamp(min=2**-100).log2().floor() - 2
    codes = _nearest_e2m1(grouped / exponent.exp2()[..., None]).view(N, K)
    return codes, (exponent + 127).to(torch.uint8), _e2m1(codes) * _spread(exponent.exp2(), 32)


def _nvfp4(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, K = matrix.shape
    factor = (FP8_MOST * 6 / matrix.float().abs().amax()).reshape(1)
    grouped = matrix.float().view(N, K // 16, 16) * factor
    scale = (grouped.abs().amax(2) / 6).clamp(2**-9, FP8_MOST).to(FP8)
    return _nearest_e2m1(grouped / scale.float()[..., None]).view(N, K), scale, factor


def _nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    size = torch.bucketize(values.abs().contiguous(), (HALVES[1:] + HALVES[:-1]) / 2)
    return (size + 8 * (values < 0)).to(torch.uint8)


def _e2m1(codes: torch.Tensor) -> torch.Tensor:
    return HALVES[(codes & 7).long()] * (1 - 2 * (codes >> 3).float())


def _spread(table: torch.Tensor, group: int) -> torch.Tensor:
    return table.float().repeat_interleave(group, 1)


def _into_bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _into_int32(
    codes: torch.Tensor, dim: int, places: tuple[int, ...] = tuple(range(8))
) -> torch.Tensor:
    """Pack eight codes along `dim` into one number; place i from below holds code places[i]."""
    moved = codes.to(torch.int64).movedim(dim, -1)
    eights = moved.reshape(*moved.shape[:-1], -1, 8)[..., list(places)]
    packed = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int().movedim(-1, dim).contiguous()


# Name -> (kind of `quantization.Scheme`, how a matrix is quantized).
FORMATS: dict[str, Callable[[torch.Tensor], Quantized]] = {
    "fp8-block": fp8_block,
    "fp8-channel": fp8_channel,
    "fp8-tensor": fp8_tensor,
    "int4": int4,
    "gptq": gptq,
    "awq": awq,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "nvfp4-modelopt": nvfp4_modelopt,
    "fp8-modelopt": fp8_tensor,
}

# How they are described, with the blocks that published checkpoints have.
SCHEMES = {
    "fp8-block": Scheme("fp8", rows=128, columns=128),
    "fp8-channel": Scheme("fp8", rows=1),
    "fp8-tensor": Scheme("fp8"),
    "int4": Scheme("int4", rows=1, columns=32, scale="BF16"),
    "gptq": Scheme("gptq", rows=1, columns=128, scale="F16"),
    "awq": Scheme("awq", rows=1, columns=128, scale="F16"),
    "mxfp4": Scheme("mxfp4", rows=1, columns=32, scale="U8"),
    "nvfp4": Scheme("nvfp4", rows=1, columns=16, scale="F8_E4M3"),
    "nvfp4-modelopt": Scheme("nvfp4-2", rows=1, columns=16, scale="F8_E4M3"),
    "fp8-modelopt": Scheme("fp8"),
}


def load_at_random(packed: PackedExperts) -> None:
    """Codes and scales of weights about H^-0.5 large, the same for every expert."""
    device, full = packed.bits_SW.device, packed.layout.intermediate_size
    generator = torch.Generator(device).manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        like = {"dtype": torch.uint8, "device": device}
        return torch.randint(low, high, shape, generator=generator, **like)

    rows = packed.row_format
    for projection in projections_of(packed.activation.gated):
        codes_IH = draw(0, 1 << rows.bits, full, packed.hidden_size)
        if rows.code == "e4m3":
            codes_IH &= 0xBF  # below 2
        atoms, columns = rows.block(projection)
        shape = -(-full // atoms), -(-packed.hidden_size // columns)
        if rows.scale == torch.float8_e8m0fnu:
            scales_GC = draw(115, 121, *shape).view(rows.scale)
        elif rows.scale == torch.float8_e4m3fn:
            scales_GC = draw(8, 56, *shape).view(rows.scale)
        else:
            scales_GC = (draw(1, 128, *shape) / 4096).to(rows.scale)
        zeros_GC = draw(0, 16, *shape) if rows.zeros else None
        factor = {"none": None, "times": torch.tensor(1 / 32), "over": torch.tensor(32.0)}
        encoded = Encoded(codes_IH, scales_GC, zeros_GC, factor[rows.factor])
        for expert in range(packed.layout.num_experts):
            packed.load_encoded(expert, projection, encoded)


# What stays plain in the checkpoints below, by vLLM's names: everything but the experts.
PLAIN_LAYERS = [
    *(f"model.layers.{i}.self_attn.{name}_proj" for i in range(4) for name in "qkvo"),
    *(f"model.layers.{i}.mlp.gate" for i in range(4)),
    *(f"model.layers.{i}.mlp.shared_expert_gate" for i in range(4)),
    *(
        f"model.layers.{i}.mlp.{expert}{name}_proj"
        for i in range(4)
        for expert in ("", "shared_expert.")
        for name in ("gate", "up", "down")
    ),
    *("lm_head", "model.embed_tokens"),
]


def _compressed(weight_format: str, activations: dict | None = None, **weights: object) -> dict:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": weight_format,
        "quantization_status": "compressed",
        "ignore": PLAIN_LAYERS,
        "config_groups": {"group_0": group},
    }


_TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
_NOT_ATTENTION = {"-:.*self_attn.*": {}, "-:.*mlp.gate$": {}}
# What config.json says of every format.
SETTINGS: dict[str, dict] = {
    "fp8-block": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": PLAIN_LAYERS,
    },
    "fp8-channel": _compressed(
        "float-quantized", _TOKENS, num_bits=8, type="float", strategy="channel"
    ),
    "fp8-tensor": _compressed(
        "float-quantized",
        {**_TOKENS, "dynamic": False, "strategy": "tensor"},
        **{"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "int4": _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    "gptq": {
        **{"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        **{"lm_head": False, "dynamic": _NOT_ATTENTION},
    },
    "awq": {
        **{"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
        **{"version": "gemm", "modules_to_not_convert": ["self_attn", "mlp.gate", "lm_head"]},
    },
    "mxfp4": _compressed(
        "mxfp4-pack-quantized",
        **{"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
    "nvfp4": _compressed(
        "nvfp4-pack-quantized",
        {
            **_TOKENS,
            "num_bits": 4,
            "strategy": "tensor_group",
            "group_size": 16,
            "dynamic": "local",
        },
        **{"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "nvfp4-modelopt": {
        **{"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": None},
        **{"group_size": 16, "ignore": PLAIN_LAYERS, "producer": {"name": "modelopt"}},
    },
    "fp8-modelopt": {
        **{"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None},
        **{"ignore": PLAIN_LAYERS, "producer": {"name": "modelopt"}},
    },
}


def in_bfloat16(directory: Path) -> None:
    """Make a checkpoint of one shard bfloat16."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def quantize_checkpoint(
    source: Path, target: Path, name: str, linears: bool = False, left: Collection[int] = ()
) -> Path:
    """Write a checkpoint with quantized experts, and beside it a plain one with the same values.

    Args:
        source: a checkpoint of one shard with per-expert matrices; its dtype is that of the rest.
        target: where; profiles are not copied.
        name: key of FORMATS.
        linears: whether attention is quantized, too; config.json does not say so, and vLLM cannot
            serve it then.
        left: layers whose experts stay plain; config.json says so, in the words of the format.

    Returns:
        The directory of the plain checkpoint with the same values, rounded to the source's dtype.
    """
    from vllm_atomic_moe.files.layouts import expert_tensor

    quantized, dense = {}, {}
    for tensor_name, tensor in load_file(source / "model.safetensors").items():
        found = expert_tensor(tensor_name)
        quantize = linears and tensor_name.endswith("_proj.weight")
        if not quantize if found is None else found.layer in left:
            quantized[tensor_name] = dense[tensor_name] = tensor
            continue
        parts, values = FORMATS[name](tensor)
        stem = tensor_name.removesuffix("weight")
        quantized |= {f"{stem}{part}": value.contiguous() for part, value in parts.items()}
        dense[tensor_name] = values.to(tensor.dtype).contiguous()
    return _write(source, target, quantized, dense, _without(SETTINGS[name], left))


def _without(settings: dict, layers: Collection[int]) -> dict:
    """Settings that also exclude the experts of some layers."""
    experts = [f"model.layers.{layer}.mlp.experts" for layer in layers]
    if settings["quant_method"] == "gptq":
        more = {f"-:{re.escape(name)}.*": {} for name in experts}
        return {**settings, "dynamic": {**settings["dynamic"], **more}}
    key = "ignore" if "ignore" in settings else "modules_to_not_convert"
    if settings["quant_method"] in ("fp8", "compressed-tensors"):  # names of matrices
        projections = ("gate", "up", "down")
        experts = [
            f"{it}.{e}.{name}_proj" for it in experts for e in range(8) for name in projections
        ]
    return {**settings, key: [*settings[key], *experts]}


def quantize_gpt_oss(source: Path, target: Path) -> Path:
    """The same for a gpt-oss checkpoint; its tensors hold all experts of a layer, transposed."""
    quantized, dense = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        quantized[name] = dense[name] = tensor
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        del quantized[name]
        experts = [mxfp4_blocks(matrix.t().contiguous()) for matrix in tensor]
        for part in ("blocks", "scales"):
            quantized[f"{name}_{part}"] = torch.stack([parts[part] for parts, _ in experts])
        values = torch.stack([values.t() for _, values in experts])
        dense[name] = values.to(tensor.dtype).contiguous()
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": [*kept, "lm_head"]}
    return _write(source, target, quantized, dense, settings)


def _write(
    source: Path,
    target: Path,
    quantized: dict[str, torch.Tensor],
    dense: dict[str, torch.Tensor],
    settings: dict,
) -> Path:
    """Write both checkpoints, with all else that `source` has; the plain one's directory."""
    plain = target.with_name(f"{target.name}-plain")
    for directory, tensors in ((target, quantized), (plain, dense)):
        ignored = shutil.ignore_patterns("atomic_profiles", "*.safetensors")
        shutil.copytree(source, directory, ignore=ignored)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    return plain
