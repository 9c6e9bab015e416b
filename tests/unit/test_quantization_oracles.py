"""Our reading of quantized matrices equals that of compressed-tensors, and of vLLM's packers."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from tests.kernel_suite import SPELLED
from vllm_atomic_moe.experts.encoding import encode
from vllm_atomic_moe.experts.formats import decode
from vllm_atomic_moe.files.quantization import IGNORED, scheme_of_down

H, FULL = 192, 96
FLOAT8 = {"num_bits": 8, "type": "float"}
FLOAT4 = {"num_bits": 4, "type": "float"}
# Name -> (format of compressed-tensors, arguments, blocks of rows and columns that share a scale).
CASES = {
    "fp8 block": ("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [48, 32]},
                  (48, 32)),
    "fp8 channel": ("float-quantized", {**FLOAT8, "strategy": "channel"}, (1, 0)),
    "fp8 tensor": ("float-quantized", {**FLOAT8, "strategy": "tensor"}, (0, 0)),
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, (1, 32)),
    "int4 channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, (1, 0)),
    "mxfp4": ("mxfp4-pack-quantized", {**FLOAT4, "strategy": "group", "group_size": 32,
                                       "scale_dtype": torch.uint8}, (1, 32)),
    "nvfp4": ("nvfp4-pack-quantized", {**FLOAT4, "strategy": "tensor_group", "group_size": 16,
                                       "scale_dtype": torch.float8_e4m3fn}, (1, 16)),
}  # fmt: skip


def compressed(name, matrix):
    """The saved parts of a matrix, and the matrix as decoded by the library."""
    kind, arguments, (rows, columns) = CASES[name]
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(symmetric=True, **arguments)
    )
    outputs, inputs = matrix.shape
    rows, columns = rows or outputs, columns or inputs
    blocks = matrix.view(outputs // rows, rows, inputs // columns, columns)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    state = {"weight": matrix}
    if name == "nvfp4":
        state["weight_global_scale"] = generate_gparam(matrix.min(), matrix.max())
    scale, zero = calculate_qparams(low, high, scheme.weights, state.get("weight_global_scale"))
    if name == "fp8 tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(kind)
    saved = compressor.compress(state, scheme)
    read = compressor.decompress(saved, scheme)["weight"]
    return {part: value for part, value in saved.items() if part != "weight_zero_point"}, read


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("projection", ["up", "down"])
def test_compressed_tensors_reads_the_same(name, projection):
    generator = torch.Generator().manual_seed(0)
    settings = {"config_groups": {"group_0": {"weights": CASES[name][1]}}}
    down, _ = compressed(name, torch.randn(H, FULL, generator=generator))
    told = {
        part: (SPELLED[value.dtype], tuple(value.shape))
        for part, value in down.items()
        if part not in IGNORED
    }
    scheme, size = scheme_of_down("down", told, H, settings)
    assert (size, scheme.name.split()[0]) == (FULL, name.split()[0])
    shape = (H, FULL) if projection == "down" else (FULL, H)
    parts, wanted = compressed(name, torch.randn(shape, generator=generator))
    found = decode(
        encode(scheme, projection, parts, H, FULL), scheme.row_format(H, FULL), projection
    )
    found = found.t() if projection == "down" else found
    assert wanted.unique().numel() > 10
    # It multiplies in the dtype that codes are unpacked to.
    rounding = {torch.bfloat16: 2**-8}.get(wanted.dtype, 2e-7)
    torch.testing.assert_close(found, wanted.float(), rtol=rounding, atol=0)


def packed_by_vllm(name, shape, generator):
    """A matrix as vLLM's own quantizer and packer store it, and its values."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        awq_pack,
        gptq_pack,
        quantize_weights,
    )
    from vllm.scalar_type import scalar_types

    outputs, inputs = shape
    matrix_KN = torch.randn(inputs, outputs, generator=generator)
    if name == "awq":
        values, codes, scales, zeros = quantize_weights(matrix_KN, scalar_types.uint4, 32, True)
        qzeros = awq_pack(zeros, 4, inputs // 32, outputs)
        parts = {"qweight": awq_pack(codes, 4, inputs, outputs), "qzeros": qzeros}
    else:
        values, codes, scales, _ = quantize_weights(matrix_KN, scalar_types.uint4b8, 32)
        parts = {
            "qweight": gptq_pack(codes, 4, inputs, outputs),
            "qzeros": torch.full((inputs // 32, outputs // 8), 0x77777777, dtype=torch.int32),
            "g_idx": (torch.arange(inputs) // 32).int(),
        }
    assert codes.unique().tolist() == list(range(16))
    return {**parts, "scales": scales}, values.t()


@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize("projection", ["up", "down"])
def test_vllm_packs_the_same(name, projection):
    generator = torch.Generator().manual_seed(0)
    shape = (H, FULL) if projection == "down" else (FULL, H)
    parts, wanted = packed_by_vllm(name, shape, generator)
    down = parts if projection == "down" else packed_by_vllm(name, (H, FULL), generator)[0]
    told = {part: (SPELLED[value.dtype], tuple(value.shape)) for part, value in down.items()}
    scheme, size = scheme_of_down("down", told, H, {})
    assert (size, scheme.name) == (FULL, f"{name} g32")
    found = decode(
        encode(scheme, projection, parts, H, FULL), scheme.row_format(H, FULL), projection
    )
    assert torch.equal(found.t() if projection == "down" else found, wanted)
