"""Switching under load: is every answer the answer of exactly one profile?

Clients ask without a pause, streaming and not, prompts that share prefixes, while the profile is
switched as soon as the last switch is done. References are made beforehand, one request at a time,
and only prompts are used whose greedy choices are clear: the best token leads the second by more
than `MARGIN` in log-probability at every step, so that how requests are batched cannot change it.
An answer is a profile's if the text is the same and every token's log-probability is within
`TOLERANCE`: prefixes of another profile in the cache show there long before they change a token.

    python -m tests.e2e.soak [--requests 1000] [--switches 100] [--compiled] [--blocks N]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai

from tests.e2e.conftest import DEMO, ROOT, SERVING_KEY, AdminServer, admin_server
from vllm_atomic_moe.measure.server_process import processes_of_group

PROFILES = ("heapr-20", "heapr-40", "shape-20")
MARGIN = 1e-3
TOLERANCE = 1e-3
TOKENS = 24
PREFIX_CHARACTERS = 300
CLIENTS = 6
FLAGS = ("--block-size=32",)


@dataclass(frozen=True)
class Answer:
    """The text of a completion, and the log-probabilities of its tokens."""

    text: str
    logprobs: tuple[float, ...]

    def equals(self, other: Answer) -> bool:
        """Whether one profile gave both."""
        return self.text == other.text and all(
            abs(a - b) <= TOLERANCE for a, b in zip(self.logprobs, other.logprobs, strict=True)
        )


@dataclass
class SoakReport:
    """What a soak saw.

    Attributes:
        answers: profile -> completed answers that are its own and no other's.
        mixed: completed answers that are no profile's, or several profiles'.
        aborted: answers that ended with vLLM's abort reason.
        errors: what went wrong otherwise, in words.
        switches: mode -> switches that succeeded.
        switch_ms: total milliseconds of each.
        prefix_hits: tokens that vLLM took from its prefix cache.
        preemptions: requests that vLLM preempted.
        grown_bytes: anonymous memory of all processes, end minus first third.
        grown_files: open file descriptors, end minus first third.
    """

    answers: Counter[str] = field(default_factory=Counter)
    mixed: list[str] = field(default_factory=list)
    aborted: int = 0
    errors: list[str] = field(default_factory=list)
    switches: Counter[str] = field(default_factory=Counter)
    switch_ms: list[float] = field(default_factory=list)
    prefix_hits: float = 0
    preemptions: float = 0
    grown_bytes: int = 0
    grown_files: int = 0

    @property
    def requests(self) -> int:
        """Requests that were answered to the end."""
        return sum(self.answers.values()) + len(self.mixed)


class Soak:
    """One server under load.

    Args:
        server: serves `profiles`, all resident.
        profiles: switched to in turn.
        prompts: how many to use.
        tokens: generated for each.
    """

    def __init__(
        self,
        server: AdminServer,
        profiles: Sequence[str] = PROFILES,
        prompts: int = 12,
        tokens: int = TOKENS,
    ) -> None:
        self.server, self.profiles, self.tokens = server, tuple(profiles), tokens
        self.client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key=SERVING_KEY, timeout=300, max_retries=0
        )
        self.references = self._make_references(candidate_prompts(), prompts)

    def _make_references(
        self, candidates: Sequence[str], wanted: int
    ) -> dict[str, dict[str, Answer]]:
        """Prompt -> profile -> answer, for prompts that every profile answers clearly and in its
        own way.
        """
        found: dict[str, dict[str, Answer | None]] = {prompt: {} for prompt in candidates}
        for profile in self.profiles:
            self.server.switched(profile)
            # By vLLM itself: what is to be tested may not vouch for its own references.
            assert self.server.ask("POST", "/reset_prefix_cache").status_code == 200
            for prompt in candidates:
                found[prompt][profile] = self._clear_answer(prompt)
        chosen = {
            prompt: answers
            for prompt, answers in found.items()
            if None not in answers.values()
            and len({answer.text for answer in answers.values()}) == len(answers)
        }
        assert len(chosen) >= wanted, f"{len(chosen)} of {len(candidates)} prompts are clear"
        return dict(itertools.islice(chosen.items(), wanted))  # type: ignore[arg-type]

    def _clear_answer(self, prompt: str) -> Answer | None:
        answer = self.server.complete(prompt, max_tokens=self.tokens, logprobs=2, ignore_eos=True)[
            "choices"
        ][0]
        for best in answer["logprobs"]["top_logprobs"]:
            first, second = sorted(best.values(), reverse=True)[:2]
            if first - second <= MARGIN:
                return None
        return Answer(answer["text"], tuple(answer["logprobs"]["token_logprobs"]))

    def run(self, requests: int, switches: int, modes: Sequence[str]) -> SoakReport:
        """At least so many requests and switches, and one cut off; `modes` are taken in turn."""
        report = SoakReport()
        before = self._vllm_metrics()
        done = threading.Event()
        clients = [
            threading.Thread(target=self._ask_until, args=(done, report, number))
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        resting = None
        try:
            for number, mode in enumerate(itertools.cycle(modes)):
                enough = number >= switches and report.requests >= requests
                cut = report.aborted > 0 or "abort" not in modes or number >= 20 * switches
                if (enough and cut) or report.errors:
                    break
                self._switch(self.profiles[number % len(self.profiles)], mode, report)
                if resting is None and 3 * report.requests >= requests:
                    resting = self.resources()
        finally:
            done.set()
            for client in clients:
                client.join()
        after = self._vllm_metrics()
        report.prefix_hits = after["prefix_cache_hits"] - before["prefix_cache_hits"]
        report.preemptions = after["num_preemptions"] - before["num_preemptions"]
        if resting is not None:
            grown = [b - a for a, b in zip(resting, self.resources(), strict=True)]
            report.grown_bytes, report.grown_files = grown
        return report

    def _switch(self, profile: str, mode: str, report: SoakReport) -> None:
        answer = self.server.switch(profile, mode=mode)
        if answer.status_code != 200:
            report.errors.append(f"switch to {profile}: {answer.text}")
            return
        if answer.json()["previous"] != profile:
            report.switches[mode] += 1
            report.switch_ms.append(answer.json()["total_ms"])

    def _ask_until(self, done: threading.Event, report: SoakReport, number: int) -> None:
        choose = random.Random(number)
        while not done.is_set():
            prompt = choose.choice(list(self.references))
            try:
                found, reason = self._ask(prompt, stream=choose.random() < 0.5)
            except Exception as error:
                report.errors.append(f"{type(error).__name__}: {error}")
                return
            if reason == "abort":
                report.aborted += 1
                continue
            answers = self.references[prompt]
            owners = [profile for profile, answer in answers.items() if found.equals(answer)]
            if len(owners) == 1 and reason == "length":
                report.answers[owners[0]] += 1
            else:
                report.mixed.append(f"{reason}: {found}; {answers}")

    def _ask(self, prompt: str, stream: bool) -> tuple[Answer, str | None]:
        answer = self.client.completions.create(
            model="demo",
            prompt=prompt,
            temperature=0,
            max_tokens=self.tokens,
            stream=stream,
            logprobs=0,
            extra_body={"ignore_eos": True},
        )
        responses = answer if stream else [answer]
        parts = [part.choices[0] for part in responses if part.choices]
        logprobs = [part.logprobs.token_logprobs for part in parts if part.logprobs]
        text = "".join(part.text for part in parts)
        if stream and not parts:  # vLLM ends a stream so that is cut before its first token
            return Answer("", ()), "abort"
        return Answer(text, tuple(itertools.chain(*logprobs))), parts[-1].finish_reason

    def _vllm_metrics(self) -> dict[str, float]:
        found: Counter[str] = Counter()
        for line in httpx.get(f"{self.server.url}/metrics", timeout=60).text.splitlines():
            for name in ("prefix_cache_hits", "num_preemptions"):
                if line.startswith(f"vllm:{name}_total"):
                    found[name] += float(line.rsplit(" ", 1)[1])
        return found

    def resources(self) -> tuple[int, int]:
        """Anonymous memory and open files of all of the server's processes."""
        memory = files = 0
        for process in processes_of_group(self.server.server.process.pid):
            status = Path(f"/proc/{process}/status").read_text()
            memory += 1024 * int(status.partition("RssAnon:")[2].split()[0])
            files += len(os.listdir(f"/proc/{process}/fd"))
        return memory, files


def candidate_prompts(count: int = 30) -> list[str]:
    """Pieces of held-out text, six to a prefix."""
    prompts = []
    for path in sorted((DEMO.parent / "data").glob("*.heldout.txt")):
        text = path.read_text()
        prefix = text[:PREFIX_CHARACTERS]
        prompts += [prefix + text[1000 * i : 1000 * i + 40] for i in range(1, 7)]
    return prompts[:count]


@contextmanager
def soak_server(directory: Path, *flags: str, eager: bool = True):
    """The demo with the soak's profiles resident."""
    extra = {"active": PROFILES[0], "resident": list(PROFILES)}
    with admin_server(directory, extra, *FLAGS, *flags, eager=eager) as server:
        yield server


def main() -> int:
    """Run a soak and print what it saw, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--switches", type=int, default=100)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--blocks", type=int, help="KV-cache blocks of 32 tokens; few preempt")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="generated for each request")
    parser.add_argument("--wait-only", action="store_true")
    options = parser.parse_args()
    flags = [f"--num-gpu-blocks-override={options.blocks}"] if options.blocks else []
    modes = ["wait"] if options.wait_only else ["wait", "wait", "abort"]
    os.chdir(ROOT)
    with (
        tempfile.TemporaryDirectory() as directory,
        soak_server(Path(directory), *flags, eager=not options.compiled) as server,
    ):
        soak = Soak(server, tokens=options.tokens)
        start = time.monotonic()
        report = soak.run(options.requests, options.switches, modes)
        seconds = time.monotonic() - start
        assert server.ask("GET", "/health").status_code == 200
    found = dict(vars(report))
    found["switch_ms"] = {
        "median": sorted(report.switch_ms)[len(report.switch_ms) // 2],
        "max": max(report.switch_ms),
    }
    print(json.dumps({**found, "requests": report.requests, "seconds": round(seconds)}, indent=2))
    return 1 if report.mixed or report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
