"""Owns what all test suites share: the rank pools of a session, and compilers. It holds no test and no test data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from deep_ep_core.jit import Compiler
    from deep_ep_core.local import RankPool
    from deep_ep_core.local.config import Device

# Each rank holds torch in memory.
_MAX_LIVE_POOLS = 2
# And a GPU pool may hold a server on the GPUs that serves no other pool's ranks.
_MAX_LIVE_GPU_POOLS = 1

# Every warning of nvcc is an error, and the host compiler reads the headers too.
_STRICT_FLAGS = "-Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror"


class RankPools:
    """The rank pools of one kind; called with a shape, gives a usable pool, the same one as before where it can."""

    def __init__(self, device: Device, max_live: int) -> None:
        self._device = device
        self._max_live = max_live
        # The most recently used pool is last.
        self._pools: dict[tuple[int, int], RankPool] = {}

    def __call__(self, num_ranks: int, num_nodes: int = 1) -> RankPool:
        from deep_ep_core.local import RankPool

        shape = (num_ranks, num_nodes)
        pool = self._pools.pop(shape, None)
        if pool is None:
            while len(self._pools) >= self._max_live:
                self._pools.pop(next(iter(self._pools))).close()
            pool = RankPool(num_ranks, num_nodes=num_nodes, device=self._device)
        elif pool.is_broken:
            pool.restart()
        self._pools[shape] = pool
        return pool

    def close(self) -> None:
        """End all of them; the next call starts a new one."""
        while self._pools:
            self._pools.popitem()[1].close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-ranks", type=int, default=1, metavar="N", help="ranks of the tests marked gpu, one a GPU (default 1)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs GPUs where there are too few; the `gpu` session counts them first and may not skip."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    num_needed, num_gpus = config.getoption("--gpu-ranks"), torch.cuda.device_count()
    if num_gpus < num_needed:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs {num_needed} GPUs, has {num_gpus}"))


@pytest.fixture(scope="session")
def gpu_ranks(request: pytest.FixtureRequest) -> int:
    """How many ranks a test marked gpu uses."""
    return int(request.config.getoption("--gpu-ranks"))


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPools]:
    """Rank pools that live through the session, since a rank takes seconds to import torch.

    `rank_pool(num_ranks, num_nodes=1)` starts, restarts or reuses a pool. Ask for it in each test: another test may
    have broken it, or pushed it out.
    """
    pools = RankPools("cpu", _MAX_LIVE_POOLS)
    try:
        yield pools
    finally:
        pools.close()


@pytest.fixture(scope="session")
def gpu_rank_pool() -> Iterator[RankPools]:
    """As `rank_pool`, for tests marked gpu: rank r has GPU r % num_gpus, so one GPU serves any number of ranks.

    A rank takes the GPU `LOCAL_RANK % device_count`. The default group is gloo.
    """
    pools = RankPools("cuda", _MAX_LIVE_GPU_POOLS)
    try:
        yield pools
    finally:
        pools.close()


@pytest.fixture(params=["nvcc", "nvrtc"])
def compiler(request: pytest.FixtureRequest, tmp_path: Path) -> Compiler:
    """Each of the two compilers of kernels in turn, without NCCL's headers, where it is there; nvcc is strict."""
    from deep_ep_core.jit import JitOptions
    from deep_ep_core.jit.compiler import NvccCompiler, NvrtcCompiler
    from deep_ep_core.jit.toolchain import find_nvcc, find_nvrtc, find_toolkit_headers

    options = JitOptions(cache_dir=tmp_path)
    if request.param == "nvrtc":
        nvrtc = find_nvrtc()
        if isinstance(nvrtc, str):
            pytest.skip(f"no NVRTC: {nvrtc}")
        return NvrtcCompiler(nvrtc, find_toolkit_headers(options), options)
    nvcc = find_nvcc(options)
    if nvcc is None:
        pytest.skip("no nvcc was found")
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {_STRICT_FLAGS}"
    return NvccCompiler(nvcc, options, None, {**os.environ, "NVCC_APPEND_FLAGS": flags})
