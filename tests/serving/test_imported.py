"""A profile of every import format is served with the masks of its file."""

from __future__ import annotations

from typer.testing import CliRunner

from tests.checkpoints import make_checkpoint
from tests.import_examples import write_examples
from tests.serving.conftest import (
    engine,
    masked_transformers_logprobs,
    mixed_logprobs,
)
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.files.profiles import PruningProfile

FORMATS = {"pruned-experts", "shape", "ranked", "heapr", "mask"}


def test_every_format_serves(tmp_path):
    model = tmp_path / "model"
    info = make_checkpoint("qwen3_moe", model)
    examples = write_examples(info, tmp_path)
    assert {example.format for example in examples.values()} == FORMATS
    names = {name: f"imported-{number}" for number, name in enumerate(examples)}
    for key, example in examples.items():
        result = CliRunner().invoke(
            app,
            [
                "import", *example.arguments(), "--model", str(model),
                "-o", str(model / "atomic_profiles"), "--name", names[key],
            ],
        )  # fmt: skip
        assert result.exit_code == 0, result.output

    first = next(iter(names.values()))
    extra = {"active": first, "resident": "all"}
    with engine(model, load_format="atomic-pruned", model_loader_extra_config=extra) as llm:
        found = mixed_logprobs(llm, list(names.values()))
    for key, example in examples.items():
        profile = PruningProfile(names[key], example.keep, example.routable)
        wanted = masked_transformers_logprobs(model, profile)
        assert (found[names[key]] - wanted).abs().max() < 1e-4, key
    spread = max((one - other).abs().max() for one in found.values() for other in found.values())
    assert spread > 0.01, "all formats say the same: the test is blind"
