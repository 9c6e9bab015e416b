"""The commands of the documents, as a reader types them.

Each block starts with ```sh and what it needs: `run`, a MODEL and texts; `demo`, the demo's server;
or the reason why it is not run here (`NOT_RUN`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    *("README.md", "deploy/README.md"),
    *("docs/pruning.md", "docs/profile-files.md", "docs/extending.md", "docs/python.md"),
)
RUN = frozenset({"run", "demo"})
NOT_RUN = {
    "docker": "a Docker engine",
    "gpu": "a GPU",
    "kubernetes": "a cluster",
    "registry": "images or packages from a registry",
    "long": "more time; a test of `make test-full` does it",
}
FENCE = re.compile(r"^```(.*)$", re.MULTILINE)
FILE = re.compile(
    r"^```(?:python|toml)\n# (?P<name>\S+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
YAML = re.compile(r"^```yaml\n# (?P<name>\S+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```sh(?P<needs>[^\n]*)\n(?P<commands>.*?)^```$", re.MULTILINE | re.DOTALL)
# Every curl of a document must succeed; every server is waited for.
PRELUDE = r"""
set -euo pipefail
curl() { command curl --silent --show-error --fail-with-body "$@" && echo; }
vllm() {
  command vllm "$@" --port "$PORT" --enforce-eager --max-model-len 512 > "server-$PORT.log" 2>&1 &
  server=$!
  until command curl --silent --fail --output /dev/null "localhost:$PORT/health"; do
    kill -0 "$server" || { cat "server-$PORT.log"; exit 1; }
    sleep 0.2
  done
}
"""


@dataclass(frozen=True, slots=True)
class Block:
    """Commands of a document, and what they need.

    Attributes:
        document: its path from the root.
        needs: the words after ```sh.
        commands: the text between the fences.
    """

    document: str
    needs: frozenset[str]
    commands: str


def blocks(document: str) -> list[Block]:
    """Every block of commands of a document, in order."""
    text = (ROOT / document).read_text()
    return [
        Block(document, frozenset(match["needs"].split()), match["commands"])
        for match in BLOCK.finditer(text)
    ]


def example(document: str, name: str) -> str:
    """The YAML of a document that opens with its file's name."""
    [text] = [
        match["text"]
        for match in YAML.finditer((ROOT / document).read_text())
        if match["name"] == name
    ]
    return text


def files_of(document: str) -> dict[str, str]:
    """The Python and TOML files of a document: those that open with their names."""
    text = (ROOT / document).read_text()
    return {match["name"]: match["text"] for match in FILE.finditer(text)}


def run(
    chosen: list[Block],
    directory: Path,
    port: int,
    environment: Mapping[str, str] = os.environ,
    prelude: str = "",
) -> str:
    """Run blocks in one shell in `directory`, with `port` for 8000; return what they print.

    `prelude` runs before them. A server that they start ends with the shell.

    Raises:
        AssertionError: a command failed; the message has the output.
    """
    commands = "\n".join(block.commands for block in chosen)
    script = "\n".join(
        [
            PRELUDE,
            prelude,
            "trap 'kill ${server-} 2> /dev/null || true; wait' EXIT",
            re.sub(r"localhost:8000", f"localhost:{port}", commands),
        ]
    )
    ended = subprocess.run(
        ["bash", "-c", script],
        cwd=directory,
        env={**environment, "PORT": str(port)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout
