"""What every backend of `fused_experts` must do, against float64 over masked dense experts.

A test module subclasses `KernelSuite` and names its backend.

Legend: T tokens, K experts per token, E experts, H hidden size, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.quantized import FORMATS, Quantized, gptq
from vllm_atomic_moe.experts.activation import SILU, Activation
from vllm_atomic_moe.experts.backends import backend_module
from vllm_atomic_moe.experts.encoding import encode
from vllm_atomic_moe.experts.formats import Encoded
from vllm_atomic_moe.experts.op import fused_experts
from vllm_atomic_moe.experts.packing import (
    SLOTS,
    PackedExperts,
    build_layout,
    projections_of,
    tensor_parallel_share,
    with_slots,
)
from vllm_atomic_moe.files.quantization import IGNORED, SCALE_DTYPES, scheme_of_down
from vllm_atomic_moe.files.row_formats import PLAIN, Projection, RowFormat

WIDTHS = (0, 1, 31, 32, 33, 127, 128, 129, 160)
FULL = 160
# As safetensors spells dtypes.
SPELLED = {
    **{dtype: name for name, dtype in SCALE_DTYPES.items()},
    torch.uint8: "U8",
    torch.int32: "I32",
}
# Formats whose tables of scales differ in kind: blocks, groups in any order, zeros, a factor.
SCALES_APART = ("fp8-block", "gptq", "awq", "nvfp4")
ACTIVATIONS = (
    SILU,
    Activation(limit=1.5),
    Activation(limit=7.0, alpha=1.702, beta=1.0),
    Activation("gelu_tanh"),
    Activation("swiglustep", limit=0.75),
    Activation("situ", alpha=2.0),
    Activation("situ", alpha=0.5, beta=3.0),
    Activation("relu2"),
)
# Largest ‖found − wanted‖ in proportion to the norm that `Experts.wanted` returns, against float64
# on the rounded weights and activations.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True, slots=True)
class Experts:
    """Packed experts, and the dense ones that they were cut from.

    Attributes:
        packed: what the kernel computes.
        dense: gate, up, down_t, [E, I, H] on the CPU; without a gate up and down_t.
        biases: of gate, up [E, I] and down [E, H]; of up and down without a gate; or none.
        masks: profile name -> bool [E, I].
        backend: name of the kernel.
    """

    packed: PackedExperts
    dense: tuple[torch.Tensor, ...]
    masks: Mapping[str, torch.Tensor]
    backend: str
    biases: tuple[torch.Tensor, ...] = ()

    def __call__(
        self,
        x_TH: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        profiles: str | Sequence[str] = "a",
    ) -> torch.Tensor:
        """The op, with arguments moved to the experts' device; the result on the CPU.

        Args:
            profiles: of all tokens, or of each.
        """
        names = [profiles] if isinstance(profiles, str) else profiles
        slots_T1 = torch.tensor([[self.packed.slot(name)] for name in names], dtype=torch.int32)
        slots_T1 = slots_T1.view(-1, 1)
        device = self.packed.bits_SW.device
        out_TH = fused_experts(
            x_TH.to(device),
            self.packed.weights,
            self.packed.scales,
            self.packed.biases,
            *self.packed.index,
            topk_weights_TK.to(device),
            with_slots(topk_ids_TK, slots_T1).to(device),
            self.packed.widest,
            self.packed.activation.spec,
            self.packed.row_format.spec,
            self.backend,
        )
        assert out_TH.dtype == x_TH.dtype
        return out_TH.cpu()

    def wanted(
        self,
        x_TH: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        profiles: str | Sequence[str],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every expert for every token in float64, pruned atoms zeroed, then weighted.

        Returns:
            The sum [T, H], and the norm that it would have if the terms' signs were random:
            rounding errors are in proportion to it, even if the terms happen to cancel.
        """
        act = self.packed.activation
        *rows, down_t = (matrix.double() for matrix in self.dense)
        names = [profiles] * len(x_TH) if isinstance(profiles, str) else profiles
        kept_TEI = torch.stack(
            [*(self.masks[name] for name in names), next(iter(self.masks.values()))]
        )
        x = x_TH.double()
        sums = [torch.einsum("th,eih->tei", x, matrix) for matrix in rows]
        for index, bias in enumerate(self.biases[:-1]):
            sums[index] = sums[index] + bias.double()
        h = (act(*sums) if act.gated else act(None, *sums)) * kept_TEI[: len(x_TH)]
        y = torch.einsum("tei,eih->teh", h, down_t)
        if self.biases:
            y = y + self.biases[-1].double()
        # Sums over H may cancel too: their norms, with SiLU's slope of one half at zero. What the
        # other activations add to, or square, has no such bound that is simple; theirs are loose.
        h_squares = torch.einsum("th,eih->tei", x**2, rows[0] ** 2) / 4
        h_squares = h_squares * (torch.einsum("th,eih->tei", x**2, rows[-1] ** 2) + act.beta**2)
        h_squares = torch.maximum(h**2, h_squares * kept_TEI[: len(x_TH)])
        squares = torch.einsum("tei,eih->te", h_squares, down_t**2)
        out = torch.zeros(x_TH.shape, dtype=torch.float64)
        square = torch.zeros((), dtype=torch.float64)
        for token, ids in enumerate(topk_ids_TK.tolist()):
            for k, expert in enumerate(ids):
                if 0 <= expert < len(down_t):
                    weight = topk_weights_TK[token, k].double()
                    out[token] += weight * y[token, expert]
                    square += weight**2 * squares[token, expert]
        return out, square.sqrt()

    def check(
        self,
        x_TH: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        profiles: str | Sequence[str] = "a",
    ) -> torch.Tensor:
        """Compute and compare in norms; returns what was computed."""
        found = self(x_TH, topk_weights_TK, topk_ids_TK, profiles)
        wanted, size = self.wanted(x_TH, topk_weights_TK, topk_ids_TK, profiles)
        assert found.shape == wanted.shape
        assert found.isfinite().all()
        error = (found.double() - wanted).norm()
        size = torch.maximum(size, wanted.norm())
        assert error <= TOLERANCE[x_TH.dtype] * size, f"relative error {error / size:.1e}"
        return found


def make_experts(
    masks: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    hidden_size: int = 24,
    activation: Activation = SILU,
    has_bias: bool = False,
    quantize: Callable[[torch.Tensor], Quantized] | None = None,
    plain_down: bool = False,
) -> Experts:
    """Experts of random weights and biases, reduced to `masks`; optionally quantized, all of them
    or gate and up alone."""
    generator = torch.Generator().manual_seed(0)
    num_experts, full = next(iter(masks.values())).shape
    shape = (num_experts, full, hidden_size)
    scale = hidden_size**-0.5
    projections = projections_of(activation.gated)
    dense = tuple((torch.randn(shape, generator=generator) * scale).to(dtype) for _ in projections)
    encoded, row_format = {}, PLAIN
    if quantize is not None:
        down = dense[-1]
        dense, encoded, row_format = _quantized(dense, projections, quantize)
        if plain_down:
            dense, row_format = (*dense[:-1], down), replace(row_format, plain_down=True)
            for expert in range(num_experts):
                del encoded[expert, "down"]
        dense = tuple(matrix.to(dtype) for matrix in dense)
    packed = PackedExperts(
        build_layout(masks),
        hidden_size,
        dtype,
        torch.device(device),
        storage=backend_module(backend).STORAGE,
        activation=activation,
        has_bias=has_bias,
        row_format=row_format,
    )
    biases = tuple(
        torch.randn(num_experts, hidden_size if name == "down" else full, generator=generator)
        for name in projections
        if has_bias
    )
    for expert in range(num_experts):
        for projection, matrix in zip(projections, dense, strict=True):
            rows = matrix[expert]
            if (expert, projection) in encoded:
                packed.load_encoded(expert, projection, encoded[expert, projection])
                continue
            packed.load_expert(
                expert, projection, rows.t().contiguous() if projection == "down" else rows
            )
        for projection, bias in zip(projections if has_bias else (), biases, strict=True):
            packed.load_bias(expert, projection, bias[expert])
    return Experts(packed, dense, masks, backend, biases)


def _quantized(
    dense: Sequence[torch.Tensor],
    projections: Sequence[Projection],
    quantize: Callable[[torch.Tensor], Quantized],
) -> tuple[tuple[torch.Tensor, ...], dict[tuple[int, Projection], Encoded], RowFormat]:
    """The quantized matrices, the parts to load of each expert's, and their format."""
    _, full, hidden_size = dense[0].shape
    after, encoded = [], {}
    for projection, matrices in zip(projections, dense, strict=True):
        down, rows = projection == "down", []
        for expert, matrix in enumerate(matrices):
            parts, values = quantize(matrix.t().contiguous() if down else matrix)
            rows.append(values.t() if down else values)
            parts = {name: part for name, part in parts.items() if name not in IGNORED}
            if down:
                told = {name: (SPELLED[part.dtype], (*part.shape,)) for name, part in parts.items()}
                scheme, size = scheme_of_down("down", told, hidden_size, {})
                assert size == full
            encoded[expert, projection] = parts
        after.append(torch.stack(rows))
    loaded = {
        (expert, projection): encode(scheme, projection, parts, hidden_size, full)
        for (expert, projection), parts in encoded.items()
    }
    return tuple(after), loaded, scheme.row_format(hidden_size, full)


def ragged(seed: int = 0) -> torch.Tensor:
    """bool [9, 160]: one expert of every width in WIDTHS, atoms at random."""
    mask = torch.zeros(len(WIDTHS), FULL, dtype=torch.bool)
    for expert, width in enumerate(WIDTHS):
        generator = torch.Generator().manual_seed(seed + expert)
        mask[expert, torch.randperm(FULL, generator=generator)[:width]] = True
    return mask


def routed(
    tokens: int,
    top_k: int,
    experts: int,
    dtype: torch.dtype,
    hidden_size: int = 24,
    foreign: bool = True,
    seed: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations [T, H], router weights and expert ids [T, K]; ids repeat, and with `foreign` some
    are −1 or beyond E."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-1, experts + 1) if foreign else (0, experts)
    return (
        torch.randn(tokens, hidden_size, generator=generator).to(dtype),
        torch.rand(tokens, top_k, generator=generator),
        torch.randint(low, high, (tokens, top_k), generator=generator).int(),
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the context, `torch.empty` returns memory filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class KernelSuite:
    """Subclasses name `backend`, and `device` and `dtypes` where these differ."""

    backend: str
    device = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    @pytest.fixture(autouse=True)
    def _runs_here(self) -> None:
        for dtype in self.dtypes:
            reason = backend_module(self.backend).unavailable(torch.device(self.device), dtype)
            if reason is not None:
                pytest.skip(f"{self.backend} in {dtype}: {reason}")

    def make(self, masks: Mapping[str, torch.Tensor], dtype: torch.dtype, **more: Any) -> Experts:
        """Experts for this backend and device."""
        return make_experts(masks, dtype, self.backend, self.device, **more)

    @pytest.mark.parametrize("tokens", [1, 7, 40])
    def test_any_width(self, tokens: int) -> None:
        """Every width, repeated ids, −1 and foreign ids."""
        for dtype in self.dtypes:
            self.make({"a": ragged()}, dtype).check(*routed(tokens, 12, len(WIDTHS), dtype))

    @pytest.mark.parametrize("has_bias", [False, True])
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda it: it.spec)
    def test_every_activation(self, activation: Activation, has_bias: bool) -> None:
        """Every activation, with and without biases, two profiles in a batch; every width."""
        masks = {"a": ragged(), "b": ragged(1)}
        for dtype in self.dtypes:
            experts = self.make(masks, dtype, activation=activation, has_bias=has_bias)
            for tokens in (1, 20):
                x, weights, ids = routed(tokens, 4, len(WIDTHS), dtype)
                names = [("a", "b")[token % 2] for token in range(tokens)]
                experts.check(5 * x, weights, ids, names)

    @pytest.mark.parametrize("name", FORMATS)
    def test_rows_of_codes(self, name: str) -> None:
        """Every format, sizes that are not multiples of its blocks, two profiles in one batch."""
        masks = {"a": ragged(), "b": ragged(1)}
        for dtype in self.dtypes:
            experts = self.make(masks, dtype, hidden_size=96, quantize=FORMATS[name])
            for tokens in (1, 3, 40):
                x, weights, ids = routed(tokens, 4, len(WIDTHS), dtype, hidden_size=96)
                names = [("a", "b")[token % 2] for token in range(tokens)]
                experts.check(x, weights, ids, names)

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda it: it.spec)
    @pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=[] if name == "awq" else pytest.mark.full) for name in FORMATS],
    )
    def test_codes_with_every_activation(self, name: str, activation: Activation) -> None:
        """Every format with biases in every activation, gated and not."""
        self._check_codes({"activation": activation, "has_bias": True}, FORMATS[name])

    @pytest.mark.parametrize(
        "activation", [ACTIVATIONS[2], ACTIVATIONS[-1]], ids=lambda it: it.spec
    )
    def test_codes_without_biases(self, activation: Activation) -> None:
        """With three matrices per expert, and with two."""
        self._check_codes({"activation": activation}, FORMATS["mxfp4"])

    @pytest.mark.parametrize("has_bias", [False, True])
    def test_activation_order(self, has_bias: bool) -> None:
        """GPTQ's `g_idx` of down gives the groups of atoms in any order."""
        order = torch.arange(FULL) // 32
        order = order[torch.randperm(FULL, generator=torch.Generator().manual_seed(6))]

        def quantize(matrix: torch.Tensor) -> Quantized:
            return gptq(matrix, order=order if matrix.shape[1] == FULL else None)

        experts = self._check_codes({"has_bias": has_bias}, quantize)
        rows = experts.packed.down_rows
        assert bool((rows.diff() < 0).any())

    def _check_codes(
        self, more: dict[str, Any], quantize: Callable[[torch.Tensor], Quantized]
    ) -> Experts:
        for dtype in self.dtypes:
            experts = self.make({"a": ragged()}, dtype, hidden_size=96, quantize=quantize, **more)
            for tokens in (1, 20):
                x, weights, ids = routed(tokens, 4, len(WIDTHS), dtype, hidden_size=96)
                experts.check(5 * x, weights, ids)
        return experts

    @pytest.mark.parametrize(
        ("name", "activation", "has_bias"),
        [
            # `make test` takes the two kinds of scale tables and what has no gate.
            ("fp8-block", SILU, False),
            ("awq", SILU, True),
            ("mxfp4", ACTIVATIONS[-1], True),
            *(
                pytest.param(name, activation, has_bias, marks=pytest.mark.full)
                for name, activation, has_bias in (
                    ("fp8-block", SILU, True),
                    ("awq", SILU, False),
                    *((name, SILU, it) for name in ("int4", "nvfp4") for it in (False, True)),
                    *(("mxfp4", ACTIVATIONS[2], it) for it in (False, True)),
                    ("mxfp4", ACTIVATIONS[-1], False),
                )
            ),
        ],
        ids=lambda it: str(getattr(it, "spec", it)),
    )
    def test_plain_down_beside_codes(
        self, name: str, activation: Activation, has_bias: bool
    ) -> None:
        """A refitted down_proj; two profiles in one batch, and no gate."""
        masks = {"a": ragged(), "b": ragged(1)}
        for dtype in self.dtypes:
            experts = self.make(
                masks,
                dtype,
                hidden_size=96,
                activation=activation,
                has_bias=has_bias,
                quantize=FORMATS[name],
                plain_down=True,
            )
            for tokens in (1, 3, 40):
                x, weights, ids = routed(tokens, 4, len(WIDTHS), dtype, hidden_size=96)
                names = [("a", "b")[token % 2] for token in range(tokens)]
                experts.check(x, weights, ids, names)

    def test_a_bias_remains_without_atoms(self) -> None:
        """The bias of down, weighted by the router, is added once."""
        for dtype in self.dtypes:
            experts = self.make({"a": torch.zeros(3, FULL).bool()}, dtype, has_bias=True)
            for tokens in (1, 9):
                x, weights, ids = routed(tokens, 2, 3, dtype)
                assert experts.check(x, weights, ids).any()

    def test_one_width_at_a_time(self) -> None:
        """K = 1; every other expert is without tokens; width 0 gives exactly zero."""
        for dtype in self.dtypes:
            experts = self.make({"a": ragged()}, dtype)
            x, weights, _ = routed(3, 1, 1, dtype)
            for expert in range(len(WIDTHS)):
                found = experts.check(x, weights, torch.full((3, 1), expert, dtype=torch.int32))
                assert bool(found.any()) == (WIDTHS[expert] > 0)

    def test_no_tokens(self) -> None:
        """T = 0."""
        found = self.make({"a": ragged()}, self.dtypes[0]).check(*routed(0, 2, 9, self.dtypes[0]))
        assert found.shape == (0, 24)

    def test_all_experts_pruned(self) -> None:
        """No atom is resident: exactly zero."""
        dtype = self.dtypes[0]
        experts = self.make({"a": torch.zeros(3, FULL).bool()}, dtype)
        x, weights, ids = routed(4, 2, 3, dtype)
        assert torch.equal(experts(x, weights, ids), torch.zeros(4, 24, dtype=dtype))

    def test_ids_of_other_ranks_only(self) -> None:
        """Padding and other ranks' experts give exactly zero."""
        dtype = self.dtypes[0]
        x, weights, _ = routed(4, 2, 3, dtype)
        ids = torch.tensor([[-1, 9], [-7, -1], [2**20, 9], [9, 9]])
        experts = self.make({"b": ragged(1), "a": ragged()}, dtype)
        assert torch.equal(experts(x, weights, ids), torch.zeros(4, 24, dtype=dtype))

    def test_profiles_that_are_not_nested(self) -> None:
        """Bits anywhere in a tile; a slot's bits may be rewritten in place."""
        generator = torch.Generator().manual_seed(2)
        masks = {name: torch.rand(4, FULL, generator=generator) < 0.5 for name in "abc"}
        for dtype in self.dtypes:
            experts = self.make(masks, dtype)
            for name in "abcab":
                for tokens in (1, 30):
                    experts.check(*routed(tokens, 2, 4, dtype), profiles=name)
            swapped = Experts(
                experts.packed, experts.dense, {**masks, "a": masks["c"]}, experts.backend
            )
            experts.packed.bits_SW[0].copy_(experts.packed.bits_SW[2])
            swapped.check(*routed(5, 2, 4, dtype), profiles="a")

    @pytest.mark.parametrize("tokens", [1, 6, 50])
    def test_mixed_slots(self, tokens: int) -> None:
        """All slots in one batch, of arbitrary masks, foreign and negative ids among them."""
        generator = torch.Generator().manual_seed(4)
        masks = {
            f"p{s}": ragged(10 * s) & (torch.rand(9, FULL, generator=generator) < 0.7)
            for s in range(SLOTS)
        }
        for dtype in self.dtypes:
            experts = self.make(masks, dtype)
            names = [f"p{(5 * token + 3) % SLOTS}" for token in range(tokens)]
            x, weights, ids = routed(tokens, 5, len(WIDTHS), dtype)
            together = experts.check(x, weights, ids, names)
            # Who else is in the batch changes rounding at most.
            some = range(0, tokens, 7)
            alone = torch.cat(
                [experts(x[t, None], weights[t, None], ids[t, None], [names[t]]) for t in some]
            )
            difference = (together[some].double() - alone.double()).norm()
            assert difference <= TOLERANCE[dtype] * experts.wanted(x, weights, ids, names)[1]

    def test_a_slot_without_atoms(self) -> None:
        """Its tokens get exactly zero, and the others what they get alone; the same for unused
        slots."""
        masks = {"all": torch.ones(3, FULL).bool(), "none": torch.zeros(3, FULL).bool()}
        for dtype in self.dtypes:
            experts = self.make(masks, dtype)
            x, weights, ids = routed(9, 2, 3, dtype, foreign=False)
            names = ["none" if token % 3 else "all" for token in range(9)]
            found = experts.check(x, weights, ids, names)
            empty = torch.arange(9) % 3 > 0
            assert not found[empty].any()
            assert found[~empty].any(dim=1).all()
            device = experts.packed.bits_SW.device
            unused = with_slots(ids, torch.tensor([[SLOTS - 1]], dtype=torch.int32)).to(device)
            arguments = (experts.packed.weights, [], [], *experts.packed.index)
            routing = weights.to(device), unused, FULL, SILU.spec, PLAIN.spec
            nothing = fused_experts(x.to(device), *arguments, *routing, experts.backend)
            assert not nothing.any()

    def test_last_words_are_partial(self) -> None:
        """A profile keeps only the last atom, or all but the last, at any width."""
        for dtype in self.dtypes:
            last = ragged()
            columns = last.int().cumsum(dim=1)
            last &= columns == columns[:, -1:]
            experts = self.make({"a": ragged(), "last": last, "most": ragged() & ~last}, dtype)
            x, weights, ids = routed(12, 9, len(WIDTHS), dtype)
            experts.check(x, weights, ids, ["a", "last", "most"] * 4)
            for name in ("last", "most"):
                experts.check(x, weights, ids, name)

    def test_nested_profiles(self) -> None:
        """Profiles are prefixes of one another, down to nothing."""
        score = torch.rand(3, FULL, generator=torch.Generator().manual_seed(3))
        masks = {f"p{index}": score < index / 3 for index in range(4)}
        experts = self.make(masks, self.dtypes[0])
        for name in masks:
            experts.check(*routed(5, 2, 3, self.dtypes[0]), profiles=name)

    @pytest.mark.parametrize(
        "name",
        [
            PLAIN.code,
            *(
                pytest.param(name, marks=[] if name in SCALES_APART else pytest.mark.full)
                for name in FORMATS
            ),
        ],
    )
    def test_ranks_add_up(self, name: str) -> None:
        """Tensor and expert parallel: what other ranks hold has no rows here and adds nothing.

        Every rank has its own table of scales, of the groups that its rows need.
        """
        dtype, quantize = self.dtypes[0], FORMATS.get(name)
        hidden = 96 if quantize else 24
        masks = {"a": ragged(), "b": ragged(1)}
        arguments = routed(7, 3, len(WIDTHS), dtype, hidden)
        first_E1 = torch.arange(len(WIDTHS))[:, None] < 4

        def make(share: torch.Tensor) -> Experts:
            own = {profile: mask & share for profile, mask in masks.items()}
            return self.make(own, dtype, hidden_size=hidden, quantize=quantize)

        whole = make(torch.tensor(True))
        assert whole.packed.row_format.plain == (quantize is None)
        for shares in (
            [tensor_parallel_share(masks, rank, 3) for rank in range(3)],
            [first_E1, ~first_E1],
        ):
            ranks = [make(share) for share in shares]
            for profile in masks:
                parts = torch.stack([rank.check(*arguments, profiles=profile) for rank in ranks])
                found = parts.double().sum(dim=0)
                wanted = whole.check(*arguments, profiles=profile).double()
                assert (found - wanted).norm() <= 4 * TOLERANCE[dtype] * wanted.norm()

    def test_arguments_that_are_not_contiguous(self) -> None:
        """Strided activations, weights and ids; 64-bit ids; router weights in the model's dtype."""
        for dtype in self.dtypes:
            experts = self.make({"a": ragged()}, dtype)
            x, weights, ids = routed(6, 4, len(WIDTHS), dtype)
            weights = weights.to(dtype).float()
            wanted = experts.check(x, weights, ids)
            wide = torch.stack([x, x.flip(0)], dim=2).flatten(1)[:, ::2]
            assert not wide.is_contiguous()
            turned = ids.long().t().contiguous().t()
            assert torch.equal(experts(wide, weights.to(dtype), turned), wanted)

    def test_poisoned_memory(self) -> None:
        """Unwritten memory is never read: weights, scratch and output begin as NaN."""
        with poisoned_memory():
            for dtype in self.dtypes:
                first = ragged()
                first &= first.int().cumsum(dim=1) <= 40
                experts = self.make({"a": ragged(), "first": first}, dtype)
                for tokens in (1, 9):
                    arguments = routed(tokens, 3, len(WIDTHS), dtype)
                    for profiles in ("a", "first", [("a", "first")[t % 2] for t in range(tokens)]):
                        experts.check(*arguments, profiles)

    def test_arguments_are_not_modified(self) -> None:
        """The result is new memory."""
        experts = self.make({"a": ragged()}, self.dtypes[0])
        arguments = routed(5, 2, len(WIDTHS), self.dtypes[0])
        before = [argument.clone() for argument in arguments]
        one, two = experts(*arguments), experts(*arguments)
        assert one.data_ptr() != two.data_ptr()
        assert all(map(torch.equal, arguments, before))

    # Run by every subclass, which hypothesis takes for a mistake.
    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(
        st.integers(0, 1 << 20),
        st.integers(1, 6),
        st.integers(1, 100),
        st.integers(1, 70),
        st.integers(0, 40),
        st.integers(1, 5),
    )
    def test_random_shapes(
        self, seed: int, experts: int, full: int, half: int, tokens: int, top_k: int
    ) -> None:
        """Any E, I, H (even), T and K, two profiles."""
        generator = torch.Generator().manual_seed(seed)
        masks = {
            name: torch.rand(experts, full, generator=generator)
            < torch.rand(experts, 1, generator=generator)
            for name in "ab"
        }
        dtype = self.dtypes[seed % len(self.dtypes)]
        made = self.make(masks, dtype, hidden_size=2 * half)
        for name in "ab":
            made.check(*routed(tokens, top_k, experts, dtype, 2 * half, seed=seed), profiles=name)
