"""Train a small MoE from scratch, in float32 on two threads: the demo or another kind.

Pruning experts of random weights shows nothing, and a pretrained MoE is too large to ship. This
one is small enough to train in about 35 minutes on two cores and still large enough that its
experts specialize. The number of threads is part of the recipe: it decides the order of sums.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from kinds import KINDS, Kind, Plan, model_config
from layout import BUILD_DIR, DEMO_DIR, DOMAINS, END_OF_TEXT, WINDOW_TOKENS
from perplexity import encode_split, perplexities
from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

THREADS = 2
LOG_EVERY, VALIDATE_EVERY, VALIDATE_STRIDE = 50, 500, 8
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | join('\\n') }}"
EXPERT_IMPLEMENTATION = "grouped_mm"


def initial_model(kind: Kind, plan: Plan, config: PretrainedConfig) -> PreTrainedModel:
    """A new model; what writes to the residual stream starts smaller, by its number of writers."""
    model = kind.model(config)
    model.set_experts_implementation(EXPERT_IMPLEMENTATION)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.mul_(1 / math.sqrt(2 * plan.layers))
    return model


def make_optimizer(plan: Plan, model: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves norms and biases alone."""
    matrices, vectors = [], []
    for name, parameter in model.named_parameters():
        # The biases of all experts are one matrix.
        is_matrix = parameter.dim() >= 2 and not name.endswith("bias")
        (matrices if is_matrix else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rate = plan.learning_rate
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then half a cosine down to a share of the peak."""
    decay_steps = max(1, plan.steps - plan.warmup_steps)
    progress = max(0, step - plan.warmup_steps) / decay_steps
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    floor = plan.final_learning_rate_share
    return plan.learning_rate * min(1, step / plan.warmup_steps) * (floor + (1 - floor) * cosine)


def balance_loss(plan: Plan, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Load-balancing loss of the Switch Transformer, per layer; 1.0 is a perfect balance.

    Source: Fedus et al. 2021, equation 4, with the load counted over the top-k slots.
    """
    total = torch.zeros(())
    for logits_TE in router_logits:
        probabilities_TE = logits_TE.float().softmax(-1)
        chosen_TK = probabilities_TE.topk(plan.experts_per_token, -1).indices
        load_E = torch.bincount(chosen_TK.flatten(), minlength=plan.experts) / chosen_TK.numel()
        total = total + plan.experts * (load_E * probabilities_TE.mean(0)).sum()
    return total / len(router_logits)


def draw_batch(tokens: dict[str, np.ndarray], generator: np.random.Generator) -> torch.Tensor:
    """One random window of every domain, with the token after it: [8, 513]."""
    rows = []
    for domain in DOMAINS:
        start = int(generator.integers(0, len(tokens[domain]) - WINDOW_TOKENS - 1))
        rows.append(tokens[domain][start : start + WINDOW_TOKENS + 1])
    return torch.from_numpy(np.stack(rows))


def train_step(
    plan: Plan, model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: torch.Tensor
) -> dict[str, float]:
    """One update; returns the two losses and the norm of the gradient before clipping."""
    output = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
    targets = batch[:, 1:].reshape(-1)
    language_loss = functional.cross_entropy(output.logits.flatten(0, 1), targets)
    balance = balance_loss(plan, output.router_logits)
    (language_loss + plan.balance_weight * balance).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": language_loss.item(), "balance": balance.item(), "norm": norm.item()}


def train(
    plan: Plan,
    model: PreTrainedModel,
    train_tokens: dict[str, np.ndarray],
    valid_tokens: dict[str, np.ndarray],
) -> list[dict]:
    """Run the plan, print a log line now and then, return the log."""
    generator = np.random.default_rng(plan.seed)
    optimizer = make_optimizer(plan, model)
    log, started = [], time.perf_counter()
    model.train()
    for step in range(1, plan.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        losses = train_step(plan, model, optimizer, draw_batch(train_tokens, generator))
        if step % LOG_EVERY and step > LOG_EVERY:
            continue
        entry = {"step": step, **losses, "seconds": round(time.perf_counter() - started, 1)}
        if step % VALIDATE_EVERY == 0:
            model.eval()
            entry["valid_perplexity"] = perplexities(model, valid_tokens, VALIDATE_STRIDE)
            model.train()
        print(json.dumps(entry), flush=True)
        log.append(entry)
    model.eval()
    return log


def save(model: PreTrainedModel, tokenizer: Tokenizer, model_dir: Path) -> None:
    """Write the model in bfloat16 and the tokenizer, readable for everyone."""
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(model_dir)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=WINDOW_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(model_dir)
    for path in model_dir.iterdir():
        if path.is_file():
            path.chmod(0o644)  # transformers writes the weights for their owner only


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=BUILD_DIR / "corpus")
    parser.add_argument("--tokenizer", type=Path, default=BUILD_DIR / "tokenizer.json")
    parser.add_argument("--model", type=Path, default=DEMO_DIR / "model")
    parser.add_argument("--report", type=Path, default=BUILD_DIR / "training.json")
    parser.add_argument("--kind", choices=KINDS, default="qwen3")
    parser.add_argument("--steps", type=int, help="default: those of the kind")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    kind = KINDS[arguments.kind]
    plan = Plan(steps=arguments.steps or kind.steps)
    torch.set_num_threads(THREADS)
    torch.manual_seed(plan.seed)
    torch.use_deterministic_algorithms(True)  # scattered sums in a fixed order, whatever the timing
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    train_tokens, valid_tokens = (
        encode_split(tokenizer, arguments.corpus, split) for split in ("train", "valid")
    )
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    config = model_config(kind, plan, tokenizer.get_vocab_size(), end_of_text)
    model = initial_model(kind, plan, config)
    started = time.perf_counter()
    log = train(plan, model, train_tokens, valid_tokens)
    report = {
        "kind": arguments.kind,
        "plan": asdict(plan),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_tokens": plan.steps * len(DOMAINS) * WINDOW_TOKENS,
        "wall_seconds": round(time.perf_counter() - started),
        "cpu_seconds": round(time.process_time()),
        "threads": THREADS,
        "train_tokens": {domain: len(ids) for domain, ids in train_tokens.items()},
        "log": log,
    }
    save(model, tokenizer, arguments.model)
    arguments.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
