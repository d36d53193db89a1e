"""Runs the JIT on a GPU: both compilers, every launch attribute, results against torch, host time of launch and start.

usage: python gpu_check.py

Not a pytest module: it needs a GPU of compute capability 9.0 or newer, torch with CUDA, cuda-bindings, and nvcc or
NVRTC. Prints three tables; the exit status is 1 if a result is wrong.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import toy_kernels
from check_warm_start import check_warm_start
from toy_kernels import MAX_THREADS, ScaleConfig, ScaleParams, Vector, Wait

from deep_ep_core.errors import TransportError
from deep_ep_core.jit import Builder, Compiler, JitOptions, Kernel, LaunchShape, PreparedLaunch, device_arch
from deep_ep_core.jit.choice import CompilerChoice
from deep_ep_core.jit.compiler import NvrtcCompiler
from deep_ep_core.jit.toolchain import find_nvcc

DEVICE_IDX = 0
NUM_VALUES = 1_000_003  # no multiple of anything that the kernels count in
FACTOR, BIAS, CLUSTER_BLOCKS = 3, 5.0, 4
NUM_LAUNCHES = 10_000
# Fewer than the driver queues, so that the host never waits for the device while its time is taken.
LAUNCHES_A_BATCH = 500


def main() -> int:
    device = torch.device("cuda", DEVICE_IDX)
    torch.cuda.set_device(device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {device_arch(DEVICE_IDX)}")
    is_right = True
    with tempfile.TemporaryDirectory() as cache_dir:
        options = JitOptions(cache_dir=Path(cache_dir), ptxas_check=True)
        compilers = find_compilers(options)
        print(f"\n{'compiler':<16}{'kernel':<18}{'compile ms':>11}{'cached ms':>11}  result")
        for compiler in compilers:
            for wait in Wait:
                is_right &= check_variant(options, compiler, wait)
        kernel = load(Builder(options, compiler=compilers[0]), Wait.NOTHING)
        for name, check in (
            ("launch from a new thread", check_new_thread),
            ("launch in a CUDA graph", check_graph),
            ("100 KiB of shared memory", check_shared_memory),
            ("too much shared memory", check_too_much_shared_memory),
        ):
            is_right &= report(f"{name:<56}", check(kernel))
        print(f"\n{'host time of one call, ' + str(NUM_LAUNCHES) + ' calls':<56}{'median us':>11}{'best us':>11}")
        for name, call in timed_calls(Builder(options, compiler=compilers[0])):
            median_us, best_us = host_time_us(call)
            print(f"{name:<56}{median_us:>11.2f}{best_us:>11.2f}")
    is_right &= check_warm_start([compiler.identity.split()[0] for compiler in compilers])
    print("\nall right" if is_right else "\nWRONG")
    return 0 if is_right else 1


def find_compilers(options: JitOptions) -> list[Compiler]:
    compilers: list[Compiler] = []
    nvcc = find_nvcc(options)
    if nvcc is not None:
        compilers.append(CompilerChoice(dataclasses.replace(options, nvcc_compiler=nvcc.path)).choose(needs_nccl=False))
    preferred = CompilerChoice(options).choose(needs_nccl=False)
    if isinstance(preferred, NvrtcCompiler):
        compilers.append(preferred)
    for kind in {"nvcc", "nvrtc"} - {compiler.identity.split()[0] for compiler in compilers}:
        print(f"{kind} was not found and is not checked")
    return compilers


def load(builder: Builder, wait: Wait) -> Kernel:
    spec = toy_kernels.scale_spec(ScaleConfig(factor=FACTOR, wait=wait))
    return Kernel(spec, builder.build(spec, device_arch(DEVICE_IDX)), DEVICE_IDX)


def shape_for(wait: Wait, **changes: Any) -> LaunchShape:
    num_sms = torch.cuda.get_device_properties(DEVICE_IDX).multi_processor_count
    values: dict[str, Any] = {"grid": (num_sms // CLUSTER_BLOCKS * CLUSTER_BLOCKS, 1, 1), "block": (MAX_THREADS, 1, 1)}
    values["cooperative"] = wait is Wait.GRID
    values["cluster"] = (CLUSTER_BLOCKS, 1, 1) if wait is Wait.CLUSTER else None
    values["programmatic"] = wait is Wait.PREVIOUS_KERNEL
    return LaunchShape(**(values | changes))


class Data:
    """The tensors of one launch, and its parameters. Small whole numbers, so that results are exact."""

    def __init__(self, num_values: int = NUM_VALUES) -> None:
        self.x = (torch.arange(num_values, device="cuda") % 1009).float()
        self.y = torch.full_like(self.x, -1.0)
        self.num_arrived = torch.zeros(1, dtype=torch.int32, device="cuda")

    def params(self) -> ScaleParams:
        return ScaleParams(
            x=self.x.data_ptr(),
            y=Vector(values=self.y.data_ptr(), num_values=self.x.numel()),
            bias=BIAS,
            num_arrived=self.num_arrived.data_ptr(),
            stamps=(0, 0),
            first_idx=0,
            is_reversed=False,
        )

    def is_right(self, wait: Wait) -> bool:
        torch.cuda.synchronize()
        wanted = self.x * FACTOR + BIAS + (CLUSTER_BLOCKS if wait is Wait.CLUSTER else 0)
        return torch.equal(self.y, wanted.flip(0) if wait is Wait.GRID else wanted)


def stream_handle() -> int:
    return torch.cuda.current_stream().cuda_stream


def report(what: str, is_right: bool) -> bool:
    print(f"{what}  {'right' if is_right else 'WRONG'}")
    return is_right


def check_variant(options: JitOptions, compiler: Compiler, wait: Wait) -> bool:
    start = time.perf_counter()
    load(Builder(options, compiler=compiler), wait)
    compile_ms = (time.perf_counter() - start) * 1e3
    start = time.perf_counter()
    kernel = load(Builder(options, compiler=compiler), wait)
    cached_ms = (time.perf_counter() - start) * 1e3
    prepared = PreparedLaunch(kernel, shape_for(wait))
    data = Data()
    prepared(data.params(), stream_handle())
    is_right = data.is_right(wait)
    if wait is Wait.PREVIOUS_KERNEL:
        # The second launch may start early, but must not read before the first has written.
        second = Data()
        for _ in range(20):
            second.x, second.y = torch.zeros_like(data.x), torch.full_like(data.x, -1.0)
            first_params, second_params = data.params(), second.params()
            first_params.y.values = second.x.data_ptr()
            prepared(first_params, stream_handle())
            prepared(second_params, stream_handle())
            is_right &= second.is_right(wait) and torch.equal(second.x, data.x * FACTOR + BIAS)
    name = wait.name.lower()
    return report(f"{compiler.identity:<16}{name:<18}{compile_ms:>11.1f}{cached_ms:>11.1f}", is_right)


def check_new_thread(kernel: Kernel) -> bool:
    """A thread in which no context is current yet, such as autograd's."""
    prepared, data = PreparedLaunch(kernel, shape_for(Wait.NOTHING)), Data()
    params, stream = data.params(), torch.cuda.Stream()
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: prepared(params, stream.cuda_stream))
    thread.start()
    thread.join()
    return data.is_right(Wait.NOTHING)


def check_graph(kernel: Kernel) -> bool:
    prepared, data = PreparedLaunch(kernel, shape_for(Wait.NOTHING)), Data()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # The graph keeps a copy: the parameters themselves may go.
        prepared(data.params(), stream_handle())
    data.x += 1
    graph.replay()
    return data.is_right(Wait.NOTHING)


def check_shared_memory(kernel: Kernel) -> bool:
    prepared, data = PreparedLaunch(kernel, shape_for(Wait.NOTHING, smem_bytes=100 * 1024)), Data()
    prepared(data.params(), stream_handle())
    return data.is_right(Wait.NOTHING)


def check_too_much_shared_memory(kernel: Kernel) -> bool:
    """An error in words, and a context that still works."""
    try:
        PreparedLaunch(kernel, shape_for(Wait.NOTHING, smem_bytes=10 * 1024 * 1024))
    except TransportError as error:
        print(f"    ({error})")
        return error.call == "cuKernelSetAttribute" and check_shared_memory(kernel)
    return False


def timed_calls(builder: Builder) -> list[tuple[str, Callable[[], object]]]:
    """What a launch is made of, on one small block so that the device is never what is waited for."""
    data = Data(num_values=MAX_THREADS)
    params, stream = data.params(), stream_handle()
    calls: list[tuple[str, Callable[[], object]]] = []
    for wait, name in (
        (Wait.NOTHING, "launch"),
        (Wait.CLUSTER, "launch with a cluster"),
        (Wait.PREVIOUS_KERNEL, "launch, programmatic"),
    ):
        grid = (CLUSTER_BLOCKS if wait is Wait.CLUSTER else 1, 1, 1)
        prepared = PreparedLaunch(load(builder, wait), shape_for(wait, grid=grid))
        calls.append((name, lambda prepared=prepared: prepared(params, stream)))  # type: ignore[misc]
    # The barrier counts arrivals and nobody resets it here: the plain kernel, launched cooperatively.
    cooperative = PreparedLaunch(load(builder, Wait.NOTHING), shape_for(Wait.NOTHING, grid=(1, 1, 1), cooperative=True))
    calls.append(("launch, cooperative", lambda: cooperative(params, stream)))
    calls.append(("making the parameters", data.params))
    plain = PreparedLaunch(load(builder, Wait.NOTHING), shape_for(Wait.NOTHING, grid=(1, 1, 1)))
    calls.append(("making the parameters and launch", lambda: plain(data.params(), stream_handle())))
    calls.append(("for comparison: torch's y.fill_(0)", lambda: data.y.fill_(0)))
    return calls


def host_time_us(call: Callable[[], object]) -> tuple[float, float]:
    """Median and best time of one call, over batches."""
    batches = []
    for _ in range(NUM_LAUNCHES // LAUNCHES_A_BATCH):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(LAUNCHES_A_BATCH):
            call()
        batches.append((time.perf_counter() - start) / LAUNCHES_A_BATCH * 1e6)
    torch.cuda.synchronize()
    return statistics.median(batches), min(batches)


if __name__ == "__main__":
    sys.exit(main())
