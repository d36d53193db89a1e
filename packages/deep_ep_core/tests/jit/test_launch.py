"""Loading and launching, against a driver that writes down what it is asked; `gpu_check.py` does it on a GPU."""

from __future__ import annotations

import ctypes
import enum
import gc
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deep_ep_core.errors import ConfigError, TransportError
from deep_ep_core.jit import Builder, JitOptions, Kernel, LaunchShape, ParamsStruct, PreparedLaunch, launch_once
from deep_ep_core.jit.driver import load_driver


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class FakeDriver:
    """The functions of `cuda.bindings.driver` that the JIT calls, with the calls in a list."""

    CUresult = Status
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="smem",
        CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED="big",
    )
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_COOPERATIVE="cooperative",
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION="cluster",
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="programmatic",
    )
    CUlaunchConfig = SimpleNamespace
    CUstream = int

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.launches: list[SimpleNamespace] = []
        self.params_bytes = 0
        self.launch_status = Status.CUDA_SUCCESS

    @staticmethod
    def CUlaunchAttribute() -> SimpleNamespace:  # noqa: N802  # the driver's name
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def __getattr__(self, name: str) -> Any:
        answers = {
            "cuDeviceGetAttribute": (9,),
            "cuDeviceGet": ("device",),
            "cuDevicePrimaryCtxRetain": ("context",),
            "cuCtxPopCurrent": ("context",),
            "cuLibraryLoadData": ("library",),
            "cuLibraryGetKernel": (77,),
            "cuKernelGetFunction": ("function",),
            "cuKernelGetParamInfo": (0, self.params_bytes),
            "cuGetErrorString": (b"invalid argument",),
            "cuInit": (),
            "cuCtxPushCurrent": (),
            "cuKernelSetAttribute": (),
        }

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, *args))
            return (Status.CUDA_SUCCESS, *answers[name])

        return call

    def cuLaunchKernelEx(self, config: Any, handle: int, params: int, extra: int) -> tuple[Status]:  # noqa: N802
        address = ctypes.c_void_p.from_address(params).value
        assert address is not None
        content = ctypes.string_at(address, self.params_bytes)
        self.launches.append(SimpleNamespace(config=config, handle=handle, content=content, extra=extra))
        return (self.launch_status,)

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, toy: ModuleType) -> Iterator[FakeDriver]:
    fake = FakeDriver()
    fake.params_bytes = ctypes.sizeof(toy.ScaleParams)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    load_driver.cache_clear()
    yield fake
    load_driver.cache_clear()


@pytest.fixture
def kernel(driver: FakeDriver, options: JitOptions, fake_compiler: Any, toy: ModuleType) -> Kernel:
    spec = toy.scale_spec()
    return Kernel(spec, Builder(options, compiler=fake_compiler).build(spec, "sm_90a"), 0)


def params_of(toy: ModuleType, **changes: Any) -> ParamsStruct:
    values = {
        "x": 4096,
        "y": toy.Vector(values=8192, num_values=33),
        "bias": 0.5,
        "num_arrived": None,
        "stamps": (ctypes.c_uint64 * 2)(1, 2),
        "first_idx": -1,
        "is_reversed": True,
    }
    params: ParamsStruct = toy.ScaleParams(**(values | changes))
    return params


def shape_of(**changes: Any) -> LaunchShape:
    return LaunchShape(**({"grid": (4, 1, 1), "block": (128, 1, 1)} | changes))


def test_code_is_on_the_device_before_the_first_launch(kernel: Kernel, driver: FakeDriver) -> None:
    """A first launch that loads code waits for kernels that run, and those may wait for the launch."""
    assert driver.named("cuLibraryLoadData")[0][0] == kernel.compiled.cubin
    assert driver.named("cuLibraryGetKernel") == [("library", b"scale_kernel")]
    names = [call[0] for call in driver.calls]
    assert names.index("cuCtxPushCurrent") < names.index("cuKernelGetFunction") < names.index("cuCtxPopCurrent")


def test_parameters_are_passed_by_address_as_the_mirror_lays_them_out(
    kernel: Kernel, driver: FakeDriver, toy: ModuleType
) -> None:
    params = params_of(toy)
    PreparedLaunch(kernel, shape_of())(params, 0x7F00)
    (launched,) = driver.launches
    assert launched.content == bytes(params)
    assert (launched.handle, launched.config.hStream, launched.extra) == (77, 0x7F00, 0)


def test_shape_is_passed_on(kernel: Kernel, driver: FakeDriver, toy: ModuleType) -> None:
    shape = shape_of(grid=(4, 2, 3), block=(8, 4, 2), smem_bytes=1024)
    PreparedLaunch(kernel, shape)(params_of(toy), 0)
    config = driver.launches[0].config
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (4, 2, 3)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (8, 4, 2)
    assert (config.sharedMemBytes, config.attrs, config.numAttrs) == (1024, [], 0)


def test_each_attribute_is_set_when_asked_for(kernel: Kernel, driver: FakeDriver, toy: ModuleType) -> None:
    launch_once(
        kernel,
        params_of(toy),
        grid=(4, 2, 1),
        block=(128, 1, 1),
        stream=0,
        cooperative=True,
        cluster=(2, 2, 1),
        programmatic=True,
    )
    config = driver.launches[0].config
    assert config.numAttrs == 3
    cooperative, cluster, programmatic = config.attrs
    assert (cooperative.id, cooperative.value.cooperative) == ("cooperative", 1)
    assert (cluster.id, vars(cluster.value.clusterDim)) == ("cluster", {"x": 2, "y": 2, "z": 1})
    assert programmatic.id == "programmatic"
    assert programmatic.value.programmaticStreamSerializationAllowed == 1


def test_configuration_is_made_once_a_stream_and_never_changed(
    kernel: Kernel, driver: FakeDriver, toy: ModuleType
) -> None:
    """Threads launch at once, and the driver reads a configuration while another thread runs."""
    prepared = PreparedLaunch(kernel, shape_of())
    for stream in (1, 2, 1, 2):
        prepared(params_of(toy), stream)
    configs = [launched.config for launched in driver.launches]
    assert [config.hStream for config in configs] == [1, 2, 1, 2]
    assert configs[0] is configs[2]
    assert configs[1] is configs[3]
    assert configs[0] is not configs[1]


def test_threads_pass_their_own_parameters(kernel: Kernel, driver: FakeDriver, toy: ModuleType) -> None:
    prepared = PreparedLaunch(kernel, shape_of())

    def run(stream: int) -> None:
        for launch_idx in range(200):
            prepared(params_of(toy, first_idx=stream * 1000 + launch_idx), stream)

    threads = [threading.Thread(target=run, args=(stream,)) for stream in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [
        (launched.config.hStream, toy.ScaleParams.from_buffer_copy(launched.content)) for launched in driver.launches
    ]
    assert sorted(params.first_idx for _, params in seen) == [
        stream * 1000 + launch_idx for stream in range(4) for launch_idx in range(200)
    ]
    assert all(params.first_idx // 1000 == stream for stream, params in seen)


def test_streams_without_end_do_not_fill_the_memory(kernel: Kernel, toy: ModuleType) -> None:
    prepared, params = PreparedLaunch(kernel, shape_of()), params_of(toy)
    for stream in range(1000):
        prepared(params, stream)
    gc.collect()
    assert len(prepared._configs) <= 64


def test_shared_memory_limit_is_raised_once_and_never_lowered(
    kernel: Kernel, driver: FakeDriver, toy: ModuleType
) -> None:
    for smem_bytes in (0, 48 * 1024, 100_000, 60_000, 100_000, 200_000):
        prepared = PreparedLaunch(kernel, shape_of(smem_bytes=smem_bytes))
        prepared(params_of(toy), 0)
        prepared(params_of(toy), 0)
    assert driver.named("cuKernelSetAttribute") == [("smem", 100_000, 77, "device"), ("smem", 200_000, 77, "device")]


def test_large_cluster_is_asked_for(kernel: Kernel, driver: FakeDriver) -> None:
    PreparedLaunch(kernel, shape_of(grid=(8, 1, 1), cluster=(8, 1, 1)))
    assert driver.named("cuKernelSetAttribute") == []
    PreparedLaunch(kernel, shape_of(grid=(16, 1, 1), cluster=(16, 1, 1)))
    assert driver.named("cuKernelSetAttribute") == [("big", 1, 77, "device")]


def test_failed_launch_names_call_code_and_kernel(kernel: Kernel, driver: FakeDriver, toy: ModuleType) -> None:
    driver.launch_status = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(TransportError, match=r"Kernel\(scale\..*CUDA_ERROR_INVALID_VALUE \(invalid arg") as caught:
        PreparedLaunch(kernel, shape_of())(params_of(toy), 0)
    assert (caught.value.call, caught.value.code_name) == ("cuLaunchKernelEx", "CUDA_ERROR_INVALID_VALUE")


def test_params_of_another_kernel_are_refused(kernel: Kernel, toy: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"scale must be given ScaleParams \(got Vector\)"):
        PreparedLaunch(kernel, shape_of())(toy.Vector(values=0, num_values=1), 0)


def test_kernel_whose_parameter_has_another_size_is_refused(
    driver: FakeDriver, options: JitOptions, fake_compiler: Any, toy: ModuleType
) -> None:
    driver.params_bytes += 8
    spec = toy.scale_spec()
    with pytest.raises(ConfigError, match="ScaleParams must be as large as the parameter of scale"):
        Kernel(spec, Builder(options, compiler=fake_compiler).build(spec, "sm_90a"), 0)


def test_block_over_the_launch_bounds_is_refused(kernel: Kernel) -> None:
    with pytest.raises(ConfigError, match=r"block of scale must be at most 256 threads.*got \(512, 1, 1\)"):
        PreparedLaunch(kernel, shape_of(block=(512, 1, 1)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": (0, 1, 1)}, "grid must be three sizes of at least 1"),
        ({"block": (1, 1)}, "block must be three sizes"),
        ({"smem_bytes": -1}, "smem_bytes must be at least 0"),
        ({"cluster": (3, 1, 1)}, "grid must be a whole number of clusters"),
    ],
)
def test_broken_shape_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shape_of(**changes)


def test_missing_cuda_bindings_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    load_driver.cache_clear()
    with pytest.raises(ConfigError, match=r"needs the package cuda-bindings .*install deep-ep-core\[cu13\]"):
        load_driver()
