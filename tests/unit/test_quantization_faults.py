"""Broken quantized matrices: one line, or numbers; never another exception, never infinities."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint, write_profile
from tests.kernel_suite import SPELLED
from tests.quantized import FORMATS, SETTINGS, mxfp4_blocks, quantize_checkpoint
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.experts.encoding import encode
from vllm_atomic_moe.experts.formats import decode
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.quantization import IGNORED, KINDS, scheme_of_down
from vllm_atomic_moe.files.row_formats import PROJECTIONS

H, FULL = 64, 32
SIZES = [(H, FULL), (FULL, H)]
EXAMPLES = (*FORMATS, "gpt-oss")
DTYPES = [dtype for dtype in SPELLED if dtype != torch.bool]
NAMES = sorted(
    {name for kind in KINDS.values() for name in kind.parts} | {"weight_zero_point", "bias"}
)


def matrix(kind, projection, seed=0):
    """The parts of one expert's matrix."""
    generator = torch.Generator().manual_seed(seed)
    shape = (H, FULL) if projection == "down" else (FULL, H)
    quantize = FORMATS.get(kind, mxfp4_blocks)
    parts, _ = quantize(torch.randn(shape, generator=generator))
    return {name: part for name, part in parts.items() if name not in IGNORED}


def told_of(kind, parts):
    """The headers of a down_proj; for gpt-oss, of all experts."""
    all_of = (2,) if kind == "gpt-oss" else ()
    return {name: (SPELLED[part.dtype], (*all_of, *part.shape)) for name, part in parts.items()}


SCHEMES = {
    kind: scheme_of_down("down", told_of(kind, matrix(kind, "down")), H, SETTINGS.get(kind, {}))[0]
    for kind in EXAMPLES
}


def check_one_line(error):
    line = str(error.value if hasattr(error, "value") else error)
    assert 10 < len(line) < 300, line
    assert "\n" not in line
    assert "not enough values" not in line


def numbers(scheme, projection, parts):
    decoded = decode(
        encode(scheme, projection, parts, H, FULL), scheme.row_format(H, FULL), projection
    )
    assert decoded.shape == (FULL, H)
    assert decoded.isfinite().all()


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_broken_scales(kind, projection):
    scheme = SCHEMES[kind]
    scale = next(name for name in scheme.parts if "scale" in name)

    def refused(words, parts):
        with pytest.raises(ValueError, match=words) as error:
            numbers(scheme, projection, parts)
        check_one_line(error)

    whole = matrix(kind, projection)
    numbers(scheme, projection, whole)
    for name in scheme.parts:
        refused(f"{name} is missing", {n: p for n, p in whole.items() if n != name})
    refused("scales|wanted", {**whole, scale: whole[scale].new_ones((*whole[scale].shape, 1, 2))})
    refused("scales|wanted", {**whole, scale: whole[scale].double()})
    bad = whole[scale].clone()
    if bad.dtype in (torch.uint8, torch.float8_e4m3fn):
        bad.view(torch.uint8)[..., 0] = 255
    else:
        bad[..., 0] = torch.inf
    refused("not finite", {**whole, scale: bad})
    if bad.dtype != torch.uint8:  # which are powers of two
        refused("zero", {**whole, scale: torch.zeros_like(whole[scale])})
        blank = {name: torch.zeros_like(part) for name, part in whole.items()}
        if kind.startswith(("fp8", "nvfp4")):
            factor = {n: whole[n] for n in scheme.parts[2:]}
            numbers(scheme, projection, {**blank, **factor})


def test_broken_factors():
    for kind in ("nvfp4", "nvfp4-modelopt"):
        name = SCHEMES[kind].parts[2]
        for value in (0.0, torch.inf, torch.nan):
            parts = {**matrix(kind, "up"), name: torch.tensor([value])}
            with pytest.raises(ValueError, match="the factor of its scales is"):
                numbers(SCHEMES[kind], "up", parts)


def test_invalid_group_indices():
    parts = matrix("gptq", "down")
    parts["g_idx"][3] = 7
    with pytest.raises(ValueError, match="g_idx does not give a group to each of 32 inputs"):
        numbers(SCHEMES["gptq"], "down", parts)


def mutated_told(choose, told):
    """Headers with one or two changes."""
    told = dict(told)
    for _ in range(choose.randint(1, 2)):
        name = choose.choice([*told, choose.choice(NAMES)])
        dtype, shape = told.get(name, ("F32", (H, FULL)))
        match choose.randrange(4):
            case 0:
                told.pop(name, None)
            case 1:
                told[name] = (choose.choice([*SPELLED.values(), "F64", "C64", "F4"]), shape)
            case 2:
                size = choose.choice([0, 1, 2, 3, 7, 8, 16, 32, 64, 10**12])
                place = choose.randrange(len(shape) + 1)
                told[name] = (dtype, (*shape[:place], size, *shape[place + 1 :]))
            case 3:
                told[name] = (dtype, shape[choose.randint(0, 2) :])
    return told


# Of compressed-tensors, for other matrices, for all, and with targets that are none.
GROUPS = [
    {"a": {"targets": targets, "weights": {"num_bits": 8, "type": "int", "group_size": 32}}}
    for targets in (["re:.*self_attn.*"], ["Linear"], ["re:("], [8], "re:.*", {})
]


def mutated_settings(choose, settings):
    settings = dict(settings)
    for key in ("weight_block_size", "config_groups", "group_size", "quant_method"):
        if choose.random() < 0.2:
            settings[key] = choose.choice(
                [None, 0, "x", [1], [0, 0], [16, 16], {"a": 1}, {"a": {}}, *GROUPS]
            )
    return settings


def mutated_parts(choose, parts):
    """Tensors with one or two changes."""
    parts = dict(parts)
    for _ in range(choose.randint(1, 2)):
        name = choose.choice([*parts])
        part = parts[name].clone()
        stored = part.view(torch.uint8) if part.dim() else part.reshape(1).view(torch.uint8)
        match choose.randrange(6):
            case 0:
                parts.pop(name)
                if not parts:
                    return parts
                continue
            case 1:
                part = part.float().to(choose.choice(DTYPES))
            case 2:
                place = choose.randrange(max(part.dim(), 1))
                size = choose.choice([0, 1, 3])
                part = part.narrow(place, 0, min(size, part.shape[place])) if part.dim() else part
            case 3:
                part = part.flatten() if choose.random() < 0.5 else part[None]
            case 4:
                stored.view(-1)[choose.randrange(stored.numel())] = choose.randrange(256)
            case 5:
                stored.fill_(choose.choice([0, 1, 127, 128, 255]))
        parts[name] = part
    return parts


def mutate(seeds):
    refused = 0
    whole = {(kind, projection): matrix(kind, projection) for kind in EXAMPLES
             for projection in PROJECTIONS}  # fmt: skip
    for seed in seeds:
        choose = random.Random(seed)
        kind, projection = choose.choice(EXAMPLES), choose.choice(PROJECTIONS)
        try:
            told = mutated_told(choose, told_of(kind, whole[kind, "down"]))
            settings = mutated_settings(choose, SETTINGS.get(kind, {}))
            scheme, size = scheme_of_down("layers.1.mlp.experts.3.down_proj", told, H, settings)
            assert type(size) is int
            if scheme.kind != "plain":
                scheme.row_format(H, FULL)
        except ValueError as error:
            check_one_line(error)
        try:
            numbers(SCHEMES[kind], projection, mutated_parts(choose, whole[kind, projection]))
        except ValueError as error:
            check_one_line(error)
            refused += 1
    return refused


def test_mutations_give_one_line_or_finite_numbers():
    assert 500 < mutate(range(3_000)) < 2_950


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_many_mutations(part):
    mutate(range(10_000 * part, 10_000 * (part + 1)))


@pytest.mark.parametrize("seeds", [8, pytest.param(600, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_checkpoints_are_refused_or_exported(tmp_path, kind, seeds):
    """One matrix or the settings are broken; what is exported is described as the model was."""
    model, output = tmp_path / "model", tmp_path / "out"
    sizes = {"hidden_size": H, "moe_intermediate_size": FULL, "num_hidden_layers": 2}
    make_checkpoint("qwen3_moe", tmp_path / "original", **sizes)
    quantize_checkpoint(tmp_path / "original", model, kind)
    write_profile(describe_checkpoint(model), "half", tmp_path, seed=1)
    whole = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    matrices = sorted({name.rpartition(".")[0] for name in whole if ".experts." in name})
    refused = 0
    for seed in range(seeds):
        choose = random.Random(seed)
        matrix = choose.choice(matrices)
        told, tensors = dict(config), dict(whole)
        if choose.random() < 0.2:
            told["quantization_config"] = mutated_settings(choose, config["quantization_config"])
        parts = {
            name.rpartition(".")[2]: tensors.pop(name)
            for name in whole
            if name.startswith(f"{matrix}.")
        }
        for name, part in mutated_parts(choose, parts).items():
            tensors[f"{matrix}.{name}"] = part.contiguous()
        (model / "config.json").write_text(json.dumps(told))
        save_file(tensors, model / "model.safetensors")
        shutil.rmtree(output, ignore_errors=True)
        try:
            found = describe_checkpoint(model)
            export(str(model), tmp_path / "half.safetensors", output)
            exported = describe_checkpoint(output)
            assert (exported, exported.schemes.keys()) == (found, found.schemes.keys())
            assert exported.row_formats == found.row_formats
        except ValueError as error:
            check_one_line(error)
            refused += 1
            assert not (output / "config.json").exists()
    assert 0.2 * seeds < refused <= seeds
