"""Owns the launch of a loaded kernel: how its parameter struct is passed, and the launch attributes.

It does not order streams, and holds no tensor alive: what the parameters point to is the caller's.
"""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import dataclass
from typing import Any

from deep_ep_core.errors import ConfigError
from deep_ep_core.jit.driver import check_status, load_driver
from deep_ep_core.jit.module import Kernel
from deep_ep_core.jit.structs import ParamsStruct

__all__ = ["LaunchShape", "PreparedLaunch", "launch_once"]

_ONE_POINTER = ctypes.c_void_p * 1
_address_of = ctypes.addressof
# Configurations are kept by stream; a process that makes streams without end must not make these without end.
_MAX_STREAMS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchShape:
    """How a kernel is spread over the device.

    Attributes:
        grid: Blocks (x, y, z); also with a cluster this counts blocks.
        block: Threads a block (x, y, z).
        smem_bytes: Dynamic shared memory a block.
        cooperative: All blocks must be resident at once, so that they may wait for each other.
        cluster: Blocks a cluster (x, y, z); None for no cluster, or for that compiled into the kernel.
        programmatic: The kernel may start before the one in front of it in the stream ends (programmatic dependent
            launch); it must wait itself before it touches that one's results.

    Raises:
        ConfigError: A size is below 1, or the grid is no whole number of clusters.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem_bytes: int = 0
    cooperative: bool = False
    cluster: tuple[int, int, int] | None = None
    programmatic: bool = False

    def __post_init__(self) -> None:
        for name, sizes in (("grid", self.grid), ("block", self.block), ("cluster", self.cluster or (1, 1, 1))):
            if len(sizes) != 3 or min(sizes) < 1:
                raise ConfigError(f"{name} must be three sizes of at least 1 (got {sizes})")
        if self.smem_bytes < 0:
            raise ConfigError(f"smem_bytes must be at least 0 (got {self.smem_bytes})")
        if self.cluster is not None and any(size % step for size, step in zip(self.grid, self.cluster, strict=True)):
            raise ConfigError(f"grid must be a whole number of clusters (got {self.grid}, clusters of {self.cluster})")


class PreparedLaunch:
    """A kernel with a launch shape: everything that a launch does not change is decided here.

    Safe to call from several threads: what a call changes is its own.

    Args:
        kernel: The kernel.
        shape: The launch shape.

    Raises:
        ConfigError: The shape does not fit what the kernel was compiled for.
        TransportError: The device does not have as much shared memory, or no clusters as large.
    """

    __slots__ = ("_configs", "_configs_lock", "_cu_launch", "_driver", "_handle", "_params_type", "kernel", "shape")

    def __init__(self, kernel: Kernel, shape: LaunchShape) -> None:
        spec = kernel.spec
        if math.prod(shape.block) > spec.max_threads_per_block:
            raise ConfigError(
                f"block of {spec.label} must be at most {spec.max_threads_per_block} threads, its launch bounds "
                f"(got {shape.block}); raise max_threads_per_block of its KernelSpec"
            )
        if spec.cluster is not None and shape.cluster not in (None, spec.cluster):
            raise ConfigError(f"cluster of {spec.label} is compiled in as {spec.cluster} (got {shape.cluster})")
        cluster_blocks = math.prod(shape.cluster or spec.cluster or (1, 1, 1))
        kernel.allow(smem_bytes=shape.smem_bytes, cluster_blocks=cluster_blocks)
        self.kernel = kernel
        self.shape = shape
        self._driver = load_driver()
        self._cu_launch = self._driver.cuLaunchKernelEx
        self._handle = kernel.handle
        self._params_type = spec.params_type
        # A configuration holds its stream and is never changed once it is made, so that threads may share it.
        self._configs: dict[int, Any] = {}
        self._configs_lock = threading.Lock()

    def __call__(self, params: ParamsStruct, stream: int) -> None:
        """Launch. Does not wait for the device.

        Args:
            params: The parameters; copied before the call returns.
            stream: Handle of the stream, `torch.cuda.Stream.cuda_stream`. It must belong to the kernel's device.

        Raises:
            ConfigError: The parameters are of another type than the kernel takes.
            TransportError: The launch fails.

        Stream: launches on `stream`. Collective: no.
        """
        if type(params) is not self._params_type:
            raise ConfigError(
                f"{self.kernel.spec.label} must be given {self._params_type.__name__} (got {type(params).__name__})"
            )
        config = self._configs.get(stream)
        if config is None:
            config = self._make_config(stream)
        arguments = _ONE_POINTER(_address_of(params))
        status = self._cu_launch(config, self._handle, _address_of(arguments), 0)[0]
        if status:
            check_status(self._driver, "cuLaunchKernelEx", status, what=f"{self.kernel!r} with {self.shape}")

    def _make_config(self, stream: int) -> Any:
        driver, shape = self._driver, self.shape
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = shape.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = shape.block
        config.sharedMemBytes = shape.smem_bytes
        config.hStream = driver.CUstream(stream)
        attributes = self._attributes()
        config.attrs = attributes
        config.numAttrs = len(attributes)
        with self._configs_lock:
            if len(self._configs) >= _MAX_STREAMS:
                self._configs.clear()
            self._configs[stream] = config
        return config

    def _attributes(self) -> list[Any]:
        driver, shape = self._driver, self.shape
        names = driver.CUlaunchAttributeID
        attributes = []
        if shape.cooperative:
            attribute = driver.CUlaunchAttribute()
            attribute.id = names.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = 1
            attributes.append(attribute)
        if shape.cluster is not None:
            attribute = driver.CUlaunchAttribute()
            attribute.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster = attribute.value.clusterDim
            cluster.x, cluster.y, cluster.z = shape.cluster
            attributes.append(attribute)
        if shape.programmatic:
            attribute = driver.CUlaunchAttribute()
            attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        return attributes

    def __repr__(self) -> str:
        return f"PreparedLaunch({self.kernel!r}, {self.shape})"


def launch_once(
    kernel: Kernel,
    params: ParamsStruct,
    *,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    stream: int,
    smem_bytes: int = 0,
    cooperative: bool = False,
    cluster: tuple[int, int, int] | None = None,
    programmatic: bool = False,
) -> None:
    """Launch a kernel once. Where it is launched often, keep a `PreparedLaunch` instead.

    Args:
        kernel: The kernel.
        params: The parameters; copied before the call returns.
        grid: See `LaunchShape`, as for all that follow.
        block: Threads a block.
        stream: Handle of the stream.
        smem_bytes: Dynamic shared memory a block.
        cooperative: All blocks must be resident at once.
        cluster: Blocks a cluster.
        programmatic: The kernel may start before the one in front of it ends.

    Raises:
        ConfigError: An argument does not fit the kernel.
        TransportError: The launch fails.

    Stream: launches on `stream`. Collective: no.
    """
    shape = LaunchShape(
        grid=grid,
        block=block,
        smem_bytes=smem_bytes,
        cooperative=cooperative,
        cluster=cluster,
        programmatic=programmatic,
    )
    PreparedLaunch(kernel, shape)(params, stream)
