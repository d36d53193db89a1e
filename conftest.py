"""Owns what all test suites share: the rank pools of a session. It holds no test and no test data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from deep_ep_core.local import RankPool

# Each rank holds torch in memory.
_MAX_LIVE_POOLS = 2


class RankPools(Protocol):
    """The `rank_pool` fixture: gives a usable pool of that shape, the same one as before where it can."""

    def __call__(self, num_ranks: int, num_nodes: int = 1) -> RankPool: ...


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
    from deep_ep_core.local import RankPool

    # The most recently used pool is last.
    pools: dict[tuple[int, int], RankPool] = {}

    def get(num_ranks: int, num_nodes: int = 1) -> RankPool:
        shape = (num_ranks, num_nodes)
        pool = pools.pop(shape, None)
        if pool is None:
            while len(pools) >= _MAX_LIVE_POOLS:
                pools.pop(next(iter(pools))).close()
            pool = RankPool(num_ranks, num_nodes=num_nodes)
        elif pool.is_broken:
            pool.restart()
        pools[shape] = pool
        return pool

    try:
        yield get
    finally:
        for pool in pools.values():
            pool.close()
