"""Calls that must be refused, and ranks that disagree, refuse, come late or die; what the others are told."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from engram_cases import FP8, MIB, Whole, even_counts, fetch_and_check, make_table

from deep_ep_core.errors import ConfigError
from deep_ep_engram import EngramTable, collective, get_engram_storage_size_hint

Words = tuple[str, ...]


class Setup:
    """A table with content to spoil calls of."""

    def __init__(self) -> None:
        self.whole = Whole(counts=even_counts(10))
        self.table = make_table()
        self.whole.write(self.table)
        self.blank = make_table()
        self.in_device_memory = EngramTable(None, 4 * MIB, num_cpu_timeout_secs=30)
        self.in_device_memory.engram_write(torch.ones(10, 1024, dtype=torch.bfloat16))
        self.fp8 = torch.ones(10, 16).to(FP8)

    def fetch(self, indices: object, **arguments: object) -> object:
        return self.table.engram_fetch(indices, **arguments)

    def write(self, storage: object, sf: object = None) -> None:
        self.table.engram_write(storage, sf)


def closed(_: Setup) -> None:
    table = make_table()
    table.close()
    table.engram_fetch(torch.zeros(1, 1, dtype=torch.int32))


ONE = torch.zeros(4, 2, dtype=torch.int32)
ROWS = torch.ones(10, 16, dtype=torch.bfloat16)
STORAGE = "storage must be [num_entries, hidden] bfloat16 or float8_e4m3fn, contiguous"
INDICES = "indices must be [num_tokens, num_entries_per_token] int32 or int64, contiguous"

# Name: (call, words that its message must hold).
REJECTIONS: dict[str, tuple[Callable[[Setup], object], Words]] = {
    "an index at the end": (
        lambda s: s.fetch(torch.tensor([[0, 1], [2, 20]])),
        ("indices must lie in [0, 20)", "20 at [1, 1], 1 such of 4"),
    ),
    "negative indices": (
        lambda s: s.fetch(torch.tensor([[0], [-1], [-5]], dtype=torch.int32)),
        ("indices must lie in [0, 20)", "-1 at [1, 0], 2 such of 3"),
    ),
    "indices of one axis": (lambda s: s.fetch(ONE[0]), (INDICES, "[2] int32")),
    "indices of floats": (lambda s: s.fetch(ONE.float()), (INDICES, "float32")),
    "indices with gaps": (lambda s: s.fetch(ONE.t()), (INDICES, "with strides [1, 2]")),
    "indices elsewhere": (lambda s: s.fetch(ONE.to("meta")), ("on the table's device cpu", "on meta")),
    "indices that are no tensor": (lambda s: s.fetch([[0]]), (INDICES, "list")),
    "negative QPs": (lambda s: s.fetch(ONE, num_qps=-1), ("num_qps must be an integer >= 0", "-1")),
    "QPs that are no integer": (lambda s: s.fetch(ONE, num_qps=1.5), ("num_qps must be an integer >= 0", "1.5")),
    "a fetch too large": (
        lambda s: s.fetch(torch.zeros(6 * MIB // 32 + 1, 1, dtype=torch.int32)),
        ("the rows of one fetch must fit into the table's 6291456 bytes for them", "6291488 bytes", "fetch less"),
    ),
    "a fetch too large beside entries": (
        lambda s: s.in_device_memory.engram_fetch(torch.zeros(1025, 1, dtype=torch.int32)),
        ("the rows of one fetch must fit into the table's 2097152 bytes for them", "2099200 bytes"),
    ),
    "a fetch before a write": (
        lambda s: s.blank.engram_fetch(ONE),
        ("engram_fetch needs a table that was written", "call engram_write"),
    ),
    "a closed table": (closed, ("the table must be open", "make a new one")),
    "storage of one axis": (lambda s: s.write(ROWS[0]), (STORAGE, "[16] bfloat16")),
    "storage of floats": (lambda s: s.write(ROWS.float()), (STORAGE, "float32")),
    "storage with gaps": (lambda s: s.write(ROWS[:, ::2]), (STORAGE, "with strides [16, 2]")),
    "storage without elements": (lambda s: s.write(ROWS[:, :0]), (STORAGE, "[10, 0]")),
    "storage elsewhere": (lambda s: s.write(ROWS.to("meta")), ("on the CPU or a CUDA device", "on meta")),
    "storage that is no tensor": (lambda s: s.write(None), (STORAGE, "NoneType")),
    "storage too large": (
        lambda s: s.write(torch.zeros(2 * MIB + 1, 1).to(FP8), torch.zeros(1, 1)),
        ("the entries of a rank must fit into the table's 2097152 bytes", "2097153 bytes"),
    ),
    "storage too large for device memory": (
        lambda s: s.in_device_memory.engram_write(torch.zeros(2 * MIB + 1, 1, dtype=torch.bfloat16)),
        ("the entries of a rank must fit into the table's 4194304 bytes", "4194306 bytes"),
    ),
    "FP8 without scales": (lambda s: s.write(s.fp8), ("sf must be given with float8_e4m3fn storage", "no sf with")),
    "BF16 with scales": (
        lambda s: s.write(ROWS, torch.ones(20, 1)),
        ("sf must be given with float8_e4m3fn storage", "sf with bfloat16"),
    ),
    "scales of one axis": (lambda s: s.write(s.fp8, torch.ones(20)), ("4-byte elements, contiguous, on cpu", "[20]")),
    "scales of 2 bytes": (lambda s: s.write(s.fp8, torch.ones(20, 1).half()), ("4-byte elements", "float16")),
    "scales with gaps": (lambda s: s.write(s.fp8, torch.ones(20, 4)[:, ::2]), ("4-byte elements", "strides [4, 2]")),
    "no packs": (lambda s: s.write(s.fp8, torch.ones(20, 0)), ("4-byte elements", "[20, 0]")),
    "scales elsewhere": (lambda s: s.write(s.fp8, torch.ones(20, 1, device="meta")), ("on cpu", "on meta")),
    "scales that are no tensor": (lambda s: s.write(s.fp8, 1.0), ("4-byte elements", "float")),
    "scales of this rank only": (
        lambda s: s.write(s.fp8, torch.ones(10, 1)),
        ("sf must have a row for each of the 20 entries of all ranks", "10 rows", "in the order of the ranks"),
    ),
}

CONSTRUCTOR_REJECTIONS: dict[str, tuple[Callable[[], object], Words]] = {
    "no bytes": (lambda: EngramTable(None, 0), ("num_bytes must be a multiple of 2097152, at least 2097152", "0")),
    "odd bytes": (lambda: EngramTable(None, 3 * MIB), ("num_bytes must be a multiple of 2097152", "3145728")),
    "odd host bytes": (lambda: EngramTable(None, 4 * MIB, MIB), ("num_cpu_bytes must be a multiple of 2097152",)),
    "bytes that are no integer": (lambda: EngramTable(None, 4e6), ("num_bytes must be a multiple", "4000000.0")),
    "more host bytes than bytes": (
        lambda: EngramTable(None, 2 * MIB, 4 * MIB),
        ("num_bytes must hold num_cpu_bytes too", "2097152 and 4194304", "the sum of both parts"),
    ),
    "no timeout": (
        lambda: EngramTable(None, 2 * MIB, num_cpu_timeout_secs=0),
        ("num_cpu_timeout_secs must be positive", "0"),
    ),
    "an unknown backend": (lambda: EngramTable(None, 2 * MIB, backend="magic"), ("backend must be", "'magic'")),
    "the device backend": (
        lambda: EngramTable(None, 2 * MIB, backend="device"),
        ('backend="device" needs GPUs (got none', 'use backend="auto" or "collective"'),
    ),
    "a negative count": (
        lambda: get_engram_storage_size_hint(-1, 2, 3),
        ("num_entries, hidden and num_max_tokens_per_rank must not be negative", "-1, 2, 3"),
    ),
    "another dtype": (
        lambda: EngramTable.get_engram_storage_size_hint(1, 2, 3, torch.float16),
        ("the dtype of a table must be bfloat16 or float8_e4m3fn", "float16"),
    ),
}


def chosen_backend(backend: str) -> tuple[str, list[str]]:
    """Which backend a table of CPUs takes, and what the log says of it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("deep_ep_engram")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with make_table(backend=backend) as table:
            assert table.runtime is not None
            return table.runtime.name, said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def message_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return None


def collect_rejections() -> dict[str, str | None]:
    """What each call that must be refused is told; then a valid round, to show that the table is as it was."""
    s = Setup()
    told = {name: message_of(lambda call=call: call(s)) for name, (call, _) in REJECTIONS.items()}
    told |= {name: message_of(call) for name, (call, _) in CONSTRUCTOR_REJECTIONS.items()}
    fetch_and_check(s.table, s.whole, torch.arange(20).view(5, 4))
    return told


def disagree(odd_rank: int, change: str) -> None:
    """One call in which `odd_rank` passes something else; the table is as before for those that catch the error."""
    is_odd = dist.get_rank() == odd_rank
    whole = Whole(counts=even_counts(8), dtype=FP8)
    assert whole.sf is not None
    if change in ("num_bytes", "num_cpu_bytes", "backend"):
        sizes = {"num_bytes": (4 * MIB, 0), "num_cpu_bytes": (2 * MIB, 2 * MIB)}.get(change, (2 * MIB, 0))
        backend = "collective" if change == "backend" else "auto"
        arguments = (*sizes, backend) if is_odd else (2 * MIB, 0, "auto")
        EngramTable(None, *arguments[:2], num_cpu_timeout_secs=20, backend=arguments[2])
        return
    with make_table(num_cpu_timeout_secs=20) as table:
        whole.write(table)
        storage, sf = whole.share(), whole.sf
        changed: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {
            "hidden": (storage.repeat(1, 2), sf),
            "dtype": (storage.bfloat16(), None),
            "rows": (storage, sf[:7]),
            "packs": (storage, sf[:, :1].contiguous()),
            "sf_dtype": (storage, sf.view(torch.int32)),
        }
        try:
            if is_odd and change == "operation":
                table.engram_fetch(torch.zeros(1, 1, dtype=torch.int32))
            else:
                table.engram_write(*(changed[change] if is_odd else (storage, sf)))
        except ConfigError:
            fetch_and_check(table, whole, torch.arange(sum(whole.counts)).view(-1, 1))
            raise


def come_late(late_rank: int, timeout_s: float, delay_s: float) -> None:
    whole = Whole(counts=even_counts())
    table = make_table(num_cpu_timeout_secs=timeout_s)
    whole.write(table)
    if dist.get_rank() == late_rank:
        time.sleep(delay_s)
    fetch_and_check(table, whole, torch.zeros(1, 1, dtype=torch.int32))


def refuse(odd_rank: int, timeout_s: float) -> None:
    """`odd_rank` passes an index that there is not; the others are told why it does not come."""
    whole = Whole(counts=even_counts())
    table = make_table(num_cpu_timeout_secs=timeout_s)
    whole.write(table)
    table.engram_fetch(torch.full((1, 1), 10**6 if dist.get_rank() == odd_rank else 0))


def die_before_sending(victim: int, timeout_s: float) -> tuple[str, tuple[int, ...], str]:
    """`victim` is killed when it knows what others want, and before it sends; returns what a survivor is told.

    First by its fetch or hook, as kind of error and ranks, then by the next fetch.
    """
    whole = Whole(counts=even_counts())
    table = make_table(num_cpu_timeout_secs=timeout_s)
    whole.write(table)
    if dist.get_rank() == victim:
        collective.PendingMessages = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[misc]
    indices = torch.arange(sum(whole.counts)).view(1, -1)
    try:
        table.engram_fetch(indices)()
    except TimeoutError as error:
        peers = error.peers
        first = str(error)
    try:
        table.engram_fetch(indices)
    except Exception as error:
        return first, peers, f"{type(error).__name__}: {error}"
    return first, peers, "accepted"
