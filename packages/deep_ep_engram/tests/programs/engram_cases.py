"""Fetches that each rank compares with a plain lookup in a whole table, byte by byte.

Entries are random bytes, among them NaNs of every kind, so that an entry from a wrong place cannot pass, nor one that
went through arithmetic.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist

import deep_ep_engram
from deep_ep_engram import EngramTable, Fetched

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
MIB = 1 << 20
# Of the message that opens an operation.
HEADER_BYTES = 264


@dataclass(slots=True)
class Setting:
    """Where the cases run: the device of tensors, the backend of tables, and their bytes of host memory."""

    device: str = "cpu"
    backend: str = "auto"
    num_cpu_bytes: int = 2 * MIB


SETTING = Setting()


def random_bytes(num_rows: int, row_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_rows, row_bytes), dtype=torch.uint8, generator=generator)


@dataclass(kw_only=True)
class Whole:
    """A whole table, which every rank makes for itself; its entries are shared out by `counts`."""

    counts: Sequence[int]
    hidden: int = 16
    dtype: torch.dtype = BF16
    num_packs: int = 2
    sf_dtype: torch.dtype = torch.float32
    seed: int = 0
    entries: torch.Tensor = field(init=False)
    sf: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        num, device = sum(self.counts), SETTING.device
        self.entries = random_bytes(num, self.hidden * self.dtype.itemsize, self.seed).to(device).view(self.dtype)
        if self.dtype == FP8:
            self.sf = random_bytes(num, self.num_packs * 4, self.seed + 1).to(device).view(self.sf_dtype)

    def share(self) -> torch.Tensor:
        return self.entries.split(list(self.counts))[dist.get_rank()]

    def write(self, table: EngramTable) -> None:
        table.engram_write(self.share(), self.sf)

    def random_indices(self, num_tokens: int, num_each: int, rng: random.Random) -> torch.Tensor:
        num = sum(self.counts)
        flat = [rng.randrange(num) for _ in range(num_tokens * num_each)]
        dtype = rng.choice([torch.int32, torch.int64])
        return torch.tensor(flat, dtype=dtype, device=SETTING.device).view(num_tokens, num_each)

    def check(self, fetched: Fetched, indices: torch.Tensor, *, is_col_major: bool = False) -> None:
        num_tokens, num_each = indices.shape
        data, sf = fetched
        if data.is_cuda:
            # What is queued behind a kernel that waits may stop the copies of the loopback network, which it waits for.
            torch.cuda.synchronize()
        flat = indices.reshape(-1).long()
        assert (data.dtype, data.is_contiguous()) == (self.dtype, True)
        assert data.shape == (num_tokens, num_each * self.hidden)
        plain = self.entries.view(torch.uint8)[flat].view(num_tokens, -1) if data.numel() else data.view(torch.uint8)
        assert torch.equal(data.view(torch.uint8), plain)
        if self.sf is None:
            assert sf is None
            return
        assert sf is not None
        assert sf.dtype == self.sf_dtype
        assert sf.shape == (num_tokens, num_each * self.num_packs)
        num_aligned = -(-num_tokens // 4) * 4
        assert sf.stride() == ((1, num_aligned) if is_col_major else (max(num_each * self.num_packs, 1), 1))
        if sf.numel():
            plain_sf = self.sf.view(torch.int32)[flat].view(num_tokens, -1)
            assert torch.equal(sf.view(torch.int32), plain_sf)
        if is_col_major:
            columns = sf.view(torch.int32).as_strided((sf.size(1), num_aligned), (num_aligned, 1))
            assert (columns[:, num_tokens:] == 0).all(), "padding that is not zero"


def make_table(num_cpu_bytes: int | None = None, **arguments: object) -> EngramTable:
    if num_cpu_bytes is None:
        num_cpu_bytes = SETTING.num_cpu_bytes
    options = {"num_cpu_timeout_secs": 30, "backend": SETTING.backend, **arguments}
    table = EngramTable(None, 8 * MIB, num_cpu_bytes, **options)
    assert table.runtime is not None
    assert SETTING.backend in ("auto", table.runtime.name)
    return table


def even_counts(num_each: int = 20) -> list[int]:
    return [num_each] * dist.get_world_size()


def fetch_and_check(table: EngramTable, whole: Whole, indices: torch.Tensor, *, is_col_major: bool = False) -> None:
    indices = indices.to(SETTING.device)
    hook = table.engram_fetch(indices, use_tma_aligned_col_major_sf=is_col_major)
    whole.check(hook(), indices, is_col_major=is_col_major)


def check_sizes() -> None:
    """No tokens, one, around a power of two, no entries a token; rows of odd bytes; both dtypes and memories."""
    rng = random.Random(dist.get_rank())
    for num_cpu_bytes, dtype in ((0, BF16), (2 * MIB, FP8)):
        with make_table(num_cpu_bytes) as table:
            for hidden in (1, 3, 33, 128):
                whole = Whole(counts=even_counts(), hidden=hidden, dtype=dtype)
                whole.write(table)
                for num_tokens, num_each in ((0, 3), (1, 1), (31, 2), (32, 1), (33, 5), (3, 0)):
                    fetch_and_check(table, whole, whole.random_indices(num_tokens, num_each, rng))


def check_scale_layouts(sf_dtype: torch.dtype, num_packs: int) -> None:
    rng = random.Random(dist.get_rank())
    whole = Whole(counts=even_counts(), dtype=FP8, num_packs=num_packs, sf_dtype=sf_dtype)
    with make_table() as table:
        whole.write(table)
        for num_tokens in (0, 1, 3, 4, 5, 33):
            for is_col_major in (False, True):
                fetch_and_check(table, whole, whole.random_indices(num_tokens, 3, rng), is_col_major=is_col_major)


def check_uneven_tables() -> None:
    """Each entry is found, whoever has how many."""
    for pattern in ((5, 0, 33, 1), (0, 7, 0, 0), (1, 1, 0, 0)):
        counts = (pattern * 2)[: dist.get_world_size()]
        if not sum(counts):
            continue
        whole = Whole(counts=counts)
        with make_table() as table:
            whole.write(table)
            fetch_and_check(table, whole, torch.arange(sum(counts)).view(-1, 1))
            assert f"{sum(counts)} entries of 16 bfloat16" in repr(table)


def check_empty_table() -> None:
    with make_table() as table:
        whole = Whole(counts=even_counts(0))
        whole.write(table)
        fetch_and_check(table, whole, torch.empty(0, 3, dtype=torch.int64))
        fetch_and_check(table, whole, torch.empty(5, 0, dtype=torch.int64))


def check_unlike_fetches() -> None:
    """Rank r brings 7 r tokens of r + 1 entries; rank 0 wants nothing, and serves the others."""
    rank, whole = dist.get_rank(), Whole(counts=even_counts())
    with make_table() as table:
        whole.write(table)
        fetch_and_check(table, whole, whole.random_indices(7 * rank, rank + 1, random.Random(rank)))


@contextlib.contextmanager
def sent_sizes() -> Iterator[list[int]]:
    """Bytes of the messages that this rank sends, but for the headers that open operations."""
    sizes: list[int] = []
    original = dist.batch_isend_irecv

    def noting(ops: list[dist.P2POp]) -> list[dist.Work]:
        sent = [op.tensor.nbytes for op in ops if op.op is dist.isend]
        sizes.extend(size for size in sent if size != HEADER_BYTES)
        return original(ops)

    with mock.patch.object(dist, "batch_isend_irecv", noting):
        yield sizes


def bytes_sent_for_duplicates() -> list[int]:
    """Sizes of the messages sent when each rank wants entries 0 to 2 of every rank, 40 times each."""
    whole = Whole(counts=even_counts(), hidden=128)
    starts = torch.arange(dist.get_world_size()) * 20
    wanted = (starts.view(-1, 1) + torch.arange(3)).view(-1)
    indices = wanted.repeat(40)[torch.randperm(40 * len(wanted))].view(40, -1)
    with make_table() as table:
        whole.write(table)
        with sent_sizes() as sizes:
            fetch_and_check(table, whole, indices)
    return sizes


def bytes_sent_for_own_entries() -> list[int]:
    whole = Whole(counts=even_counts())
    indices = (20 * dist.get_rank() + torch.arange(20)).repeat(2).view(20, 2)
    with make_table() as table:
        whole.write(table)
        with sent_sizes() as sizes:
            fetch_and_check(table, whole, indices)
    return sizes


def check_hooks_in_any_order() -> None:
    """Six fetches under way at once; each rank calls the hooks in an order of its own."""
    rng = random.Random(dist.get_rank())
    whole = Whole(counts=even_counts(), hidden=5000)
    with make_table() as table:
        whole.write(table)
        wanted = [whole.random_indices(5 + idx, 2, rng) for idx in range(6)]
        hooks = [table.engram_fetch(indices) for indices in wanted]
        order = list(range(6))
        rng.shuffle(order)
        results = {idx: hooks[idx]() for idx in order}
        for idx, indices in enumerate(wanted):
            # Only now, so that a result in the memory of another would show.
            whole.check(results[idx], indices)
            assert hooks[idx]().data is results[idx].data


def check_hook_waits_for_no_other_hook() -> None:
    """Rank 0 gets its entries while no other rank has called its hook."""
    whole = Whole(counts=even_counts(), hidden=10_000)
    indices = torch.arange(sum(whole.counts), device=SETTING.device).view(1, -1)
    with make_table() as table:
        whole.write(table)
        hook = table.engram_fetch(indices)
        if dist.get_rank() == 0:
            whole.check(hook(), indices)
        dist.barrier()
        whole.check(hook(), indices)


def check_rewrite_between_fetches() -> None:
    """A fetch gives the entries of its time, also when its hook is called after the table has become another."""
    rng = random.Random(dist.get_rank())
    first = Whole(counts=even_counts(), seed=1)
    second = Whole(counts=even_counts(7), hidden=40, dtype=FP8, seed=3)
    with make_table() as table:
        storage = first.share().clone()
        table.engram_write(storage)
        storage.zero_()
        before = first.random_indices(9, 3, rng)
        old_hook = table.engram_fetch(before)
        second.write(table)
        after = second.random_indices(9, 3, rng)
        new_hook = table.engram_fetch(after)
        second.check(new_hook(), after)
        first.check(old_hook(), before)


def check_close_completes_fetches() -> None:
    """Hooks stay valid after the table is closed, and a rank that drops its own keeps nobody waiting."""
    whole = Whole(counts=even_counts(), hidden=10_000)
    indices = torch.arange(sum(whole.counts), device=SETTING.device).view(1, -1)
    table = make_table()
    whole.write(table)
    hook = table.engram_fetch(indices)
    if dist.get_rank() == 0:
        del hook
        table.close()
        dist.barrier()
        return
    dist.barrier()
    table.close()
    table.close()
    whole.check(hook(), indices)
    assert repr(table).endswith("not written, closed)")


def check_two_tables() -> None:
    """Two tables of one group at the same time do not mix."""
    rng = random.Random(dist.get_rank())
    wholes = [Whole(counts=even_counts(), seed=seed, hidden=8 * seed) for seed in (1, 2)]
    tables = [make_table(), make_table(0)]
    for whole, table in zip(wholes, tables, strict=True):
        whole.write(table)
    wanted = [whole.random_indices(4, 4, rng) for whole in wholes]
    hooks = [table.engram_fetch(indices) for table, indices in zip(tables, wanted, strict=True)]
    for whole, hook, indices in reversed(list(zip(wholes, hooks, wanted, strict=True))):
        whole.check(hook(), indices)


def check_functions() -> None:
    whole = Whole(counts=even_counts(), dtype=FP8)
    with make_table() as table:
        deep_ep_engram.engram_write(table, whole.share(), whole.sf)
        indices = torch.tensor([[0, 19], [7, 7]], dtype=torch.int32, device=SETTING.device)
        hook = deep_ep_engram.engram_fetch(table, indices, use_tma_aligned_col_major_sf=True)
        whole.check(hook(), indices, is_col_major=True)


def check_random_rounds(num_rounds: int) -> int:
    """Random tables, shapes and orders of hooks; returns how many fetches were compared.

    What ranks must do alike is drawn from a generator that they share, the rest from one of each rank.
    """
    shared, own = random.Random(7), random.Random(100 + dist.get_rank())
    num_ranks = dist.get_world_size()
    under_way: list[tuple[Whole, torch.Tensor, bool, object]] = []
    num_checked = 0
    with make_table() as table:
        for idx in range(num_rounds):
            if idx == 0 or shared.random() < 0.2:
                counts = [shared.choice([0, 1, 5, 64]) for _ in range(num_ranks)]
                counts[shared.randrange(num_ranks)] = 33
                whole = Whole(
                    counts=counts,
                    hidden=shared.choice([1, 7, 16, 130]),
                    dtype=shared.choice([BF16, FP8]),
                    num_packs=shared.choice([1, 3]),
                    seed=idx,
                )
                whole.write(table)
            indices = whole.random_indices(own.choice([0, 1, 5, 31, 32, 33]), own.choice([1, 2, 5]), own)
            is_col_major = own.random() < 0.5
            hook = table.engram_fetch(indices, use_tma_aligned_col_major_sf=is_col_major)
            under_way.append((whole, indices, is_col_major, hook))
            while len(under_way) > own.choice([0, 1, 4]) or (idx == num_rounds - 1 and under_way):
                then, wanted, was_col_major, hook = under_way.pop(own.randrange(len(under_way)))
                then.check(hook(), wanted, is_col_major=was_col_major)
                num_checked += 1
    return num_checked
