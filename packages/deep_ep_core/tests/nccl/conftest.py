from __future__ import annotations

import functools
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deep_ep_core.env import reset_env

# Before 2.31 and since then: the two forms that the device communicator has had.
NCCL_VERSIONS = ("2.30.7", "2.32.3")
_INCLUDE = "nvidia/nccl/include/"


@dataclass(frozen=True)
class NcclHeaders:
    """The headers of one NCCL."""

    version: str
    include_dir: Path

    @property
    def version_code(self) -> int:
        major, minor, patch = map(int, self.version.split("."))
        return major * 10000 + minor * 100 + patch


@pytest.fixture(scope="session")
def get_wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Downloads the wheel of a version, once a session."""
    folder = tmp_path_factory.mktemp("nccl")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d"]

    @functools.cache
    def get(version: str) -> Path:
        requirement = f"nvidia-nccl-cu13=={version}"
        answer = subprocess.run(
            [*command, str(folder / version), requirement], capture_output=True, text=True, check=False
        )
        if answer.returncode != 0:
            pytest.skip(f"pip cannot get {requirement}: {answer.stderr.strip()[-300:]}")
        (path,) = (folder / version).glob("*.whl")
        return path

    return get


@pytest.fixture(scope="session", params=NCCL_VERSIONS)
def nccl_headers(
    request: pytest.FixtureRequest, get_wheel: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> NcclHeaders:
    """The headers of each NCCL in turn. Kept in pytest's cache, since the wheels around them are large."""
    version: str = request.param
    if request.config.cache is not None:
        include_dir = request.config.cache.mkdir(f"nccl-headers-{version}")
    else:
        include_dir = tmp_path_factory.mktemp(f"nccl-headers-{version}")
    if not (include_dir / "nccl.h").is_file():
        with zipfile.ZipFile(get_wheel(version)) as wheel:
            # The file that is looked for above is written last.
            for name in sorted(wheel.namelist(), key=lambda name: name == f"{_INCLUDE}nccl.h"):
                if name.startswith(_INCLUDE) and not name.endswith("/"):
                    path = include_dir / name.removeprefix(_INCLUDE)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(wheel.read(name))
    return NcclHeaders(version, include_dir)


@pytest.fixture(scope="session")
def nccl_root(get_wheel: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation with the library of the first version."""
    folder = tmp_path_factory.mktemp("nccl-root")
    with zipfile.ZipFile(get_wheel(NCCL_VERSIONS[0])) as wheel:
        wheel.extract("nvidia/nccl/lib/libnccl.so.2", folder)
    return folder / "nvidia" / "nccl"


@pytest.fixture
def fresh_env() -> Iterator[None]:
    """Lets a test change what `get_env` reads."""
    reset_env()
    yield
    reset_env()
