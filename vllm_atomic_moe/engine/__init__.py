"""The engine's side: the loader, the layer, routing, the profile of a request, and refusals."""

from collections.abc import Callable

LOAD_FORMAT = "atomic-pruned"


def register_load_format(on_front_end: Callable[[], None]) -> None:
    """Add `--load-format atomic-pruned` to vLLM's loader registry, and profiles to its engines.

    Args:
        on_front_end: called in a process that is about to admit requests to a pruned model.
    """
    from vllm.model_executor.model_loader import register_model_loader

    from vllm_atomic_moe.engine.attach import attach_to_engines, attach_to_front_ends
    from vllm_atomic_moe.engine.loader import AtomicPrunedModelLoader

    register_model_loader(LOAD_FORMAT)(AtomicPrunedModelLoader)
    attach_to_engines()
    attach_to_front_ends(on_front_end)
