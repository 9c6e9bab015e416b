"""The kernels on a CUDA device. Needs torch and Triton only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from tests.kernel_suite import TOLERANCE, KernelSuite, make_experts, poisoned_memory, ragged, routed
from tests.quantized import FORMATS, SCHEMES, load_at_random
from tests.triton_decoding import DECODED, check_decoding
from vllm_atomic_moe.experts.activation import SILU
from vllm_atomic_moe.experts.backends import choose_backend
from vllm_atomic_moe.experts.backends import triton as triton_backend
from vllm_atomic_moe.experts.formats import stored_values
from vllm_atomic_moe.experts.packing import (
    SLOTS,
    PackedExperts,
    build_layout,
    unpack_bits,
    with_slots,
)
from vllm_atomic_moe.files.row_formats import PLAIN
from vllm_atomic_moe.measure.shapes import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TestReference(KernelSuite):
    """The slow loop, on the GPU."""

    backend = "reference"
    device = "cuda"
    dtypes = DTYPES


class TestTriton(KernelSuite):
    """Everything in both forms, whatever the shapes would choose."""

    backend = "triton"
    device = "cuda"
    dtypes = DTYPES

    @pytest.fixture(autouse=True, scope="class", params=["two kernels", "one kernel"])
    def _form(self, request: pytest.FixtureRequest) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            always = 1 << 30 if request.param == "one kernel" else 0
            patch.setattr(triton_backend, "ONE_KERNEL_ROWS", always)
            yield

    def test_arguments_that_are_not_contiguous(self) -> None:
        """Compared bit by bit, which takes the deterministic form."""
        with poisoned_memory():
            super().test_arguments_that_are_not_contiguous()


def test_triton_is_chosen():
    assert choose_backend(torch.device("cuda"), torch.bfloat16).name == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODED)
def test_codes_are_decoded_as_by_the_reference(name, dtype):
    check_decoding(name, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 2048])
@pytest.mark.parametrize(
    ("model", "name"),
    [*((model, "plain") for model in SHAPES), *(("qwen3-30b-a3b", name) for name in SCHEMES)],
)
def test_real_shapes(model, name, tokens, dtype):
    """Ragged experts of real models under four profiles in a batch, memory poisoned."""
    E, H, full, K = SHAPES[model][1:]
    generator = torch.Generator().manual_seed(0)
    random = {"generator": torch.Generator("cuda").manual_seed(0), "device": "cuda"}
    widths_E = torch.randint(0, full + 1, (E,), generator=generator)
    widths_E[:2] = torch.tensor([0, full])
    whole_EI = torch.arange(full) < widths_E[:, None]
    masks = {"whole": whole_EI, "none": torch.zeros_like(whole_EI)}
    for name, part in (("half", 0.5), ("tenth", 0.1)):
        masks[name] = whole_EI & (torch.rand(E, full, generator=generator) < part)
    layout = build_layout(masks)
    rows = SCHEMES[name].row_format(H, full) if name in SCHEMES else PLAIN
    packed = PackedExperts(layout, H, dtype, torch.device("cuda"), row_format=rows)
    if rows.plain:
        for weight in packed.weights:
            weight.normal_(std=H**-0.5, generator=random["generator"])
    else:
        load_at_random(packed)
    x_TH = torch.randn(tokens, H, **random).to(dtype)
    topk_weights_TK, ids_TK = torch.rand(tokens, E, **random).topk(K)
    slots_T1 = (torch.arange(tokens, dtype=torch.int32, device="cuda") % len(masks))[:, None]
    routing = topk_weights_TK, with_slots(ids_TK, slots_T1)
    weights = x_TH, packed.weights, packed.scales, []
    arguments = (*weights, *packed.index, *routing, packed.widest, SILU.spec, rows.spec)
    with poisoned_memory():
        two = triton_backend.fused_experts(*arguments)
    chosen = triton_backend.fused_experts(*arguments)
    wanted = exact(x_TH, packed, *routing)
    for found in (two, chosen):
        assert (found.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def exact(
    x_TH: torch.Tensor,
    packed: PackedExperts,
    topk_weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
) -> torch.Tensor:
    """One expert after another in float64, its weights rounded to x's dtype."""
    bits_SW, words_E1, offsets_E1 = packed.index
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device)
    for expert in range(len(offsets_E1) - 1):
        tokens, ks = torch.where(ids_TK // SLOTS == expert)
        first, end = offsets_E1[expert : expert + 2].tolist()
        rows_F = torch.arange(first, end, device=x_TH.device)
        stored = packed.weights, packed.scales
        gate, up, down_t = (
            stored_values(*stored, which, packed.row_format, expert, rows_F).to(x_TH.dtype).double()
            for which in range(3)
        )
        x = x_TH[tokens].double()
        h = functional.silu(x @ gate.t()) * (x @ up.t())
        words = bits_SW[:, words_E1[expert] : words_E1[expert + 1]]
        h *= unpack_bits(words, end - first)[ids_TK[tokens, ks] % SLOTS]
        out_TH.index_add_(0, tokens, (h @ down_t) * topk_weights_TK[tokens, ks, None].double())
    return out_TH


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
@pytest.mark.parametrize("quantize", [None, FORMATS["nvfp4"]], ids=["plain", "nvfp4"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_graph_replays_follow_tokens_and_profiles(tokens, quantize, deterministic):
    """Captured once; activations, routing, slots and their bits are rewritten in place."""
    dtype = torch.float16
    masks = {"a": ragged(), "b": ragged(seed=50).flip(0), "none": torch.zeros_like(ragged())}
    experts = make_experts(masks, dtype, "triton", "cuda", hidden_size=64, quantize=quantize)
    packed = experts.packed
    still = [argument.cuda() for argument in routed(tokens, 4, 9, dtype, 64)]
    still[2] = with_slots(still[2], torch.zeros(1, dtype=torch.int32, device="cuda"))
    torch.use_deterministic_algorithms(deterministic)
    try:

        def call() -> torch.Tensor:
            return torch.ops.atomic_moe.fused_experts(
                still[0], packed.weights, packed.scales, [], *packed.index, *still[1:],
                packed.widest, SILU.spec, packed.row_format.spec, "triton",
            )  # fmt: skip

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_TH = call()
    finally:
        torch.use_deterministic_algorithms(False)
    mixes = (["a"], ["b"], ["none"], ["a", "none", "b"], ["b", "a"])
    for seed, mix in enumerate((*mixes, ["a", "b"])):
        if seed == len(mixes):  # as when a profile takes the slot of another
            packed.bits_SW[0].copy_(packed.bits_SW[1])
            experts = replace(experts, masks={**masks, "a": masks["b"]})
        names = [mix[token % len(mix)] for token in range(tokens)]
        fresh = routed(tokens, 4, 9, dtype, 64, seed=seed)
        slots_T1 = torch.tensor([[packed.slot(name)] for name in names], dtype=torch.int32)
        carried = (*fresh[:2], with_slots(fresh[2], slots_T1))
        for argument, value in zip(still, carried, strict=True):
            argument.copy_(value)
        out_TH.fill_(float("nan"))
        graph.replay()
        wanted, _ = experts.wanted(*fresh, names)
        assert (out_TH.cpu().double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


@pytest.mark.parametrize("tokens", [1, 100])
def test_deterministic_form_repeats(tokens):
    experts = make_experts({"a": ragged()}, torch.bfloat16, "triton", "cuda", hidden_size=512)
    arguments = routed(tokens, 8, 9, torch.bfloat16, 512)
    with poisoned_memory():
        first = experts(*arguments)
        assert all(torch.equal(experts(*arguments), first) for _ in range(20))
