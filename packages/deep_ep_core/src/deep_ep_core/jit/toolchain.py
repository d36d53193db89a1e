"""Owns the search for what compiles a kernel: nvcc, NVRTC, the toolkit's headers, NCCL's headers, and the disassembler.

Nothing is looked for at import, and nothing is remembered here: `builder` keeps what it needs. What each finder returns
says where it was found, so that an error or `EP_JIT_DEBUG` can tell.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_ep_core.errors import CompileError, ConfigError
from deep_ep_core.jit.options import JitOptions

__all__ = [
    "SYSTEM_INCLUDE_DIRS",
    "NcclHeaders",
    "Nvcc",
    "Nvrtc",
    "ToolkitHeaders",
    "find_cuobjdump",
    "find_nccl_headers",
    "find_nvcc",
    "find_nvrtc",
    "find_toolkit_headers",
    "nvrtc_call",
    "site_folders",
]

_MIN_NVCC_VERSION = (12, 3)
_SYSTEM_TOOLKIT = Path("/usr/local/cuda")
_SYSTEM_PREFIXES = (Path("/usr/local"), Path("/usr"))
# A host compiler looks there anyway, and naming them again would put them before its own headers.
SYSTEM_INCLUDE_DIRS = frozenset(prefix / "include" for prefix in _SYSTEM_PREFIXES)
# Folders of NVIDIA's wheels below `nvidia/`: one for all of CUDA 13, one a component for CUDA 12.
_NVCC_WHEEL_FOLDERS = ("cu13", "cuda_nvcc")
_RUNTIME_WHEEL_FOLDERS = ("cu13", "cuda_runtime")
_TOOL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvcc:
    """An nvcc program.

    Attributes:
        path: The program.
        version: Its full version, for example `13.0.88`.
        found_via: What led to it, for example `CUDA_HOME`.
    """

    path: Path
    version: str
    found_via: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvrtc:
    """NVRTC, NVIDIA's compiler as a library.

    Attributes:
        api: The module `cuda.bindings.nvrtc`, its library loaded.
        version: Full version of the library, for example `13.0.88`.
    """

    api: Any
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolkitHeaders:
    """The CUDA toolkit's headers, which NVRTC must be told of; nvcc has its own.

    Attributes:
        include_dirs: Include directories, `cuda_bf16.h` and libcu++ among them.
        version: `CUDA_VERSION` of the headers, for example `13000`.
        found_via: What led to them.
    """

    include_dirs: tuple[Path, ...]
    version: str
    found_via: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NcclHeaders:
    """NCCL's headers.

    Attributes:
        include_dir: The folder of `nccl.h` and `nccl_device.h`.
        version: (major, minor, patch) of `nccl.h`.
        digest: Digest of the text of `nccl.h` and of all device headers.
        found_via: What led to them.
    """

    include_dir: Path
    version: tuple[int, int, int]
    digest: str
    found_via: str


def find_nvcc(options: JitOptions) -> Nvcc | None:
    """The first nvcc of: `nvcc_compiler`, `cuda_home`, PATH, the nvidia-cuda-nvcc wheel, /usr/local/cuda; or None.

    Raises:
        ConfigError: `nvcc_compiler` names no program, or the one found is older than 12.3.
        CompileError: The program does not say its version.
    """
    for path, found_via in _nvcc_candidates(options):
        if os.access(path, os.X_OK) and path.is_file():
            version = _nvcc_version(path)
            if tuple(int(part) for part in version.split(".")[:2]) < _MIN_NVCC_VERSION:
                raise ConfigError(
                    f"nvcc must be {'.'.join(map(str, _MIN_NVCC_VERSION))} or newer (got {version}, {path}, found via "
                    f"{found_via}); set EP_JIT_NVCC_COMPILER to a newer one or install nvidia-cuda-nvcc"
                )
            return Nvcc(path=path, version=version, found_via=found_via)
        if options.nvcc_compiler is not None:
            raise ConfigError(f"EP_JIT_NVCC_COMPILER must name an executable file (got {path}); correct or unset it")
    return None


def _nvcc_candidates(options: JitOptions) -> Iterator[tuple[Path, str]]:
    if options.nvcc_compiler is not None:
        yield options.nvcc_compiler, "EP_JIT_NVCC_COMPILER"
    if options.cuda_home is not None:
        yield options.cuda_home / "bin" / "nvcc", "CUDA_HOME"
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield Path(on_path), "PATH"
    for folder in site_folders("nvidia", _NVCC_WHEEL_FOLDERS):
        yield folder / "bin" / "nvcc", "the nvidia-cuda-nvcc wheel"
    yield _SYSTEM_TOOLKIT / "bin" / "nvcc", str(_SYSTEM_TOOLKIT)


def _nvcc_version(path: Path) -> str:
    command = [str(path), "--version"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False)
        log = answer.stdout + answer.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        log = str(error)
    version = re.search(r"\bV(\d+\.\d+\.\d+)", log)
    if version is None:
        raise CompileError(
            f"`{path} --version` must print a version (got {log.strip()!r}); set EP_JIT_NVCC_COMPILER",
            command=" ".join(command),
            log=log,
        )
    return version[1]


def find_nvrtc() -> Nvrtc | str:
    """NVRTC through the package cuda-bindings, or the reason why there is none."""
    try:
        api = importlib.import_module("cuda.bindings.nvrtc")
        not_found_type = importlib.import_module("cuda.pathfinder").DynamicLibNotFoundError
    except ImportError as error:
        return f"the package cuda-bindings does not import ({error})"
    try:
        return Nvrtc(api=api, version=_nvrtc_version(api))
    except not_found_type as error:
        return f"cuda-bindings finds no NVRTC library ({str(error).strip()})"


def _nvrtc_version(api: Any) -> str:
    """The version with its patch level, which only the PTX that it writes tells."""
    program = nvrtc_call(api, "nvrtcCreateProgram", b"", b"version.cu", 0, [], [])
    try:
        nvrtc_call(api, "nvrtcCompileProgram", program, 0, [])
        ptx = bytearray(nvrtc_call(api, "nvrtcGetPTXSize", program))
        nvrtc_call(api, "nvrtcGetPTX", program, ptx)
    finally:
        nvrtc_call(api, "nvrtcDestroyProgram", program)
    version = re.search(rb"\bV(\d+\.\d+\.\d+)", ptx)
    major, minor = nvrtc_call(api, "nvrtcVersion")
    return version[1].decode() if version else f"{major}.{minor}"


def nvrtc_call(api: Any, name: str, *args: Any) -> Any:
    """Call a function of NVRTC and return its result, if it has one.

    Raises:
        CompileError: The call fails.
    """
    status, *results = getattr(api, name)(*args)
    if status != api.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{name} failed with {status.name}", command=name, log=status.name)
    return results[0] if len(results) == 1 else results


def find_toolkit_headers(options: JitOptions) -> ToolkitHeaders | None:
    """The first complete set of the toolkit's headers: of NVIDIA's wheels, or of a toolkit on this machine; or None.

    The wheels come first, because cuda-bindings looks for NVRTC there first, and the two should be of one version.

    Args:
        options: The toolkit to look into first.
    """
    candidates = [(folder, "NVIDIA's wheels") for folder in site_folders("nvidia", _RUNTIME_WHEEL_FOLDERS)]
    candidates += _toolkit_roots(options)
    for root, found_via in candidates:
        include_dir = root / "include"
        include_dirs = tuple(folder for folder in (include_dir, include_dir / "cccl") if folder.is_dir())
        # The first is of the runtime, the second of libcu++, which it includes and which is a wheel of its own.
        if all(any((folder / name).is_file() for folder in include_dirs) for name in ("cuda_bf16.h", "nv/target")):
            version = _read_macros(include_dir / "cuda_runtime_api.h", ("CUDART_VERSION",)).get("CUDART_VERSION", "")
            return ToolkitHeaders(include_dirs=include_dirs, version=version, found_via=found_via)
    return None


def _toolkit_roots(options: JitOptions) -> list[tuple[Path, str]]:
    roots = [] if options.cuda_home is None else [(options.cuda_home, "CUDA_HOME")]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        roots.append((Path(on_path).resolve().parent.parent, "PATH"))
    return [*roots, (_SYSTEM_TOOLKIT, str(_SYSTEM_TOOLKIT))]


def find_nccl_headers(options: JitOptions) -> NcclHeaders | None:
    """NCCL's headers: of `nccl_root_dir`, the nvidia-nccl wheel, or the system; or None.

    Raises:
        ConfigError: `nccl_root_dir` holds none.
    """
    if options.nccl_root_dir is not None:
        candidates = [(options.nccl_root_dir, "EP_NCCL_ROOT_DIR")]
    else:
        candidates = [(folder, "the nvidia-nccl wheel") for folder in site_folders("nvidia", ("nccl",))]
        candidates += [(prefix, str(prefix)) for prefix in _SYSTEM_PREFIXES]
    for root, found_via in candidates:
        include_dir = root / "include"
        if (include_dir / "nccl_device.h").is_file():
            macros = _read_macros(include_dir / "nccl.h", ("NCCL_MAJOR", "NCCL_MINOR", "NCCL_PATCH"))
            version = (int(macros["NCCL_MAJOR"]), int(macros["NCCL_MINOR"]), int(macros["NCCL_PATCH"]))
            digest = _digest_nccl(include_dir)
            return NcclHeaders(include_dir=include_dir, version=version, digest=digest, found_via=found_via)
    if options.nccl_root_dir is not None:
        raise ConfigError(
            f"EP_NCCL_ROOT_DIR must be an NCCL installation with include/nccl_device.h, which NCCL has since 2.28 "
            f"(got {options.nccl_root_dir}); correct or unset it"
        )
    return None


def _digest_nccl(include_dir: Path) -> str:
    names = sorted(path.relative_to(include_dir).as_posix() for path in include_dir.glob("nccl_device*/**/*"))
    digest = hashlib.sha256()
    for name in ("nccl.h", "nccl_device.h", *names):
        if (include_dir / name).is_file():
            digest.update(name.encode() + b"\0" + (include_dir / name).read_bytes() + b"\0")
    return digest.hexdigest()


def find_cuobjdump(options: JitOptions) -> Path | None:
    """The program cuobjdump: of a toolkit on this machine, or on PATH; or None."""
    for root, _ in _toolkit_roots(options):
        if os.access(root / "bin" / "cuobjdump", os.X_OK):
            return root / "bin" / "cuobjdump"
    on_path = shutil.which("cuobjdump")
    return None if on_path is None else Path(on_path)


def site_folders(package: str, names: tuple[str, ...]) -> Iterator[Path]:
    """The folders of these names inside an installed package, which may be a namespace of several folders.

    Args:
        package: Import name of the package; it is not imported.
        names: Folder names, the first wanted most.
    """
    spec = importlib.util.find_spec(package)
    roots = [] if spec is None else list(spec.submodule_search_locations or ())
    for name in names:
        for root in roots:
            if (Path(root) / name).is_dir():
                yield Path(root) / name


def _read_macros(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The values of `#define`s in a header; a name that is not defined there is left out."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = {}
    for name in names:
        match = re.search(rf"^[ \t]*#[ \t]*define[ \t]+{name}[ \t]+(\w+)", text, re.MULTILINE)
        if match is not None:
            found[name] = match[1]
    return found
