"""Measure the trained model as it is shipped, and write `model_card.json`.

Two questions decide whether the model is fit for a pruning demo: has it learned every domain
(held-out perplexity), and do its experts divide the domains among them (routing shares and the
mutual information between domain and expert). The weights are the shipped bfloat16 ones, the
arithmetic is float32.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from kinds import KINDS, Kind
from layout import BUILD_DIR, DEMO_DIR, DOMAINS
from perplexity import encode, encode_split, perplexities
from tokenizers import Tokenizer
from transformers import PreTrainedModel

THREADS = 2


@contextmanager
def counting_routes(kind: Kind, model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yield counts [layers, experts] that grow with every token routed inside the context."""
    experts = model.config.num_experts
    counts_LE = torch.zeros(model.config.num_hidden_layers, experts, dtype=torch.float64)

    def count(layer: int, output: tuple[torch.Tensor, ...]) -> None:
        counts_LE[layer] += torch.bincount(output[2].flatten(), minlength=experts)

    handles = [
        getattr(layer.mlp, kind.router).register_forward_hook(
            lambda module, inputs, output, index=index: count(index, output)
        )
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield counts_LE
    finally:
        for handle in handles:
            handle.remove()


def routing_shares(
    kind: Kind, model: PreTrainedModel, tokens: dict[str, np.ndarray]
) -> torch.Tensor:
    """Share of the routed slots that each expert gets, [layers, domains, experts]."""
    shares = []
    for domain in DOMAINS:
        with counting_routes(kind, model) as counts_LE:
            perplexities(model, {domain: tokens[domain]})
        shares.append(counts_LE / counts_LE.sum(-1, keepdim=True))
    return torch.stack(shares, dim=1)


def mutual_information(shares_LDE: torch.Tensor) -> torch.Tensor:
    """Bits per layer that a routed slot tells about its domain, the domains being equally likely.

    0 means that every domain is routed alike; log2 of the number of domains is the most.
    """
    mean_LDE = shares_LDE.mean(1, keepdim=True)
    terms_LDE = torch.xlogy(shares_LDE, shares_LDE) - torch.xlogy(shares_LDE, mean_LDE)
    return terms_LDE.sum(-1).mean(1) / np.log(2)


def rounded(values: dict[str, float]) -> dict[str, float]:
    """The same figures with three decimals."""
    return {name: round(value, 3) for name, value in values.items()}


def analyse(kind: Kind, model_dir: Path, corpus_dir: Path, data_dir: Path) -> dict:
    """Perplexity on the whole test split and on the committed text, and the routing."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    model = kind.model.from_pretrained(model_dir, dtype=torch.float32).eval()
    test_tokens = encode_split(tokenizer, corpus_dir, "test")
    heldout_paths = {domain: data_dir / f"{domain}.heldout.txt" for domain in DOMAINS}
    heldout_tokens = {
        domain: encode(tokenizer, path.read_text(encoding="utf-8"))
        for domain, path in heldout_paths.items()
    }
    shares_LDE = routing_shares(kind, model, test_tokens)
    information_L = mutual_information(shares_LDE)
    return {
        "test_tokens": {domain: len(ids) for domain, ids in test_tokens.items()},
        "heldout_tokens": {domain: len(ids) for domain, ids in heldout_tokens.items()},
        "test_perplexity": rounded(perplexities(model, test_tokens)),
        "heldout_perplexity": rounded(perplexities(model, heldout_tokens)),
        "routing": {
            "share_by_layer_domain_expert": shares_LDE.round(decimals=4).tolist(),
            "mutual_information_bits": information_L.round(decimals=3).tolist(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=BUILD_DIR / "corpus")
    parser.add_argument("--training", type=Path, default=BUILD_DIR / "training.json")
    parser.add_argument("--demo", type=Path, default=DEMO_DIR, help="folder of model/ and data/")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    training = json.loads(arguments.training.read_text(encoding="utf-8"))
    card = {
        "domains": DOMAINS,
        "corpus": json.loads((arguments.corpus / "corpus.json").read_text(encoding="utf-8")),
        "training": training,
        **analyse(
            KINDS[training["kind"]],
            arguments.demo / "model",
            arguments.corpus,
            arguments.demo / "data",
        ),
    }
    content = json.dumps(card, indent=1) + "\n"
    (arguments.demo / "model_card.json").write_text(content, encoding="utf-8")
    print("perplexity on the test split:", card["test_perplexity"], flush=True)
    print("bits of routing per layer:", card["routing"]["mutual_information_bits"], flush=True)


if __name__ == "__main__":
    main()
