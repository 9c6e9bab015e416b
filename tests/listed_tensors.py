"""The tensors of tiny models that transformers has no class of: those that vLLM's models load.

Of three layers, with sizes as in `tests/architectures.py`: 4 heads of 32, 2 of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns)}


def norms(*names: str, size: int = 128) -> Shapes:
    return {f"{name}.weight": (size,) for name in names}


def mlp(name: str, size: int) -> Shapes:
    first = linear(f"{name}.gate_proj", size, 128) | linear(f"{name}.up_proj", size, 128)
    return first | linear(f"{name}.down_proj", 128, size)


def attention(name: str) -> Shapes:
    query = linear(f"{name}.q_proj", 128, 128) | linear(f"{name}.o_proj", 128, 128)
    return query | linear(f"{name}.k_proj", 64, 128) | linear(f"{name}.v_proj", 64, 128)


def routed(bias: str = "") -> Shapes:
    """A router, its correction bias by name, eight experts one by one and a shared one."""
    shapes = linear("mlp.gate", 8, 128) | mlp("mlp.shared_experts", 64)
    for expert in range(8):
        shapes |= mlp(f"mlp.experts.{expert}", 64)
    return shapes | ({f"mlp.{bias}": (8,)} if bias else {})


def decoder(layer: Callable[[int], Shapes], embedding: str = "embed_tokens") -> Shapes:
    shapes = linear(f"model.{embedding}", 256, 128) | linear("lm_head", 256, 128)
    shapes |= norms("model.norm")
    for index in range(3):
        block = layer(index) | norms("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
    return shapes


def bailing(bias: str = "") -> Shapes:
    """`bailing_moe.py`, `sarvam.py` and `param2moe.py`: the first layer is dense."""

    def layer(index: int) -> Shapes:
        shapes = linear("attention.query_key_value", (4 + 2 * 2) * 32, 128)
        shapes |= linear("attention.dense", 128, 128)
        return shapes | (routed(bias) if index else mlp("mlp", 128))

    return decoder(layer, "word_embeddings")


def step3() -> Shapes:
    """`step3_text.py`: one head of keys and values; the first layer is dense."""

    def layer(index: int) -> Shapes:
        shapes = linear("self_attn.q_proj", 64, 128) | linear("self_attn.wq", 128, 64)
        shapes |= linear("self_attn.k_proj", 32, 128) | linear("self_attn.v_proj", 32, 128)
        shapes |= linear("self_attn.o_proj", 128, 128) | norms("self_attn.inter_norm", size=64)
        if not index:
            return shapes | mlp("mlp", 128)
        experts = {name: (8, *shape) for name, shape in mlp("moe", 64).items()}
        return shapes | experts | linear("moe.gate", 8, 128) | mlp("share_expert", 96)

    return decoder(layer)


def step() -> Shapes:
    """`step3p5.py`: the first layer is dense."""

    def layer(index: int) -> Shapes:
        shapes = attention("self_attn") | norms("self_attn.q_norm", "self_attn.k_norm", size=32)
        shapes |= linear("self_attn.g_proj", 4, 128)
        if not index:
            return shapes | mlp("mlp", 128)
        experts = {name: (8, *shape) for name, shape in mlp("moe", 64).items()}
        router = linear("moe.gate", 8, 128) | {"moe.router_bias": (8,)}
        return shapes | experts | router | mlp("share_expert", 96)

    return decoder(layer)


def pangu() -> Shapes:
    """`openpangu.py` without latent attention: the first layer is dense."""

    def layer(index: int) -> Shapes:
        shapes = attention("self_attn") | norms("pre_mlp_layernorm", "post_mlp_layernorm")
        return shapes | (routed("e_score_correction_bias") if index else mlp("mlp", 128))

    return decoder(layer)


def horizon() -> Shapes:
    """`k2_horizon.py` without experts in attention: the first layer is dense."""

    def layer(index: int) -> Shapes:
        shapes = attention("self_attn") | linear("self_attn.gate_proj", 128, 128)
        shapes |= norms("self_attn.q_norm", size=128) | norms("self_attn.k_norm", size=64)
        return shapes | (routed("gate.bias") if index else mlp("mlp", 128))

    return decoder(layer)
