"""Documents agree with the code: every command is marked; paths, flags and messages exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from tests.documents import DOCUMENTS, FENCE, NOT_RUN, ROOT, RUN, blocks
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.engine.unserved import CONFIGURATION, LAYER, ROUTING

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
SECURITY = (ROOT / "SECURITY.md").read_text()
ALL = [
    *DOCUMENTS,
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/architecture.md",
    "patches/README.md",
    "deploy/measured.md",
]
# Files with messages of other packages.
THEIRS = {
    "vllm": (
        "model_executor/model_loader/__init__.py",
        "v1/worker/cpu_worker.py",
        "v1/core/kv_cache_utils.py",
        "entrypoints/openai/models/serving.py",
    ),
    "torch": ("_inductor/exc.py",),
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_says_what_it_needs(document):
    for block in blocks(document):
        assert block.needs
        assert block.needs <= RUN | NOT_RUN.keys(), block
        assert not block.needs & RUN or len(block.needs) == 1, block


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_fence_has_a_known_language(document):
    opened = FENCE.findall((ROOT / document).read_text())[::2]
    assert all(words.split()[0] in ("sh", "yaml", "python", "toml") for words in opened), opened


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_inside_a_block(document):
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.M | re.S)
    commands = r"^ {4}(?:\$ )?(?:curl|vllm|atomic-moe|make|docker|kubectl|pip|export|python)\b.*"
    assert re.findall(commands, text, re.M) == []


@pytest.mark.parametrize("document", ALL)
def test_every_path_exists(document):
    text = (ROOT / document).read_text()
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for path in re.findall(r"\b(?:deploy|tests|patches|vllm_atomic_moe)/\w[\w./-]*\w", text):
        assert any(name == path or name.startswith(f"{path}/") for name in tracked), path
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("document", ALL)
def test_every_link_to_a_heading_has_one(document):
    text = (ROOT / document).read_text()
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([\w-]+)\)", text):
        linked = (ROOT / document).parent / target if target else ROOT / document
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, (target, anchor)


# The commands of docs/extending.md use an option of its example; its own test runs them.
@pytest.mark.parametrize("document", [name for name in ALL if name != "docs/extending.md"])
def test_every_command_and_flag_of_ours_exists(document):
    commands = get_command(app).commands
    text = (ROOT / document).read_text().replace("\\\n", " ")
    text = re.sub(r'"[^"\n]*"', "", text)  # another command's flags
    for line in re.findall(r"\batomic-moe ((?:[a-z]+)\b[^\n`|#]*)", text):
        name, *arguments = line.split()
        if name not in commands:
            continue  # prose: the name of the project
        with commands[name].make_context(name, [], resilient_parsing=True) as context:
            parameters = commands[name].get_params(context)
        known = {option for parameter in parameters for option in parameter.opts}
        for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)", " ".join(arguments)):
            assert flag in known, (line, flag)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_and_variable_exists(document):
    makefile = (ROOT / "Makefile").read_text()
    for target, variables in re.findall(
        r"\bmake ([a-z][a-z-]+)((?: [A-Z]+=\S+)*)", (ROOT / document).read_text()
    ):
        assert re.search(rf"^{target}:", makefile, re.M), target
        for variable in re.findall(r"([A-Z]+)=", variables):
            assert f"$({variable})" in makefile, variable


def templates(source):
    """Its strings, except docstrings, in one line each, with … for placeholders."""
    tree = ast.parse(source)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(it.value if isinstance(it, ast.Constant) else "…" for it in node.values)
        elif isinstance(getattr(node, "value", None), str) and node not in docstrings:
            text = re.sub(r"%(?:\.\d)?[sdf]", "…", node.value).replace("%%", "%")
        else:
            continue
        yield " ".join(text.replace("`", "").split())


def says(found, message):
    """Whether one of the templates has the parts of the message in order."""
    parts = [re.escape(" ".join(part.split())) for part in message.split("…")]
    return any(re.search(".*".join(parts), template) for template in found)


def tables_of_failures():
    """Heading -> rows of the tables in "When it fails"."""
    section = (ROOT / "deploy/README.md").read_text().partition("\n## When it fails\n")[2]
    headings = re.findall(r"^### (.*)$", section, re.M)
    return {heading: rows for heading in headings if (rows := table(section, heading, "###"))}


def test_messages_of_the_guide_are_in_the_code():
    sources = sorted((ROOT / "vllm_atomic_moe").rglob("*.py"))
    ours = [template for path in sources for template in templates(path.read_text())]
    theirs = {}
    for package, names in THEIRS.items():
        [directory] = importlib.util.find_spec(package).submodule_search_locations
        found = [it for name in names for it in templates((Path(directory) / name).read_text())]
        theirs[package] = found
    checked = 0
    for heading, rows in tables_of_failures().items():
        for row in rows:
            for message, package in re.findall(r"`([^`]+)`(?: \((vLLM|torch)\))?", row[-2]):
                found = theirs[package.lower()] if package else ours
                if message != "ATOMIC_MOE_ADMIN_KEY_FILE":
                    assert says(found, message), (heading, message)
                    checked += 1
    assert checked > 60


def test_errors_of_the_admin_routes_are_all_listed():
    listed = {row[1].strip("`") for row in tables_of_failures()["Admin routes"]} - {""}
    sources = [*(ROOT / "vllm_atomic_moe/control").glob("*.py")]
    sources.append(ROOT / "vllm_atomic_moe/engine/core.py")
    kinds = {kind for path in sources for kind in re.findall(r'"(\w+Error)"', path.read_text())}
    assert listed == kinds


@pytest.mark.parametrize(
    ("opening", "features"),
    [
        ("never silently wrong:", CONFIGURATION),
        ("before their weights are allocated:", LAYER),
        ("Refused with a mask:", ROUTING),
    ],
)
def test_readme_lists_what_is_refused(opening, features):
    document = "docs/profile-files.md" if features is ROUTING else "README.md"
    text = re.sub(r"\s+", " ", (ROOT / document).read_text()).partition(opening)[2]
    listed = re.sub(r" ?\([^()]*(?:\([^()]*\)[^()]*)*\)", "", text).partition(". ")[0]
    assert [name.strip() for name in listed.split(",")] == list(features)


def table(text, heading, level="##"):
    """The cells of the table under a heading, without its header."""
    section = text.partition(f"{level} {heading}\n")[2].partition(f"\n{level} ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[1:]]


def located(path):
    """A path of docs/architecture.md, which starts in the package or at the root."""
    found = [base / path for base in (ROOT / "vllm_atomic_moe", ROOT) if (base / path).exists()]
    assert found, path
    return found[0]


def paths_in(text):
    spans = re.findall(r"`([\w./-]+)`", text)
    return {span for span in spans if "/" in span or span.endswith(".py")}


def test_architecture_names_existing_code():
    assert len(paths_in(ARCHITECTURE)) > 40
    for path in paths_in(ARCHITECTURE):
        located(path)
    named = re.findall(r"((?:`\w+`(?:, | and | or )?)+)\s+in\s+`([\w./-]+)`", ARCHITECTURE)
    assert len(named) > 25
    for names, path in named:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", located(path).read_text()), (name, path)


def test_architecture_fits_on_two_pages():
    rows = table(ARCHITECTURE, "Where to add what")
    assert {row[0] for row in rows} >= {
        *("a scoring method", "a disk layout", "an activation", "a quantized format", "a kernel"),
        *("an architecture", "an admin route", "a metric"),
    }
    for what, change, tests in rows:
        assert paths_in(change), what
        assert all(path.startswith("tests/") for path in paths_in(tests)), what
        assert paths_in(tests), what
    assert ARCHITECTURE.count("```text") == 1
    assert len(ARCHITECTURE.splitlines()) <= 100


def test_every_claim_of_security_names_tests_that_exist():
    named = re.compile(r"`((?:unit|serving|e2e)/\w+\.py)::(\w+)`")
    rows = table(SECURITY, "Who may do what") + table(SECURITY, "What hostile input cannot do")
    assert len(rows) > 10
    for row in rows:
        assert named.search(row[-1]) or row[-1] == "the next table", row
    for path, name in named.findall(SECURITY):
        defined = ast.walk(ast.parse((ROOT / "tests" / path).read_text()))
        assert name in {it.name for it in defined if isinstance(it, ast.FunctionDef)}, name
    assert len(re.findall("::", SECURITY)) == len(named.findall(SECURITY))


def test_the_version_is_in_one_place():
    from vllm_atomic_moe import __version__

    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    for path in ("Dockerfile", "Makefile", "pyproject.toml", "deploy/compose.yaml"):
        assert __version__ not in Path(ROOT / path).read_text(), path
    tags = re.findall(r"\b(\d[\w.]*)-[cg]pu\b", (ROOT / "deploy/README.md").read_text())
    assert set(tags) == {__version__}
