"""Many clients, many profiles, one server: does the right profile give every answer?

Clients ask without a pause, streaming and not, with prompts that share prefixes; each request names
one of the profiles, by model name or by `vllm_xargs`, or none. Some clients hang up. Meanwhile the
active profile changes, and one more profile is loaded and unloaded, which clients also name: they
get its answer, or vLLM's 404. References come from servers with one profile each, one request at a
time. Only prompts with clear greedy choices are used: the best token leads the second by more than
`MARGIN` in log-probability at every step, so that batching cannot change it. An answer is right if
the text is the profile's and every token's log-probability is within `TOLERANCE`, which shows
cached prefixes of another profile long before they change a token. A request that names none may
have any profile that was active between its start and its answer; the answer's header names it.

    python -m tests.e2e.soak [--requests 5000] [--changes 200] [--compiled] [--blocks N]
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
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai

from tests.e2e.conftest import DEMO, ROOT, SERVING_KEY, AdminServer, admin_server
from vllm_atomic_moe.measure.server_process import processes_of_group

PROFILES = ("heapr-20", "dense", "heapr-40", "shape-20", "tenp-40")
EXTRA = "heapr-60"
"""Loaded and unloaded while the others are asked."""
HEADER = "x-atomic-moe-profile"
MARGIN = 1e-3
TOLERANCE = 1e-3
TOKENS = 24
PREFIX_CHARACTERS = 300
CLIENTS = 6
HANG_UP = 0.05
FLAGS = ("--block-size=32", "--enable-prompt-tokens-details")


@dataclass(frozen=True)
class Answer:
    """The text of a completion, and the log-probabilities of its tokens."""

    text: str
    logprobs: tuple[float, ...]

    def equals(self, other: Answer) -> bool:
        """Whether both come from one profile."""
        return (
            self.text == other.text
            and len(self.logprobs) == len(other.logprobs)
            and all(
                abs(a - b) <= TOLERANCE for a, b in zip(self.logprobs, other.logprobs, strict=True)
            )
        )


References = dict[str, dict[str, Answer]]
"""Prompt -> profile -> answer."""


@dataclass
class SoakReport:
    """The result of a soak.

    Attributes:
        answers: profile -> completed answers that are its own and no other's.
        unnamed: the number of these whose requests named none.
        wrong: completed answers of no profile, of several, or of a wrong one.
        hung_up: requests whose clients disconnected.
        errors: other failures, in words.
        changes: of the active profile.
        loads: number of times the extra profile was loaded, asked and unloaded.
        in_use: number of times its unloading was refused, since clients used it.
        unknown: requests for it that were refused, since it was not loaded.
        change_ms: milliseconds of each change.
        prefix_hits: tokens that vLLM took from its prefix cache.
        preemptions: requests that vLLM preempted.
        grown_bytes: anonymous memory of all processes, end minus first third.
        grown_files: open file descriptors, end minus first third.
    """

    answers: Counter[str] = field(default_factory=Counter)
    unnamed: int = 0
    wrong: list[str] = field(default_factory=list)
    hung_up: int = 0
    errors: list[str] = field(default_factory=list)
    changes: int = 0
    loads: int = 0
    in_use: int = 0
    unknown: int = 0
    change_ms: list[float] = field(default_factory=list)
    prefix_hits: float = 0
    preemptions: float = 0
    grown_bytes: int = 0
    grown_files: int = 0

    @property
    def requests(self) -> int:
        """Requests that were answered to the end."""
        return sum(self.answers.values()) + len(self.wrong)


def clear_answers(
    server: AdminServer, profile: str | None, tokens: int, prompts: int = 48
) -> dict[str, Answer]:
    """A profile's answers, for the prompts that it answers clearly."""
    found = {}
    for prompt in candidate_prompts(prompts):
        answer = server.complete(prompt, profile, max_tokens=tokens, logprobs=2, ignore_eos=True)[
            "choices"
        ][0]
        pairs = [sorted(best.values())[-2:] for best in answer["logprobs"]["top_logprobs"]]
        if all(first - second > MARGIN for second, first in pairs):
            logprobs = tuple(answer["logprobs"]["token_logprobs"])
            found[prompt] = Answer(answer["text"], logprobs)
    return found


def references_of(answers: Mapping[str, Mapping[str, Answer]], wanted: int) -> References:
    """Prompts that every profile answers clearly and in its own way.

    Args:
        answers: profile -> prompt -> answer.
        wanted: how many to use.
    """
    prompts = set.intersection(*(set(found) for found in answers.values()))
    found = {
        prompt: {profile: answers[profile][prompt] for profile in answers}
        for prompt in candidate_prompts()
        if prompt in prompts
        and len({answers[profile][prompt].text for profile in answers}) == len(answers)
    }
    assert len(found) >= wanted, f"{len(found)} of {len(candidate_prompts())} prompts are clear"
    return dict(itertools.islice(found.items(), wanted))


def fresh_references(directory: Path, tokens: int = TOKENS, wanted: int = 8) -> References:
    """From one server after another, each with one profile."""
    answers = {}
    for profile in (*PROFILES, EXTRA):
        place = directory / profile
        place.mkdir()
        with admin_server(place, {"active": profile, "resident": []}, *FLAGS) as server:
            answers[profile] = clear_answers(server, None, tokens)
    return references_of(answers, wanted)


class Soak:
    """One server under load.

    Args:
        server: has loaded PROFILES, and could load EXTRA.
        references: the right answers.
        tokens: generated for each request.
    """

    def __init__(self, server: AdminServer, references: References, tokens: int = TOKENS) -> None:
        self.server, self.references, self.tokens = server, references, tokens
        self.client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key=SERVING_KEY, timeout=300, max_retries=0
        )
        active = server.status()["active"]
        # (when the change was asked for, when it was answered, profile)
        self.changes: list[tuple[float, float, str]] = [(0.0, 0.0, active)]

    def run(self, requests: int, changes: int) -> SoakReport:
        """At least this many requests and changes of the active profile."""
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
            for number in itertools.count():
                if (number >= changes and report.requests >= requests) or report.errors:
                    break
                self._change(PROFILES[number % len(PROFILES)], report)
                if number % 4 == 0:
                    self._load_and_unload(report, number)
                # As many requests to a change as there are to be in all.
                while report.requests * changes < number * requests and not report.errors:
                    time.sleep(0.02)
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

    def _change(self, profile: str, report: SoakReport) -> None:
        start = time.monotonic()
        self.changes.append((start, float("inf"), profile))
        answer = self.server.activate(profile)
        self.changes[-1] = (start, time.monotonic(), profile)
        if answer.status_code != 200:
            report.errors.append(f"change to {profile}: {answer.text}")
            return
        report.changes += 1
        report.change_ms.append(1000 * (self.changes[-1][1] - start))

    def _load_and_unload(self, report: SoakReport, number: int) -> None:
        prompt = list(self.references)[number % len(self.references)]
        try:
            answer = self.server.load(EXTRA)
            assert answer.status_code == 200, answer.text
            found, reason, profile = self._ask(prompt, EXTRA, stream=False, by_argument=False)
            if (reason, profile) != ("length", EXTRA) or not found.equals(
                self.references[prompt][EXTRA]
            ):
                report.wrong.append(f"{EXTRA}: {profile} {reason}: {found}")
            while (answer := self.server.unload(EXTRA)).status_code == 409:
                assert answer.json()["error"]["type"] == "ProfileInUseError", answer.text
                report.in_use += 1
                time.sleep(0.02)
            assert answer.status_code == 200, answer.text
            report.loads += 1
        except Exception as error:
            report.errors.append(f"load or unload: {type(error).__name__}: {error}")

    def _ask_until(self, done: threading.Event, report: SoakReport, number: int) -> None:
        choose = random.Random(number)
        while not done.is_set():
            prompt = choose.choice(list(self.references))
            named = choose.choice([*PROFILES, EXTRA, None])
            try:
                if choose.random() < HANG_UP:
                    self._hang_up(prompt, named)
                    report.hung_up += 1
                    continue
                begun = time.monotonic()
                found, reason, profile = self._ask(
                    prompt, named, stream=choose.random() < 0.5, by_argument=choose.random() < 0.3
                )
            except openai.NotFoundError:
                if named != EXTRA:
                    report.errors.append(f"404 for {named}")
                    return
                report.unknown += 1
                time.sleep(0.05)
                continue
            except Exception as error:
                report.errors.append(f"{type(error).__name__}: {error}")
                return
            right = {named} if named else self._active_since(begun)
            answers = self.references[prompt]
            owners = [name for name, answer in answers.items() if found.equals(answer)]
            if reason == "length" and owners == [profile] and profile in right:
                report.answers[profile] += 1
                report.unnamed += named is None
            else:
                report.wrong.append(f"{named}: {profile} {reason} {owners}, right {right}: {found}")

    def _active_since(self, begun: float) -> set[str]:
        """Profiles that may have been active between `begun` and now."""
        last = max(i for i, (_, answered, _) in enumerate(self.changes) if answered <= begun)
        return {profile for _, _, profile in self.changes[last:]}

    def _body(self, prompt: str, named: str | None, by_argument: bool) -> dict[str, object]:
        extra = {"vllm_xargs": {"profile": named}} if named and by_argument else {}
        return {
            "model": f"demo:{named}" if named and not by_argument else "demo",
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": self.tokens,
            "logprobs": 0,
            "extra_body": {"ignore_eos": True, **extra},
        }

    def _ask(
        self, prompt: str, named: str | None, stream: bool, by_argument: bool
    ) -> tuple[Answer, str | None, str]:
        """The answer, its finish reason, and the profile that the header names."""
        raw = self.client.completions.with_raw_response.create(
            **self._body(prompt, named, by_argument), stream=stream
        )
        answer = raw.parse()
        parts = [part.choices[0] for part in (answer if stream else [answer]) if part.choices]
        logprobs = [part.logprobs.token_logprobs for part in parts if part.logprobs]
        text = "".join(part.text for part in parts)
        found = Answer(text, tuple(itertools.chain(*logprobs)))
        return found, parts[-1].finish_reason, raw.headers[HEADER]

    def _hang_up(self, prompt: str, named: str | None) -> None:
        """Disconnect after the first token."""
        with self.client.completions.create(
            **self._body(prompt, named, False), stream=True
        ) as answer:
            next(iter(answer))

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


def candidate_prompts(count: int = 48) -> list[str]:
    """Pieces of held-out text, six to a prefix."""
    prompts = []
    for path in sorted((DEMO.parent / "data").glob("*.heldout.txt")):
        text = path.read_text()
        prefix = text[:PREFIX_CHARACTERS]
        prompts += [prefix + text[1000 * i : 1000 * i + 40] for i in range(1, 7)]
    return prompts[:count]


@contextmanager
def soak_server(directory: Path, *flags: str, eager: bool = True):
    """The demo with the soak's profiles loaded."""
    extra = {"active": PROFILES[0], "resident": list(PROFILES)}
    with admin_server(directory, extra, *FLAGS, *flags, eager=eager) as server:
        yield server


def summary(report: SoakReport) -> dict[str, object]:
    """The report as JSON."""
    found = dict(vars(report))
    times = sorted(report.change_ms)
    found["change_ms"] = {"median": times[len(times) // 2], "max": times[-1]}
    return {**found, "requests": report.requests}


def main() -> int:
    """Run a soak and print its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--blocks", type=int, help="KV-cache blocks of 32 tokens; few preempt")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="generated for each request")
    options = parser.parse_args()
    flags = [f"--num-gpu-blocks-override={options.blocks}"] if options.blocks else []
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as directory:
        references = fresh_references(Path(directory), options.tokens)
        place = Path(directory) / "soak"
        place.mkdir()
        with soak_server(place, *flags, eager=not options.compiled) as server:
            start = time.monotonic()
            report = Soak(server, references, options.tokens).run(options.requests, options.changes)
            seconds = time.monotonic() - start
            assert server.ask("GET", "/health").status_code == 200
    print(json.dumps({**summary(report), "seconds": round(seconds)}, indent=2))
    return 1 if report.wrong or report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
