"""Ranks that come late, die, or refuse, and what each rank is told.

Every scenario but the deadly one has a group of its own: a timeout breaks a group's connections for good, and the
pool's own group must live on. What comes late comes after the others gave up, however long that takes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from core_exchanges import make_transport

from deep_ep_core.errors import CommTimeoutError
from deep_ep_core.roll_call import RollCall
from deep_ep_core.transport import CollectiveTransport

ONES = [1] * 4


def failure_of(call: Callable[[], object]) -> dict[str, object] | None:
    """What a call's timeout says, and after how long; None if it succeeds."""
    started = time.monotonic()
    try:
        call()
    except CommTimeoutError as error:
        return {
            "peers": list(error.peers),
            "rank": error.rank,
            "phase": error.phase,
            "reports": error.reports,
            "message": str(error),
            "elapsed_s": time.monotonic() - started,
        }
    return None


def exchange_ones(transport: CollectiveTransport, is_absent: bool = False) -> None:
    """An operation with one exchange, of which a rank may skip the exchange."""
    operation = transport.begin("move", [])
    if is_absent:
        dist.barrier()
    else:
        try:
            operation.exchange_rows(torch.ones(4, 2), ONES, ONES, "payload")
        finally:
            dist.barrier()


def come_after_the_others_gave_up(late_rank: int, timeout_s: float) -> tuple[dict[str, object] | None, str]:
    """Returns what this rank is told, and what the next use of the transport says.

    In between, the ranks that failed refuse a call of their own, which must not hide what they reported.
    """
    group = dist.new_group()
    transport = make_transport(group, timeout_s)
    transport.begin("turn", [])
    if dist.get_rank() == late_rank:
        dist.barrier()
        told = failure_of(lambda: transport.begin("move", []))
    else:
        told = failure_of(lambda: transport.begin("move", []))
        transport.report_rejection("move", "a refusal after the failure")
        dist.barrier()
    try:
        transport.begin("turn", [])
        following = "nothing"
    except Exception as error:
        following = f"{type(error).__name__}: {error}"
    dist.destroy_process_group(group)
    return told, following


def refuse(refusing: list[int], timeout_s: float) -> dict[str, object] | None:
    """Some ranks refuse an operation, and leave."""
    group = dist.new_group()
    transport = make_transport(group, timeout_s)
    told = None
    if dist.get_rank() in refusing:
        transport.report_rejection("move", f"x of rank {dist.get_rank()} is bad")
    else:
        told = failure_of(lambda: transport.begin("move", []))
    dist.barrier()
    dist.destroy_process_group(group)
    return told


def stay_away_after_refusals(absent: int, refusing: list[int], timeout_s: float) -> dict[str, object] | None:
    """Some ranks refuse an operation, take part in it after all, and then one that never refused stays away."""
    group = dist.new_group()
    transport = make_transport(group, timeout_s)
    rank = dist.get_rank()
    if rank in refusing:
        transport.report_rejection("move", "the first attempt was bad")
    # Every refusal is out before anybody begins.
    dist.barrier()
    told = failure_of(lambda: exchange_ones(transport, is_absent=rank == absent))
    dist.destroy_process_group(group)
    return told


class SilentStore:
    """A store whose host is gone: its calls do not return until they are released."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def set(self, key: str, text: str) -> None:
        self.released.wait()

    def check(self, keys: list[str]) -> bool:
        self.released.wait()
        return False


def fail_without_a_store(late_rank: int, timeout_s: float, is_silent: bool) -> dict[str, object] | None:
    """One rank stays away, and the store cannot be asked who: there is none, or it does not answer."""
    group = dist.new_group()
    transport = make_transport(group, timeout_s)
    store = SilentStore()
    transport._roll_call = RollCall(store if is_silent else None, rank=transport.rank, num_ranks=4)
    told = None if dist.get_rank() == late_rank else failure_of(lambda: transport.begin("move", []))
    store.released.set()
    dist.barrier()
    dist.destroy_process_group(group)
    return told


def record_waits(timeout_s: float, pause_s: float) -> list[list[float]]:
    """How long the backend is told to wait, at most, in each exchange of an operation with pauses between them."""
    group = dist.new_group()
    transport = make_transport(group, timeout_s)
    waits: list[list[float]] = []
    batch = dist.batch_isend_irecv

    class RecordedWork:
        def __init__(self, work: dist.Work) -> None:
            self._work = work

        def wait(self, timeout: timedelta) -> None:
            waits[-1].append(timeout.total_seconds())
            # The operation's own deadline is only looked at, so that a slow machine does not fail here.
            self._work.wait(timedelta(seconds=60))

    def batch_recorded(ops: list[dist.P2POp]) -> list[RecordedWork]:
        waits.append([])
        return [RecordedWork(work) for work in batch(ops)]

    dist.batch_isend_irecv = batch_recorded
    try:
        operation = transport.begin("move", [])
        for _ in range(2):
            time.sleep(pause_s)
            operation.exchange_rows(torch.ones(4, 2), ONES, ONES, "payload")
    finally:
        dist.batch_isend_irecv = batch
    dist.destroy_process_group(group)
    return waits


def die(victim: int, timeout_s: float) -> dict[str, object] | None:
    """One rank is killed after the ranks agreed and before it sends its rows."""
    transport = make_transport(timeout_s=timeout_s)
    operation = transport.begin("move", [])
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return failure_of(lambda: operation.exchange_rows(torch.ones(4, 2), ONES, ONES, "payload"))
