"""`--load-format atomic-pruned`: serve the original checkpoint without the pruned atoms.

The order matters. The loader checks options, profiles and configuration before it reads any weight;
it builds the model with packed experts; vLLM's own loader streams the checkpoint through them; then
every expert tensor must have arrived exactly once. Each rank does this for its own layers and
experts. At the end the ranks compare the profiles that they read, and the first one reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_atomic_moe.engine.exported import packed_rows_taken_by, reading_from
from vllm_atomic_moe.engine.options import (
    OPTION_KEYS,
    LoaderOptions,
    ResidentProfiles,
    profile_directory,
    select_profiles,
)
from vllm_atomic_moe.experts.backends import Backend, choose_backend
from vllm_atomic_moe.experts.encoding import dense_bytes
from vllm_atomic_moe.files.checkpoint import describe_checkpoint, resolve_model
from vllm_atomic_moe.files.export_format import weights_directory

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts

# Under vLLM's logger, so that its handlers and level apply.
logger = init_logger(f"vllm.{__name__}")

DIGEST_KEY = "atomic_moe"
PADDING_TOKENS = 64  # vLLM rounds batches up to a multiple of its ranks


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Decisions made before any weight is read.

    Attributes:
        directory: the checkpoint.
        profiles: the directory of profile files.
        resident: the profiles to hold in memory, and the checkpoint's description.
        backend: the kernel that computes the experts.
        own_layers: the MoE layers that this pipeline rank builds, in order.
    """

    directory: Path
    profiles: Path
    resident: ResidentProfiles
    backend: Backend
    own_layers: list[int]


class AtomicPrunedModelLoader(BaseModelLoader):
    """Loads an MoE checkpoint with packed experts, everything else through vLLM's own loader.

    Attributes:
        options: of the load format.
        inner: vLLM's loader for `options.inner_format`.
        plan: the decisions of `load_model`; `create_model` and `load_weights` follow it.
        token_slots: int32, the slot of every token of a batch; one buffer for all layers.
    """

    plan: LoadPlan
    token_slots: torch.Tensor

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        with _refusals_said_plainly():
            self.options = LoaderOptions.parse(load_config.model_loader_extra_config)
            self.inner = self._make_inner_loader()

    def download_model(self, model_config: ModelConfig) -> None:
        """Fetch the checkpoint, its configuration, its `atomic_profiles/` and named profiles."""
        self._profiles(self._checkpoint(model_config))

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Load the model with the profiles that the options list, one of them active.

        Raises:
            ValueError: an option, a profile or a feature is refused (before any weight is read),
                or the checkpoint's experts are incomplete.
        """
        with _refusals_said_plainly():
            if _is_draft(model_config):
                return super().load_model(vllm_config, model_config, prefix)
            self.plan = self._make_plan(vllm_config, model_config)
            resident = self.plan.resident
            digest = resident.digest()
            # The row formats too: a refit changes them under the same path and configuration.
            formats = resident.model.row_formats
            _add_to_cache_keys(vllm_config, f"{self.plan.backend.name} {digest} {formats}")
            device = torch.device(vllm_config.device_config.device)
            self.token_slots = torch.zeros(
                _most_tokens(vllm_config), dtype=torch.int32, device=device
            )
            model = super().load_model(vllm_config, model_config, prefix)
            layers = packed_layers(model)
            gated = all(layer.packed.activation.gated for layer in layers)
            dense = dense_bytes(resident.model, model_config.dtype.itemsize, gated)
            # Not at the top: every vLLM process imports this module, few load a pruned model.
            from vllm_atomic_moe.engine import worker

            plan = self.plan
            profiles = worker.RankProfiles(
                resident, layers, self.token_slots, plan.directory, plan.profiles, dense
            )
            setattr(model, worker.ATTRIBUTE, profiles)
            held = sum(layer.weight_bytes for layer in layers)
            _report(resident, dense, _bytes_of_ranks(digest, held))
            return model

    def create_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Build the model with packed experts in place of vLLM's, except in drafts."""
        if _is_draft(model_config):
            return super().create_model(vllm_config, model_config, prefix)
        from vllm_atomic_moe.engine.compat import import_model_class
        from vllm_atomic_moe.engine.layer import packed_experts_for

        import_model_class(model_config)
        with packed_experts_for(self.plan.resident, self.plan.backend, self.token_slots):
            return super().create_model(vllm_config, model_config, prefix)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Stream the checkpoint through the packed experts and check that all of it arrived.

        Drafts are loaded whole, also a prediction head, which is among the model's own tensors.
        """
        if _is_draft(model_config):
            folder = weights_directory(self._checkpoint(model_config))
            self.inner.load_weights(model, reading_from(folder, model_config))
            return
        from vllm_atomic_moe.engine.expert_tensors import experts_taken_by
        from vllm_atomic_moe.engine.routing import mask_routers

        plan, layers = self.plan, packed_layers(model)
        built = sorted(layer.index for layer in layers)
        if built != plan.own_layers:
            raise ValueError(
                f"vLLM builds packed experts in layers {built}, the checkpoint's MoE layers are "
                f"{plan.own_layers}; this architecture builds its experts in a way that is not "
                "supported"
            )
        mask_routers(model, layers, plan.resident)
        stored = plan.resident.model.stored
        if stored is None:
            with experts_taken_by(layers, model, plan.resident.model):
                self.inner.load_weights(model, model_config)
        else:
            folder = weights_directory(plan.directory)
            with packed_rows_taken_by(layers, model, stored):
                self.inner.load_weights(model, reading_from(folder, model_config))
        missing = [name for layer in layers for name in layer.missing()]
        if missing:
            raise ValueError(
                f"{model_config.model}: {len(missing)} expert tensors are missing: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}; "
                "fetch the checkpoint again"
            )

    def _make_plan(self, vllm_config: VllmConfig, model_config: ModelConfig) -> LoadPlan:
        """Check configuration, options and profiles, cheapest first."""
        from vllm_atomic_moe.engine.refusals import check_config, unverified

        check_config(vllm_config)
        for feature in unverified(vllm_config.parallel_config):
            logger.warning("Never tried with packed experts: %s", feature)
        directory = self._checkpoint(model_config)
        checkpoint = describe_checkpoint(directory)
        profiles = self._profiles(directory)
        backend = self._choose_backend(vllm_config, model_config.dtype)
        return LoadPlan(
            directory,
            profiles,
            select_profiles(self.options, profiles, checkpoint),
            backend,
            _layers_of_rank(vllm_config, model_config, checkpoint.layers),
        )

    def _choose_backend(self, vllm_config: VllmConfig, dtype: torch.dtype) -> Backend:
        from vllm_atomic_moe.engine.refusals import check_graphs

        device = torch.device(vllm_config.device_config.device)
        load_device = self.load_config.device
        if load_device and torch.device(load_device).type != device.type:
            raise ValueError(
                f"the load config's device is {load_device}, the model runs on {device}; "
                "atomic-pruned packs the experts where they run: leave it out"
            )
        backend = choose_backend(device, dtype, self.options.kernel)
        check_graphs(vllm_config, backend)
        say = logger.warning if backend.fallback else logger.info
        say("Expert kernel: %s, %s", backend.name, backend.reason)
        return backend

    def _make_inner_loader(self) -> BaseModelLoader:
        config = replace(
            self.load_config,
            load_format=self.options.inner_format,
            model_loader_extra_config=dict(self.options.inner),
        )
        try:
            return get_model_loader(config)
        except ValueError as error:
            raise ValueError(
                f"{error}; keys of atomic-pruned are {', '.join(OPTION_KEYS)}, others go to vLLM's "
                f"loader for inner_format {self.options.inner_format!r}"
            ) from error

    def _profiles(self, checkpoint: Path) -> Path:
        return profile_directory(self.options.profiles, checkpoint, self.load_config.download_dir)

    def _checkpoint(self, model_config: ModelConfig) -> Path:
        return resolve_model(
            model_config.model, model_config.revision, self.load_config.download_dir
        )


def _is_draft(model_config: ModelConfig) -> bool:
    """Whether vLLM loads a model that proposes tokens, not the served one."""
    return model_config.runner_type == "draft"


@contextmanager
def _refusals_said_plainly() -> Iterator[None]:
    """Log a loader's error in one line, since vLLM wraps it into tracebacks of two processes."""
    try:
        yield
    except ValueError as error:
        logger.error("atomic-pruned: %s", error)
        raise


def _most_tokens(vllm_config: VllmConfig) -> int:
    """Maximum number of tokens in a batch of one rank, padding included."""
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_batched_tokens, graphs) + PADDING_TOKENS


def packed_layers(model: nn.Module) -> list[AtomicRoutedExperts]:
    """The model's packed MoE layers, in order."""
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts

    return [module for module in model.modules() if isinstance(module, AtomicRoutedExperts)]


def _add_to_cache_keys(vllm_config: VllmConfig, digest: str) -> None:
    """Add to the key of vLLM's compile caches, which lacks load format and profiles."""
    if not isinstance(vllm_config.additional_config, dict):
        raise ValueError(
            f"additional_config is {type(vllm_config.additional_config).__name__}, "
            "atomic-pruned needs a dict to key vLLM's compile caches; pass a JSON object"
        )
    vllm_config.additional_config[DIGEST_KEY] = digest


def _layers_of_rank(
    vllm_config: VllmConfig, model_config: ModelConfig, stored: Sequence[int]
) -> list[int]:
    """The checkpoint's MoE layers that this pipeline rank builds.

    The last rank has all layers beyond those that vLLM counts.
    """
    start, end = model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    if end == model_config.get_total_num_hidden_layers():
        end = max(end, *stored) + 1
    return [layer for layer in stored if start <= layer < end]


def _bytes_of_ranks(digest: str, held: int) -> list[int]:
    """`held` of every rank of this replica.

    Raises:
        ValueError: `digest` differs between ranks.
    """
    world = get_world_group()
    ranks = [(digest, held)] * world.world_size
    if world.world_size > 1:
        torch.distributed.all_gather_object(ranks, (digest, held), group=world.cpu_group)
    if len({digest for digest, _ in ranks}) > 1:
        raise ValueError(
            "the ranks read different profiles; give all of them the same files, and do not change "
            "them while the server starts"
        )
    return [held for _, held in ranks]


def _report(resident: ResidentProfiles, dense: int, rank_bytes: Sequence[int]) -> None:
    """Log once what memory the pruning saves.

    Args:
        resident: the profiles held in memory.
        dense: bytes of all experts, unpruned, as the checkpoint encodes them.
        rank_bytes: bytes on every rank of this replica, padding included.
    """
    if not get_world_group().is_first_rank:
        return
    held = sum(rank_bytes)
    logger.info(
        "Expert weights: %s dense, %s resident (%.1f %%), %s saved",
        _mib(dense),
        _mib(held),
        100 * held / dense,
        _mib(dense - held),
    )
    if len(rank_bytes) > 1:
        logger.info("Resident on each rank: %s", ", ".join(map(_mib, rank_bytes)))
    for name, profile in resident.profiles.items():
        logger.info(
            "Profile %s: %.1f %% of atoms kept, %s%s",
            name,
            100 * profile.kept,
            _mib(profile.kept_atoms * dense // resident.model.atoms),
            ", active" if name == resident.active else "",
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB ({size} bytes)"
