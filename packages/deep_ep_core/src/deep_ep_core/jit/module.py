"""Owns compiled kernels that are loaded on a device, and the attributes that are set on them once.

A launch itself is in `launch`.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from deep_ep_core.errors import ConfigError
from deep_ep_core.jit.builder import Builder, CompiledKernel, default_builder
from deep_ep_core.jit.driver import device_arch, driver_call, load_driver
from deep_ep_core.jit.spec import KernelSpec

__all__ = ["Kernel", "get_kernel", "get_kernels"]

# A kernel may use that much dynamic shared memory without asking; CUDA C++ Programming Guide, compute capabilities.
_FREE_SMEM_BYTES = 48 * 1024
# Clusters of more blocks than this are not portable between GPUs and must be asked for; same place.
_PORTABLE_CLUSTER_BLOCKS = 8


class Kernel:
    """A kernel on one device, ready to be launched. It stays loaded until the process ends.

    All machine code is on the device when the constructor returns, so that no first launch waits for it: the driver
    could otherwise load it only after kernels that run, and those may wait for the launch.

    Args:
        spec: What was compiled.
        compiled: The machine code.
        device_idx: The device.

    Raises:
        ConfigError: cuda-bindings is not installed, or the kernel's parameter is not as large as its mirror.
        TransportError: A driver call fails.

    Collective: no. Do not make one while a stream is being captured.
    """

    def __init__(self, spec: KernelSpec, compiled: CompiledKernel, device_idx: int) -> None:
        self.spec = spec
        self.compiled = compiled
        self.device_idx = device_idx
        self._device = driver_call("cuDeviceGet", device_idx)
        with _current_context(self._device):
            self._library = driver_call("cuLibraryLoadData", compiled.cubin, [], [], 0, [], [], 0)
            self._kernel = driver_call("cuLibraryGetKernel", self._library, compiled.entry_name.encode())
            # Loads the code now instead of at the first launch.
            driver_call("cuKernelGetFunction", self._kernel)
        self.handle = int(self._kernel)
        """The driver's handle, as an integer."""
        _, params_bytes = driver_call("cuKernelGetParamInfo", self._kernel, 0)
        if params_bytes != ctypes.sizeof(spec.params_type):
            raise ConfigError(
                f"{spec.params_type.__name__} must be as large as the parameter of {compiled.name} (got "
                f"{ctypes.sizeof(spec.params_type)} bytes, the kernel takes {params_bytes}); correct the mirror"
            )
        self._lock = threading.Lock()
        self._max_smem_bytes = _FREE_SMEM_BYTES
        self._max_cluster_blocks = _PORTABLE_CLUSTER_BLOCKS

    def allow(self, *, smem_bytes: int, cluster_blocks: int = 1) -> None:
        """Let launches use that much dynamic shared memory and clusters that large. Does nothing if they may already.

        Args:
            smem_bytes: Dynamic shared memory a block.
            cluster_blocks: Blocks a cluster.

        Raises:
            TransportError: The device does not have as much.
        """
        names = load_driver().CUfunction_attribute
        with self._lock:
            if smem_bytes > self._max_smem_bytes:
                self._set_attribute(names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes)
                self._max_smem_bytes = smem_bytes
            if cluster_blocks > self._max_cluster_blocks:
                self._set_attribute(names.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
                self._max_cluster_blocks = cluster_blocks

    def _set_attribute(self, attribute: Any, value: int) -> None:
        driver_call("cuKernelSetAttribute", attribute, value, self._kernel, self._device)

    def __repr__(self) -> str:
        return f"Kernel({self.compiled.name}, {self.compiled.arch}, device {self.device_idx})"


@contextlib.contextmanager
def _current_context(device: Any) -> Iterator[None]:
    """Make the device's primary context, which torch uses too, current in this thread while the block runs."""
    context = driver_call("cuDevicePrimaryCtxRetain", device)
    driver_call("cuCtxPushCurrent", context)
    try:
        yield
    finally:
        driver_call("cuCtxPopCurrent")


_kernels: dict[tuple[KernelSpec, int], Kernel] = {}
_kernels_lock = threading.Lock()


def get_kernel(spec: KernelSpec, device_idx: int, *, builder: Builder | None = None) -> Kernel:
    """The kernel of a spec on a device: compiled and loaded at the first call, the same object from then on.

    Args:
        spec: The kernel. Looking it up costs microseconds: keep what is returned where it is launched often.
        device_idx: The device, as torch numbers it.
        builder: Compiles it, if it is not loaded yet; None takes the one with the options of the environment.

    Raises:
        CompileError: It does not compile.
        ConfigError: cuda-bindings is not installed.
        TransportError: A driver call fails.

    Collective: no; of processes that share a cache and ask at once, one compiles and the others wait.
    """
    found = _kernels.get((spec, device_idx))
    if found is None:
        compiled = (builder or default_builder()).build(spec, device_arch(device_idx))
        with _kernels_lock:
            found = _kernels.get((spec, device_idx))
            if found is None:
                found = _kernels[spec, device_idx] = Kernel(spec, compiled, device_idx)
    return found


def get_kernels(specs: Iterable[KernelSpec], device_idx: int, *, builder: Builder | None = None) -> list[Kernel]:
    """The kernels of several specs, as `get_kernel` gives them; those that are not there yet are compiled side by side.

    Args:
        specs: The kernels.
        device_idx: The device, as torch numbers it.
        builder: As for `get_kernel`.

    Raises:
        CompileError, ConfigError, TransportError: As `get_kernel`.

    Collective: no; as `get_kernel`.
    """
    wanted = list(specs)
    missing = [spec for spec in dict.fromkeys(wanted) if (spec, device_idx) not in _kernels]
    if missing:
        (builder or default_builder()).build_all(missing, device_arch(device_idx))
    return [get_kernel(spec, device_idx, builder=builder) for spec in wanted]
