"""The vLLM internals we lean on: one probe each, which names the one that moved."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import torch

from vllm_atomic_moe.serving import compat

METHOD = compat.FusedMoEMethodBase
EXPERTS = compat.RoutedExperts


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (EXPERTS._get_quant_method, ["self", "prefix", "quant_config", "moe_config"]),
        (
            EXPERTS.weight_loader,
            [
                "self",
                "param",
                "loaded_weight",
                "weight_name",
                "shard_id",
                "expert_id",
                "return_success",
            ],
        ),
        (
            METHOD.create_weights,
            [
                "self",
                "layer",
                "num_experts",
                "hidden_size",
                "intermediate_size_per_partition",
                "params_dtype",
                "extra_weight_attrs",
            ],
        ),
        (
            METHOD.apply,
            [
                "self",
                "layer",
                "x",
                "topk_weights",
                "topk_ids",
                "shared_experts",
                "shared_experts_input",
            ],
        ),
        (METHOD.get_fused_moe_quant_config, ["self", "layer"]),
        (
            compat.FusedMoERouter.select_experts,
            ["self", "hidden_states", "router_logits", "topk_indices_dtype", "input_ids"],
        ),
        (compat.resolve_quant_method, ["quant_config", "layer", "prefix"]),
        (compat.extract_layer_index, ["layer_name", "num_attn_module"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signature(function, wanted):
    assert list(inspect.signature(function).parameters) == wanted, function.__qualname__


@pytest.mark.parametrize(
    "name",
    [
        "num_experts",
        "hidden_dim",
        "hidden_dim_unpadded",
        "intermediate_size",
        "moe_parallel_config",
        "activation",
        "has_bias",
        "in_dtype",
        "router_logits_dtype",
    ],
)
def test_moe_config_still_has(name):
    assert name in compat.FusedMoEConfig.__dataclass_fields__


@pytest.mark.parametrize(
    "name",
    [
        "swiglu_limit",
        "swiglu_alpha",
        "swiglu_beta",
        "apply_router_weight_on_input",
        "expert_map_manager",
        "global_num_experts",
        "layer_name",
        "moe_config",
        "e_score_correction_bias",
    ],
)
def test_routed_experts_still_sets(name):
    assert f"self.{name} =" in inspect.getsource(EXPERTS.__init__)


def test_ranks_are_still_told_by_these_names():
    from vllm.model_executor.layers.fused_moe import config, expert_map_manager

    parallel = config.FusedMoEParallelConfig
    assert {"tp_rank", "tp_size"} <= parallel.__dataclass_fields__.keys()
    assert isinstance(parallel.is_sequence_parallel, property)
    own_experts = expert_map_manager.ExpertMapManager.get_local_expert_ids
    assert list(inspect.signature(own_experts).parameters) == ["self"]


def test_eager_pipelines_still_lack_their_warm_up_on_cpu():
    """It makes the buffers of the second stage: once it runs, serve them (`check_config`)."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    source = inspect.getsource(CPUModelRunner.warming_up_model)
    assert "mode == CompilationMode.NONE:\n            return" in source


def test_runner_still_asks_its_router_by_that_name():
    source = inspect.getsource(compat.MoERunner)
    assert "self.router = router" in source
    assert "self.routed_experts = routed_experts" in source
    assert source.count("self.router.select_experts(") == 1


# What a routing mask is refused for, by the attribute it is seen in: router -> attributes.
ROUTER_ATTRIBUTES = {
    "CPURouter": [
        "scoring_func",
        "e_score_correction_bias",
        "use_grouped_topk",
        "num_expert_group",
        "topk_group",
        "custom_routing_function",
        "_hash_indices_table",
    ],
    "FusedTopKRouter": ["scoring_func"],
    "FusedTopKBiasRouter": ["scoring_func", "e_score_correction_bias", "_hash_indices_table"],
    "GroupedTopKRouter": [
        "scoring_func",
        "e_score_correction_bias",
        "num_expert_group",
        "topk_group",
    ],
}


@pytest.mark.parametrize("router", compat.known_routers(), ids=lambda router: router.__name__)
def test_known_router_still_sets(router):
    for name in ROUTER_ATTRIBUTES[router.__name__]:
        assert f"self.{name} =" in inspect.getsource(router.__init__), name
    assert router.select_experts is compat.FusedMoERouter.select_experts
    assert "self.top_k =" in inspect.getsource(router.__base__.__init__)
    assert "self.bias_vl:" in inspect.getsource(compat.FusedMoERouter.__init__)


def test_known_routers_choose_by_logits_and_bias_only():
    """A new argument of a router may be another way to choose: read it before widening this."""
    arguments = {
        name
        for router in compat.known_routers()
        for name in inspect.signature(router.__init__).parameters
    }
    assert arguments == {
        "self",
        "top_k",
        "global_num_experts",
        "eplb_state",
        "renormalize",
        "scoring_func",
        "routed_scaling_factor",
        "use_grouped_topk",
        "num_expert_group",
        "topk_group",
        "e_score_correction_bias",
        "custom_routing_function",
        "hash_indices_table",
        "num_fused_shared_experts",
        "shared_expert_weight",
        "bias_vl",
        "image_sentinel_lo",
        "skip_padding",
    }


def test_replacement_is_for_the_block_only():
    class Mine(EXPERTS):
        def __init__(self, *arguments):
            torch.nn.Module.__init__(self)

    with compat.routed_experts_replaced_by(Mine):
        assert type(EXPERTS("anything")) is Mine
        with pytest.raises(ValueError, match=r"already replaced by .*Mine"):
            compat.routed_experts_replaced_by(Mine).__enter__()
    from vllm.model_executor.custom_op import op_registry_oot

    assert "RoutedExperts" not in op_registry_oot


def test_supported_range_is_the_one_probed():
    assert version("vllm").startswith("0.32."), "probe anew, then widen the range in pyproject.toml"
