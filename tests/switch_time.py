"""What a switch takes on an idle server, and whether it depends on how much weight there is.

    .venv/bin/python -m tests.switch_time [MODEL …] [--switches 50]

serves each MODEL (default: the demo) with the first two profiles of its `atomic_profiles/` resident
and switches between them; a model of gigabytes comes from `python -m tests.synthetic DIRECTORY`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from tests.e2e.conftest import DEMO, admin_server
from vllm_atomic_moe.cli.console import print_table
from vllm_atomic_moe.files.profiles import ProfileStore

COLUMNS = ["resident MiB", "commit ms", "drain ms", "total ms"]


def measure(model: Path, switches: int) -> list[str]:
    """The table's cells for one model: medians, and in brackets the largest."""
    names = ProfileStore(model / "atomic_profiles").names()[:2]
    extra = {"active": names[0], "resident": names}
    with (
        tempfile.TemporaryDirectory() as directory,
        admin_server(Path(directory), extra, "--dtype=bfloat16", model=model) as server,
    ):
        answers = [server.switched(names[number % 2]) for number in range(1, switches + 1)]
        resident = server.status()["memory"]["resident_bytes"]
    cells = [f"{resident / 2**20:.0f}"]
    for part in ("commit_ms", "drain_ms", "total_ms"):
        times = [answer[part] for answer in answers]
        cells.append(f"{statistics.median(times):.2f} ({max(times):.2f})")
    return cells


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", metavar="MODEL", nargs="*", type=Path, default=[DEMO])
    parser.add_argument("--switches", type=int, default=50)
    options = parser.parse_args()
    rows = [[str(model), *measure(model.resolve(), options.switches)] for model in options.models]
    print_table(["model", *COLUMNS], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
