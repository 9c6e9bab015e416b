"""The API server's side: model names, the admin endpoint, its access and metrics, its client."""

import functools


@functools.cache
def attach_to_api_servers() -> None:
    """Let vLLM's API servers offer the profiles of the model that they serve."""
    from vllm_atomic_moe.control.names import ProfileHeader, ServerProfiles
    from vllm_atomic_moe.engine.attach import attach_to_api_servers

    attach_to_api_servers(ServerProfiles.start, ProfileHeader)
