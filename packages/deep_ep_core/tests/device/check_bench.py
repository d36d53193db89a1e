"""What the parts of gpu_check.py share: kernels that are compiled and launched, the table, and sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from deep_ep_core.jit import Builder, KernelSpec, LaunchShape, ParamsStruct, PreparedLaunch, get_kernel
from deep_ep_core.wait import TimeoutLog, WaitParams


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    figure: str
    is_right: bool


@dataclass
class Bench:
    """One rank's device.

    `is_small` makes everything small enough for compute-sanitizer. `timeout_s` is that of waits that must not expire.
    """

    device: torch.device
    builder: Builder
    rank: int
    is_small: bool
    timeout_s: float
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log = TimeoutLog(rank=self.rank, device=self.device)

    def size(self, full: int, small: int) -> int:
        return small if self.is_small else full

    def prepare(self, spec: KernelSpec, *, grid: int, block: int, **shape: Any) -> PreparedLaunch:
        kernel = get_kernel(spec, self.device.index, builder=self.builder)
        return PreparedLaunch(kernel, LaunchShape(grid=(grid, 1, 1), block=(block, 1, 1), **shape))

    def run(self, spec: KernelSpec, params: ParamsStruct, *, grid: int, block: int, **shape: Any) -> float:
        """Launch once and wait; returns milliseconds on the device."""
        launch = self.prepare(spec, grid=grid, block=block, **shape)
        return self.time_ms(launch, params)

    def time_ms(self, launch: PreparedLaunch, params: ParamsStruct) -> float:
        return self.time_work_ms(lambda: launch(params, self.stream))

    def time_work_ms(self, work: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end))

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def wait(self, *phases: str, timeout_s: float | None = None) -> WaitParams:
        return self.log.params(first_phase=self.log.add_phases(phases), timeout_s=timeout_s or self.timeout_s)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def report(self, what: str, figure: str, is_right: bool) -> None:
        self.rows.append(Row(what, figure, is_right))

    def works(self) -> bool:
        """Whether the CUDA context still computes."""
        x = torch.full((64, 64), 2.0, device=self.device)
        return bool(((x @ x) == 256.0).all())


def merge_rows(all_rows: list[list[Row]]) -> list[Row]:
    """Rank 0's rows and figures; right where every rank is."""
    merged = []
    for same in zip(*all_rows, strict=True):
        wrong = [rank for rank, row in enumerate(same) if not row.is_right]
        figure = same[0].figure if not wrong else f"wrong on {wrong}: {same[wrong[0]].figure}"
        merged.append(dataclasses.replace(same[0], figure=figure, is_right=not wrong))
    return merged


def print_table(rows: list[Row]) -> bool:
    """Returns whether all is right."""
    width = max(len(row.what) for row in rows)
    for row in rows:
        print(f"{row.what:<{width}}  {'right' if row.is_right else 'WRONG'}  {row.figure}", flush=True)
    return all(row.is_right for row in rows)
