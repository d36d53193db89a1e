"""The documentation is true: its Python code runs, its links lead somewhere, its error texts are those of the code."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
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


@pytest.mark.parametrize("title", re.findall(r"^### `(.+)`$", TROUBLESHOOTING, flags=re.MULTILINE))
def test_error_text_in_troubleshooting_is_one_of_the_code(title: str) -> None:
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in title.split("…")), flags=re.DOTALL)
    assert any(pattern.search(text) for text in texts_of_the_code()), f"no string in the code reads like {title!r}"
