"""Owns the text that the demo learns: what is read from this machine, in which order, and which part is held out.

It draws no batches: `train` does. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from deep_ep_core.errors import ConfigError

__all__ = ["MIN_TEXT_BYTES", "Corpus", "find_project_root", "make_corpus", "package_documents", "project_documents"]

MIN_TEXT_BYTES = 100_000

# The first letters of the names that packages give to such files.
_DOCUMENT_NAMES = ("AUTHORS", "COPYING", "LICENCE", "LICENSE", "NOTICE", "README")
_DOCUMENT_SUFFIXES = ("", ".md", ".rst", ".txt")
# Every 16th block of the text is held out, so that both parts hold text of every kind.
_BLOCK_BYTES = 4096
_HELD_OUT_EVERY = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """The text, cut in two.

    Attributes:
        train: `[num_bytes]` uint8.
        held_out: `[num_bytes]` uint8, never trained on.
        num_documents: Texts that it was made of.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    num_documents: int

    @property
    def num_bytes(self) -> int:
        """Bytes of both parts."""
        return self.train.numel() + self.held_out.numel()


def find_project_root() -> Path | None:
    """The folder of the project's source tree that this file lies in, or None when it was installed."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "packages" / "deep_ep_ep" / "pyproject.toml").is_file():
            return folder
    return None


def project_documents(root: Path | None) -> Iterator[bytes]:
    """The project's own documentation, sorted by path; nothing without a source tree."""
    if root is None:
        return
    paths = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("packages/*/*.md")]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        yield path.read_bytes()


def package_documents(distributions: Iterable[importlib.metadata.Distribution] | None = None) -> Iterator[bytes]:
    """Descriptions, licence texts and READMEs of installed packages, sorted by package and path.

    Args:
        distributions: The packages; None takes all that are installed.
    """
    found: list[tuple[str, str, bytes]] = []
    for distribution in importlib.metadata.distributions() if distributions is None else distributions:
        # A damaged installation may have lost its metadata; the others still give text.
        metadata = distribution.metadata.json if distribution.metadata is not None else {}
        package = str(metadata.get("name", "")).lower().replace("_", "-")
        found.append((package, "", str(metadata.get("description", "")).encode()))
        for file in distribution.files or ():
            if file.name.upper().startswith(_DOCUMENT_NAMES) and file.suffix.lower() in _DOCUMENT_SUFFIXES:
                path = Path(str(distribution.locate_file(file)))
                if path.is_file():
                    found.append((package, file.as_posix(), path.read_bytes()))
    for _, _, data in sorted(found):
        yield data


def make_corpus(documents: Iterable[bytes]) -> Corpus:
    """Join documents, drop those that came before or are not text, and hold a fixed part out.

    Raises:
        ConfigError: There is less than `MIN_TEXT_BYTES` of text.
    """
    # A dict keeps the order; many packages carry the same licence.
    kept = {data: None for data in documents if data.strip() and b"\0" not in data}
    text = b"\n\n".join(kept)
    if len(text) < MIN_TEXT_BYTES:
        raise ConfigError(
            f"the demo needs at least {MIN_TEXT_BYTES} bytes of text to learn from (got {len(text)} in {len(kept)} "
            "documents: the project's docs, and the descriptions and licences of installed packages); install more "
            "packages in this environment"
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    is_held_out = torch.arange(len(data)) // _BLOCK_BYTES % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    return Corpus(train=data[~is_held_out], held_out=data[is_held_out], num_documents=len(kept))
