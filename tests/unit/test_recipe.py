"""The demo's recipe trains every kind of model that it knows; tiny here, and for two steps."""

from __future__ import annotations

import pytest
import torch

from tests.documents import ROOT


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "deploy/demo/recipe")
    import analyse
    import kinds
    import train

    return analyse, kinds, train


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_every_kind_learns_and_its_routes_are_counted(recipe, name):
    analyse, kinds, train = recipe
    kind = kinds.KINDS[name]
    sizes = {"layers": 2, "hidden_size": 32, "head_size": 8, "experts": 4, "expert_width": 32}
    plan = kinds.Plan(steps=kind.steps, experts_per_token=2, **sizes)
    torch.manual_seed(0)
    model = train.initial_model(kind, plan, kinds.model_config(kind, plan, 64, 0))
    optimizer = train.make_optimizer(plan, model)
    decayed, kept = (group["params"] for group in optimizer.param_groups)
    assert len(decayed) + len(kept) == len(list(model.parameters()))
    assert all((it is not bias) for it in decayed for bias in biases(model))
    batch = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    first, second = (train.train_step(plan, model, optimizer, batch)["loss"] for _ in range(2))
    assert second < first
    with analyse.counting_routes(kind, model) as counts_LE:
        model(input_ids=batch)
    assert counts_LE.sum(1).tolist() == [batch.numel() * plan.experts_per_token] * plan.layers


def biases(model):
    return [it for name, it in model.named_parameters() if name.endswith("bias")]


def test_the_demo_is_what_the_recipe_describes(recipe):
    _, kinds, _ = recipe
    from transformers import AutoConfig

    kind = kinds.KINDS["qwen3"]
    made = kinds.model_config(kind, kinds.Plan(kind.steps), 4096, 0).to_dict()
    shipped = AutoConfig.from_pretrained(ROOT / "deploy/demo/model").to_dict()
    differ = {name for name in made.keys() | shipped.keys() if made.get(name) != shipped.get(name)}
    assert differ <= {"architectures", "dtype", "_name_or_path", "transformers_version"}
