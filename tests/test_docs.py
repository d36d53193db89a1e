"""The documentation is true: its Python code runs, its links lead somewhere, its error texts are those of the code."""

from __future__ import annotations

import ast
import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
RUN_TIMEOUT_S = 120

_BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", flags=re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_of(page: Path) -> str:
    """The blocks of a page that run, as one script in which each line has the number that it has on the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for block in _BLOCK.finditer(text):
        if not _NOT_RUN.search(text[: block.start()]):
            first = text.count("\n", 0, block.start(1))
            code = block[1].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines) if any(lines) else ""


def write_script(page: str, folder: Path) -> Path:
    script = folder / f"{page.removesuffix('.md').replace('/', '_')}.py"
    script.write_text(code_of(ROOT / page), encoding="utf-8")
    return script


@pytest.mark.parametrize("page", [name_of(page) for page in READMES + PAGES if code_of(page)])
def test_code_of_a_page_runs_on_two_ranks(page: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deep_ep_core.launch", "--ranks", "2", "--timeout", str(RUN_TIMEOUT_S)]
    done = subprocess.run(
        [*command, str(write_script(page, tmp_path))],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S + 30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_code_runs_in_one_process_alone(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    # Else gloo looks up the machine's own name, which need not resolve.
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    script = write_script("README.md", tmp_path)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0: 8 tokens sent" in done.stdout


@pytest.mark.parametrize("page", [name_of(page) for page in READMES + PAGES])
def test_code_that_is_not_run_has_a_reason(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for marker in re.finditer(r"^<!-- not run.*\n", text, flags=re.MULTILINE):
        assert _NOT_RUN.fullmatch(marker[0]), f"{marker[0]!r} must be <!-- not run: reason -->"
        assert text.startswith("```python\n", marker.end()), "the marker must stand right before a python block"


@pytest.mark.parametrize("session", ["demo", "tests"])
def test_readme_has_the_command_on_a_line_of_its_own(session: str) -> None:
    command = f"python3 -m venv .venv && .venv/bin/pip install -q nox && .venv/bin/nox -s {session}"
    assert f"```console\n{command}\n```\n" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [name_of(page) for page in READMES + PAGES])
def test_links_lead_to_files_and_headings(page: str) -> None:
    source = ROOT / page
    for target in _LINK.findall(_FENCED.sub("", source.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (source.parent / path).resolve() if path else source
        assert linked.is_file(), f"{target} leads to no file"
        # Anchors of names from the code are made by mkdocstrings; the docs session checks those.
        if anchor and not anchor.startswith("deep_ep_"):
            assert anchor in headings_of(linked), f"{target} leads to no heading"


def headings_of(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in _HEADING.findall(text)}


def test_navigation_covers_every_page() -> None:
    in_navigation = re.findall(r"[\w/-]+\.md\b", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(in_navigation) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES)


@functools.cache
def texts_of_the_code() -> list[str]:
    """Every string in the packages, with `…` for what is filled in."""
    texts = []
    for path in ROOT.glob("packages/*/src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


TROUBLESHOOTING = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
TITLES = re.findall(r"^### `(.+)`$", TROUBLESHOOTING, flags=re.MULTILINE)


@pytest.mark.parametrize("title", TITLES)
def test_error_text_in_troubleshooting_is_one_of_the_code(title: str) -> None:
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in title.split("…")), flags=re.DOTALL)
    texts = texts_of_the_code() + [text for _, text in errors_of_the_code()]
    assert any(pattern.search(without_backticks(text)) for text in texts), f"no string in the code reads like {title!r}"


# Errors that need no entry, by their class or by the beginning of their text, and why.
NO_ENTRY_NEEDED = {
    "CorruptEntryError": "the cache catches it and builds the entry anew",
    "UnknownRateError": "links catches it and logs that the rate is unknown",
    "AttributeError": "is Python's own for a name that is misspelt",
    "MpsError": "open_mps catches it; the text of what it raises or prints instead holds this one",
    "NVMLError": "is NVML's own, and links catches it",
    "… (got …, on rank …); …": "is what `rejected` makes of its arguments; each call of it is an error of its own here",
    "an argument is not a plain number": "the buffer catches it and lets the checks of the call find the words",
    "another process held the lock for": "the cache catches it and goes on without the shared folder",
    "messages were still missing when the time was over": "transport makes it a CommTimeoutError",
}


def texts_of_message(node: ast.expr, scope: ast.AST | None, functions: Sequence[ast.FunctionDef]) -> list[str]:
    """What a message may read like, `…` for what is filled in.

    Args:
        node: The argument that an error is made with.
        scope: The function that it stands in, whose local names are looked up; None looks none up.
        functions: All functions, for messages that one of them puts together.
    """
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            filled = [texts_of_message(part, scope, functions) for part in parts]
            return ["".join(choice) for choice in itertools.product(*filled)]
        case ast.FormattedValue(value=ast.Name() as name):
            return texts_of_message(name, scope, functions)
        case ast.BinOp(op=ast.Add(), left=left):
            return [f"{text}…" for text in texts_of_message(left, scope, functions)]
        case ast.IfExp(body=body, orelse=orelse):
            return texts_of_message(body, scope, functions) + texts_of_message(orelse, scope, functions)
        case ast.Name(id=name) if scope is not None:
            inner = [child for child in ast.walk(scope) if isinstance(child, ast.Assign)]
            values = [child.value for child in inner if ast.unparse(child.targets[0]) == name]
            return [text for value in values for text in texts_of_message(value, None, functions)] or ["…"]
        case ast.Call(func=ast.Name(id=name)):
            # By the rule for messages there is one sentence in it that says what must hold.
            bodies = [function for function in functions if function.name == name]
            inner = [child for body in bodies for child in ast.walk(body) if isinstance(child, ast.JoinedStr)]
            texts = [text for child in inner for text in texts_of_message(child, None, functions)]
            return [text for text in texts if " must " in text] or ["…"]
    return ["…"]


def errors_in(trees: Sequence[ast.Module]) -> list[tuple[str, str]]:
    """Class and text of every error that the code makes, whether it is raised at once or later."""
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    errors: dict[tuple[str, str], None] = {}

    def visit(node: ast.AST, scope: ast.AST) -> None:
        name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and (name == "rejected" or re.fullmatch(r"[A-Z]\w*Error", name)):
            # The first argument that is a text: OSError's is a number, that of `rejected` the rank.
            found = (texts_of_message(argument, scope, functions) for argument in node.args)
            texts = next((texts for texts in found if texts != ["…"]), ["…"])
            form = "{} (got …, on rank …); …" if name == "rejected" else "{}"
            errors.update({(name, form.format(text)): None for text in texts})
        for child in ast.iter_child_nodes(node):
            visit(child, child if isinstance(child, ast.FunctionDef) else scope)

    for tree in trees:
        visit(tree, tree)
    return list(errors)


@functools.cache
def errors_of_the_code() -> list[tuple[str, str]]:
    paths = sorted(ROOT.glob("packages/*/src/**/*.py"))
    return errors_in([ast.parse(path.read_text(encoding="utf-8")) for path in paths])


def is_covered(text: str, title: str) -> bool:
    """Whether a title is how the text begins. `…` in a title stands for anything within one part of a sentence."""
    return re.match("[^;]*".join(map(re.escape, title.split("…"))), without_backticks(text)) is not None


def without_backticks(text: str) -> str:
    """The text as a title can have it, since it stands in backticks itself."""
    return text.replace("`", "")


def test_every_error_text_is_in_the_troubleshooting_page() -> None:
    """Nobody who searches for what they see on the screen may find nothing."""
    missing, exempted = [], set()
    for name, text in errors_of_the_code():
        if any(is_covered(text, title) for title in TITLES):
            continue
        reasons = {key for key in NO_ENTRY_NEEDED if key == name or text.startswith(key)}
        exempted |= reasons
        if not reasons:
            missing.append(f"{name}: {text}")
    assert not missing, "no heading of troubleshooting.md is the beginning of:\n" + "\n".join(missing)
    assert exempted == NO_ENTRY_NEEDED.keys(), "an exemption without an error"


@pytest.mark.parametrize("title", TITLES)
def test_heading_in_troubleshooting_says_more_than_that_something_must_be(title: str) -> None:
    """`… must be …` would cover nearly every error, and explain none."""
    assert set(re.findall(r"\w+", title)) - {"a", "an", "the", "must", "be", "have", "got", "on", "rank"}


def test_error_texts_are_found_however_the_error_is_made() -> None:
    source = """
def describe(rank):
    return "; ".join([f"rank {rank} must come", f"look at {rank}"])

def check(x, rank):
    problem = f"x must be 1 (got {x})"
    if x > 1:
        raise ConfigError(problem)
    must = "x must be here" if x else "y must be here"
    bound = f"at least {x}"
    OSError(errno.EIO, f"x must be {bound}")
    error = module.TransportError("a" + "b", call=describe(rank))
    raise rejected(rank, must, x, "pass it") from LateError(describe(rank), rank=rank)
"""
    assert sorted(errors_in([ast.parse(source)])) == [
        ("ConfigError", "x must be 1 (got …)"),
        ("LateError", "rank … must come"),
        ("OSError", "x must be at least …"),
        ("TransportError", "a…"),
        ("rejected", "x must be here (got …, on rank …); …"),
        ("rejected", "y must be here (got …, on rank …); …"),
    ]
