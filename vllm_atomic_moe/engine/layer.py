"""The layer: vLLM's routed experts with packed rows instead of w13 and w2.

Routing, shared experts, reductions and scaling stay vLLM's own; only the weights, the sum over
experts and the routing mask are ours. While weights load, each checkpoint tensor is sliced into the
packed rows, so that the dense experts are never in memory. Every token of a batch has a slot, the
number of its profile; expert ids carry it to the kernel.

With several ranks a layer knows all experts, by their ids in the checkpoint. Those of other ranks
are not resident here and contribute zero; vLLM's all-reduce after the experts adds up the shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch

from vllm_atomic_moe.engine.compat import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEMethodBase,
    RoutedExperts,
    activation_of,
    extract_layer_index,
    resolve_quant_method,
    routed_experts_replaced_by,
)
from vllm_atomic_moe.engine.options import ResidentProfiles
from vllm_atomic_moe.engine.refusals import check_layer
from vllm_atomic_moe.engine.routing import RoutingMask
from vllm_atomic_moe.experts.backends import Backend
from vllm_atomic_moe.experts.compensation import SlotCompensation
from vllm_atomic_moe.experts.encoding import encode
from vllm_atomic_moe.experts.op import fused_experts
from vllm_atomic_moe.experts.packing import (
    PackedExperts,
    build_layout,
    projections_of,
    tensor_parallel_share,
    with_slots,
)
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.quantization import Scheme
from vllm_atomic_moe.files.row_formats import Projection

SHARD_PROJECTIONS: dict[str, Projection] = {"w1": "gate", "w2": "down", "w3": "up"}
PLACEHOLDERS = ("w13_weight", "w2_weight")

_loading: ContextVar[tuple[ResidentProfiles, Backend, torch.Tensor]] = ContextVar(
    "atomic_moe_loading"
)


@contextmanager
def packed_experts_for(
    resident: ResidentProfiles, backend: Backend, token_slots: torch.Tensor
) -> Iterator[None]:
    """Within the context, MoE layers that vLLM builds hold only `resident`'s atoms, for `backend`.

    Args:
        resident: the profiles; they take slots in this order.
        backend: the kernel that computes the experts.
        token_slots: int32, on the model's device: the slot of every token of a batch.
    """
    token = _loading.set((resident, backend, token_slots))
    try:
        with routed_experts_replaced_by(AtomicRoutedExperts):
            yield
    finally:
        _loading.reset(token)


class AtomicRoutedExperts(RoutedExperts):
    """Routed experts of any width.

    Attributes:
        packed: the resident atoms, and those that each slot uses.
        token_slots: int32, the slot of every token of the batch; one buffer for all layers, at a
            fixed address for CUDA graphs.
        bound: the kernel's constant arguments, collected after loading.
        backend: the kernel that computes them.
        scheme: how the checkpoint quantizes these experts.
        routing: the experts that the router may choose in each slot.
        compensation: scales and biases of the experts' outputs in each slot; None if no profile
            listed at start has any.
        index: decoder layer index in the checkpoint.
        gathered_slots: int32 [T, 1], slots of all data parallel ranks' tokens while they are
            gathered.
        own_experts: ids of the experts that this rank holds, wholly or in part.
        loaded: (expert, tensor) of each of their tensors that has arrived, as in `tensors`.
        special: the model's own class of experts, if it has one.
    """

    special: str = ""
    packed: PackedExperts
    scheme: Scheme
    token_slots: torch.Tensor
    bound: tuple[Any, ...]
    backend: Backend
    routing: RoutingMask
    compensation: SlotCompensation | None

    def _get_quant_method(
        self, prefix: str, quant_config: Any, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        resident, _, _ = self._loading()
        self.scheme = resident.model.scheme(extract_layer_index(prefix))
        # Do not build vLLM's own method for quantized experts: it requires a kernel of vLLM's. For
        # plain ones among them neither: it ignores GPTQ's `dynamic` at sizes that Marlin lacks.
        resolved = None
        if quant_config and resident.model.row_formats.keys() == {"plain"}:
            resolved = resolve_quant_method(quant_config, self, prefix)
        check_layer(self, resolved)
        return AtomicExpertsMethod(moe_config)

    def _loading(self) -> tuple[ResidentProfiles, Backend, torch.Tensor]:
        loading = _loading.get(None)
        if loading is None:
            raise RuntimeError(
                f"{self.layer_name}: another thread loads with atomic-pruned; build models one "
                "after another"
            )
        return loading

    def pack(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Allocate this rank's share of the packed rows for the profiles being loaded."""
        resident, self.backend, token_slots = self._loading()
        self.register_buffer("token_slots", token_slots, persistent=False)
        model, config = resident.model, self.moe_config
        self.index = extract_layer_index(self.layer_name)
        if self.index not in model.layers:
            raise ValueError(
                f"{self.layer_name}: vLLM builds routed experts here, the checkpoint's MoE layers "
                f"are {list(model.layers)}"
            )
        built = (config.num_experts, config.intermediate_size, hidden_size)
        stored = (model.num_experts, model.intermediate_size, model.hidden_size)
        if built != stored:
            raise ValueError(
                f"{self.layer_name}: vLLM builds experts E, I, H = {list(built)}, the checkpoint "
                f"holds {list(stored)}"
            )
        self.own_experts = frozenset(
            filter(self.expert_map_manager.is_local_expert, range(self.global_num_experts))
        )
        layout = build_layout(self._share(resident.masks(self.index)))
        activation = activation_of(config)
        assert activation is not None, "refused by check_layer"
        self.packed = PackedExperts(
            layout,
            hidden_size,
            dtype,
            storage=self.backend.storage,
            activation=activation,
            has_bias=config.has_bias,
            row_format=self.scheme.row_format(hidden_size, model.intermediate_size),
        )
        self.routing = RoutingMask(resident.routing_masks(self.index))
        self.compensation = self._make_compensation(resident, hidden_size, dtype)
        self.gathered_slots: torch.Tensor | None = None
        self.loaded: set[tuple[int, str]] = set()
        self._parts: dict[tuple[int, Projection], dict[str, torch.Tensor]] = {}

    def _make_compensation(
        self, resident: ResidentProfiles, hidden_size: int, dtype: torch.dtype
    ) -> SlotCompensation | None:
        """Allocate and fill compensation, if a profile has any."""
        if not resident.compensated:
            return None
        own_E = torch.zeros(self.global_num_experts, dtype=torch.bool, device="cpu")
        # The first of the ranks that share an expert adds its bias.
        if self.moe_config.moe_parallel_config.tp_rank == 0:
            own_E[list(self.own_experts)] = True
        made = SlotCompensation(len(resident.compensated), own_E, hidden_size, dtype)
        for slot, profile in enumerate(resident.profiles.values()):
            made.set_slot(slot, profile.compensation.get(self.index))
        return made

    def _share(self, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's share of every profile's mask [E, I]."""
        own_E = torch.zeros(self.global_num_experts, dtype=torch.bool, device="cpu")
        own_E[list(self.own_experts)] = True
        own = {name: mask & own_E[:, None] for name, mask in masks.items()}
        parallel = self.moe_config.moe_parallel_config
        share_EI = tensor_parallel_share(own, parallel.tp_rank, parallel.tp_size)
        return {name: mask & share_EI for name, mask in own.items()}

    def set_slot(self, slot: int, profile: PruningProfile | None) -> None:
        """Make `slot` compute a profile whose atoms are resident, or free it; no weight moves.

        Args:
            slot: 0..SLOTS-1, not used by any request.
            profile: checked; None frees the slot.

        Raises:
            ValueError: the profile excludes experts from routing, or is compensated, in a way not
                prepared at start.
        """
        routable_E = None if profile is None else profile.routable_experts(self.index)
        self.routing.set_slot(slot, routable_E)
        if self.compensation is not None:
            found = None if profile is None else profile.compensation.get(self.index)
            self.compensation.set_slot(slot, found)
        elif profile is not None and profile.compensation:
            raise ValueError(
                "it is compensated and no profile listed at start is; list one that is in "
                "`resident` and restart"
            )
        self.packed.set_slot(slot, None if profile is None else profile.keep[self.index])

    def slots_of(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The slot of every token that this layer computes: int32 [T, 1]."""
        slots = self.gathered_slots
        return self.token_slots[: x_TH.shape[0], None] if slots is None else slots

    def bind(self) -> None:
        """Look up constant arguments; looking up module attributes in each call is slow."""
        packed = self.packed
        self.bound = (
            self.compensation,
            packed.weights,
            packed.scales,
            packed.biases,
            *packed.index,
            packed.widest,
            packed.activation.spec,
            packed.row_format.spec,
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        token_slots = self.token_slots
        moved = super()._apply(fn, recurse)
        self.token_slots = token_slots  # shared by all layers
        if "bound" in self.__dict__:  # buffers are new tensors
            self.bind()
        return moved

    @property
    def weight_bytes(self) -> int:
        """Bytes of the resident experts, including biases of compensated profiles."""
        compensation = self.compensation
        return self.packed.weight_bytes + (compensation.weight_bytes if compensation else 0)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index structures of all slots."""
        found = self.packed.index_bytes + self.routing.index_bytes
        return found + (self.compensation.index_bytes if self.compensation else 0)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        """As vLLM's, but only once: packed rows cannot be loaded again."""
        if PLACEHOLDERS[0] not in self._parameters:
            raise ValueError(
                f"{self.layer_name}: atomic-pruned does not reload or update weights; restart the "
                "server with the new checkpoint and a profile made for it"
            )
        return super().load_weights(weights)

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Slice one checkpoint tensor into the packed rows.

        Arguments and result are those of `RoutedExperts.weight_loader`: w1 is gate, w2 down, w3 up;
        `[I, H]` or `[H, I]` of one expert, or with a leading E of all experts. Experts of other
        ranks are ignored and need not arrive.

        Raises:
            ValueError: the tensor arrives twice or has the wrong shape.
        """
        if shard_id not in SHARD_PROJECTIONS or expert_id >= self.global_num_experts:
            raise ValueError(
                f"{self.layer_name}: {weight_name} arrives as {shard_id!r} of expert {expert_id}; "
                f"wanted w1, w2 or w3 of expert 0 to {self.global_num_experts - 1}"
            )
        projection = SHARD_PROJECTIONS[shard_id]
        first = 0 if loaded_weight.dim() == 3 else expert_id
        matrices = loaded_weight.unbind() if loaded_weight.dim() == 3 else (loaded_weight,)
        taken = False
        for expert, matrix in enumerate(matrices, start=first):
            if expert in self.own_experts:
                self._mark_loaded(expert, f"{projection}_proj", weight_name)
                self.packed.load_expert(expert, projection, matrix)
                taken = True
        return taken if return_success else None

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    def load_bias(
        self, expert: int, projection: Projection, bias: torch.Tensor, weight_name: str
    ) -> None:
        """Load one expert's bias; only the first tensor parallel rank takes that of down.

        Raises:
            ValueError: it arrives twice, has the wrong shape, or is not expected.
        """
        if expert not in self.own_experts:
            return
        if not self.packed.biases:
            raise ValueError(
                f"{self.layer_name}: {weight_name} arrives, vLLM builds no biases here"
            )
        self._mark_loaded(expert, f"{projection}_proj.bias", weight_name)
        if projection != "down" or self.moe_config.moe_parallel_config.tp_rank == 0:
            self.packed.load_bias(expert, projection, bias)

    def load_part(
        self, name: str, expert: int, projection: Projection, quantity: str, part: torch.Tensor
    ) -> None:
        """Load one part of a matrix; once complete, the parts become packed rows.

        Args:
            name: of the tensor.
            expert: its expert; other ranks' experts are ignored.
            projection: gate, up or down.
            quantity: one of `Scheme.parts`, or bias.
            part: the tensor, as in the checkpoint.

        Raises:
            ValueError: the part arrives twice or does not fit the others.
        """
        if expert not in self.own_experts:
            return
        if quantity == "bias":
            self.load_bias(expert, projection, part, name)
            return
        if self.scheme.parts == (quantity,):  # plain
            self._mark_loaded(expert, f"{projection}_proj", name)
            self.packed.load_expert(expert, projection, part)
            return
        self._mark_loaded(expert, f"{projection}_proj.{quantity}", name)
        if quantity not in self.scheme.parts:
            raise ValueError(
                f"{name}: {quantity} arrives, the experts of this layer are quantized by "
                f"{', '.join(self.scheme.parts)}; fetch the checkpoint again"
            )
        parts = self._parts.setdefault((expert, projection), {})
        parts[quantity] = part
        if len(parts) < len(self.scheme.parts):
            return
        sizes = self.packed.hidden_size, self.packed.layout.intermediate_size
        try:
            encoded = encode(self.scheme, projection, parts, *sizes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; fetch the checkpoint again") from None
        self.packed.load_encoded(expert, projection, encoded)
        del self._parts[expert, projection]

    def mark_loaded(self, tensor: str, weight_name: str) -> None:
        """Note that a tensor of all experts has arrived.

        Raises:
            ValueError: it arrives twice.
        """
        for expert in self.own_experts:
            self._mark_loaded(expert, tensor, weight_name)

    def _mark_loaded(self, expert: int, tensor: str, weight_name: str) -> None:
        if (expert, tensor) in self.loaded:
            raise ValueError(
                f"{self.layer_name}: {tensor} of expert {expert} arrives twice "
                f"({weight_name}); the checkpoint holds it in two tensors"
            )
        self.loaded.add((expert, tensor))

    @property
    def tensors(self) -> list[str]:
        """The tensors of an expert that must arrive."""
        names, biases = [], []
        for projection in projections_of(self.packed.activation.gated):
            name, plain = f"{projection}_proj", self.packed.row_format.of(projection).plain
            names += [name] if plain else [f"{name}.{part}" for part in self.scheme.parts]
            biases += [f"{name}.bias"] if self.packed.biases else []
        return names + biases

    def missing(self) -> list[str]:
        """Expert tensors that have not arrived, by name."""
        return [
            f"layers.{self.index}.experts.{expert}.{tensor}"
            for expert in sorted(self.own_experts)
            for tensor in self.tensors
            if (expert, tensor) not in self.loaded
        ]


class AtomicExpertsMethod(FusedMoEMethodBase):
    """Computes packed experts with `torch.ops.atomic_moe.fused_experts`."""

    def create_weights(
        self,
        layer: AtomicRoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.pack(hidden_size, params_dtype)
        # vLLM finds the experts to load by these names. They hold nothing; loading removes them.
        for name in PLACEHOLDERS:
            placeholder = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            placeholder.weight_loader = layer.weight_loader  # type: ignore[attr-defined]
            layer.register_parameter(name, placeholder)

    def process_weights_after_loading(self, layer: AtomicRoutedExperts) -> None:
        for name in PLACEHOLDERS:
            delattr(layer, name)
        layer.routing.prepare(layer.e_score_correction_bias)
        layer.bind()
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)

    def get_fused_moe_quant_config(self, layer: AtomicRoutedExperts) -> Any:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: AtomicRoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        compensation, weights, scales, biases, *index, widest, activation, rows = layer.bound
        slots = layer.slots_of(x)
        ids = with_slots(topk_ids, slots)
        if layer.apply_router_weight_on_input:  # only with one expert per token
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        added = None
        if compensation is not None:
            topk_weights, added = compensation(topk_weights, topk_ids, slots)
        out = fused_experts(
            x,
            weights,
            scales,
            biases,
            *index,
            topk_weights,
            ids,
            widest,
            activation,
            rows,
            layer.backend.name,
        )
        return out if added is None else out.add_(added)
