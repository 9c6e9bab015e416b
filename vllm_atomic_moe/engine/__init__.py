"""The engine's side: the loader, the layer, routing, the profile of a request, and refusals."""

LOAD_FORMAT = "atomic-pruned"


def register_load_format() -> None:
    """Tell vLLM's loader registry about `--load-format atomic-pruned`, and its engines about
    profiles.
    """
    from vllm.model_executor.model_loader import register_model_loader

    from vllm_atomic_moe.engine.attach import attach_to_engines
    from vllm_atomic_moe.engine.loader import AtomicPrunedModelLoader

    register_model_loader(LOAD_FORMAT)(AtomicPrunedModelLoader)
    attach_to_engines()
