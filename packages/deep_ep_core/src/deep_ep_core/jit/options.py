"""Owns the settings of the run-time compiler, detached from the environment so that tests and tools can set their own.

It reads no variable itself: `deep_ep_core.env` does, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deep_ep_core.env import Env
from deep_ep_core.errors import ConfigError

__all__ = ["JitOptions"]

# A config struct is a template argument, which C++ allows from this standard on.
_MIN_CPP_STANDARD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JitOptions:
    """What the run-time compiler may do and where it looks.

    Attributes:
        cache_dir: Root folder of the cache; it is made when the first kernel is stored.
        nvcc_compiler: The nvcc program, used for every kernel; None searches for one, and prefers NVRTC where it can.
        cuda_home: CUDA toolkit to look into first, or None.
        nccl_root_dir: NCCL installation to look into, and no other; None searches.
        cpp_standard: C++ standard, at least 20.
        debug: Print what the JIT does.
        print_compiler_command: Print each compiler command.
        ptxas_verbose: Print what ptxas says of registers, spills and memory.
        ptxas_check: Fail when a kernel uses local memory.
        with_lineinfo: Embed source lines in the machine code.
        dump_ptx: Keep PTX beside the cubin.
        dump_sass: Keep SASS beside the cubin.
        gin_gdaki_debug: Turn on the debug output of NCCL's GIN GDAKI, in kernels that include NCCL.

    Raises:
        ConfigError: The C++ standard is too old.
    """

    cache_dir: Path
    nvcc_compiler: Path | None = None
    cuda_home: Path | None = None
    nccl_root_dir: Path | None = None
    cpp_standard: int = _MIN_CPP_STANDARD
    debug: bool = False
    print_compiler_command: bool = False
    ptxas_verbose: bool = False
    ptxas_check: bool = False
    with_lineinfo: bool = False
    dump_ptx: bool = False
    dump_sass: bool = False
    gin_gdaki_debug: bool = False

    def __post_init__(self) -> None:
        if self.cpp_standard < _MIN_CPP_STANDARD:
            raise ConfigError(
                f"cpp_standard must be at least {_MIN_CPP_STANDARD}, because config structs are template arguments "
                f"(got {self.cpp_standard}); unset EP_JIT_CPP_STANDARD"
            )

    @classmethod
    def from_env(cls, env: Env) -> JitOptions:
        """The options that the environment variables ask for.

        Args:
            env: The settings of the process, from `get_env`.
        """
        return cls(
            cache_dir=env.jit_cache_dir,
            nvcc_compiler=env.jit_nvcc_compiler,
            cuda_home=env.cuda_home,
            nccl_root_dir=env.nccl_root_dir,
            cpp_standard=env.jit_cpp_standard,
            debug=env.jit_debug,
            print_compiler_command=env.jit_print_compiler_command,
            ptxas_verbose=env.jit_ptxas_verbose or env.jit_debug,
            ptxas_check=env.jit_ptxas_check,
            with_lineinfo=env.jit_with_lineinfo or env.jit_debug,
            dump_ptx=env.jit_dump_ptx or env.jit_dump_asm,
            dump_sass=env.jit_dump_sass or env.jit_dump_asm,
            gin_gdaki_debug=env.gin_gdaki_debug,
        )
