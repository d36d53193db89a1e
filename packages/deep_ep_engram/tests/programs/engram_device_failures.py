"""What the device backend says of wrong indices, of ranks that are late or dead, and of devices that do not fit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist
from engram_cases import FP8, Whole, even_counts, fetch_and_check, make_table
from engram_setting import on_device

from deep_ep_core.errors import ConfigError


def told_by(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return None


def fetch_out_of_range(memory: str) -> dict[str, str | None]:
    """What is said of indices that are out of range, and when; the rows of such indices are zeros, others are right."""
    told: dict[str, str | None] = {}
    with on_device(memory):
        table = make_table()
        whole = Whole(counts=even_counts(), hidden=24, dtype=FP8)
        whole.write(table)
        num = sum(whole.counts)
        good = whole.random_indices(4, 2, random.Random(dist.get_rank()))
        assert whole.sf is not None
        for name, index in (("end", num), ("negative", -1), ("far", 2**31 - 1)):
            bad = good.clone()
            bad[2, 1] = index
            hook = table.engram_fetch(bad)
            # A CUDA kernel that read outside would end everything here.
            torch.cuda.synchronize()
            told[f"{name}: hook"] = told_by(hook)
            data, sf = hook()
            torch.cuda.synchronize()
            assert sf is not None
            flat = bad.view(-1).long()
            is_right = (flat >= 0) & (flat < num)
            rows = data.view(torch.uint8).view(8, -1)
            assert torch.equal(rows[is_right], whole.entries.view(torch.uint8)[flat[is_right]])
            assert not rows[~is_right].any()
            assert torch.equal(sf.view(torch.int32).view(8, -1)[is_right], whole.sf.view(torch.int32)[flat[is_right]])
            assert not sf.view(torch.int32).view(8, -1)[~is_right].any()
            fetch_and_check(table, whole, good)
        # At the next call, where no hook was called.
        table.engram_fetch(bad)
        torch.cuda.synchronize()
        told["next fetch"] = told_by(lambda: table.engram_fetch(good))
        fetch_and_check(table, whole, good)
        table.engram_fetch(bad)
        told["close"] = told_by(table.close)
        dist.barrier()
    return told


def write_after_wrong_index(memory: str) -> str | None:
    """Only the last rank fetches a wrong index before all write; returns what its next fetch is told."""
    rank, is_last = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
    with on_device(memory), make_table() as table:
        first = Whole(counts=even_counts(), hidden=24)
        first.write(table)
        bad = first.random_indices(4, 2, random.Random(rank))
        bad[2, 1] = sum(first.counts)
        if is_last:
            table.engram_fetch(bad)
        second = Whole(counts=even_counts(23), hidden=24, seed=5)
        second.write(table)
        good = second.random_indices(4, 2, random.Random(rank))
        told = told_by(lambda: table.engram_fetch(good))
        assert (told is not None) == is_last, told
        # In range by now.
        for indices in (good, bad):
            fetch_and_check(table, second, indices)
        dist.barrier()
    return told


def write_elsewhere(memory: str) -> dict[str, str | None]:
    """Writes that the backend refuses, and what is said; the table is as it was."""
    with on_device(memory), make_table() as table:
        whole = Whole(counts=even_counts())
        whole.write(table)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # A graph must hold something.
            torch.zeros(1, device="cuda")
            told = {"captured": told_by(lambda: table.engram_write(whole.share()))}
        # As on a machine of several GPUs.
        with mock.patch.object(table.runtime, "_device", torch.device("cuda", 77)):
            told["another device"] = told_by(lambda: table.engram_write(whole.share()))
        fetch_and_check(table, whole, whole.random_indices(4, 4, random.Random(0)))
        dist.barrier()
    return told


def write_late(memory: str, late_rank: int, timeout_s: float, delay_s: float) -> None:
    with on_device(memory):
        whole = Whole(counts=even_counts())
        table = make_table(num_cpu_timeout_secs=timeout_s)
        whole.write(table)
        if dist.get_rank() == late_rank:
            time.sleep(delay_s)
        whole.write(table)
        fetch_and_check(table, whole, whole.random_indices(4, 4, random.Random(0)))


def write_slowly(memory: str, late_rank: int, timeout_s: float, delay_s: float) -> tuple[tuple[int, ...], str]:
    """`late_rank` takes too long to copy its entries; returns whom the write named, and what a fetch is told then."""
    with on_device(memory):
        whole = Whole(counts=even_counts())
        table = make_table(num_cpu_timeout_secs=timeout_s)
        whole.write(table)
        fetch_and_check(table, whole, whole.random_indices(4, 4, random.Random(0)))
        if dist.get_rank() == late_rank:
            table.runtime._storage.fill = lambda _: time.sleep(delay_s)  # type: ignore[union-attr]
        peers: tuple[int, ...] = ()
        try:
            whole.write(table)
        except TimeoutError as error:
            peers = error.peers  # type: ignore[attr-defined]
        try:
            table.engram_fetch(whole.random_indices(4, 4, random.Random(0)))
        except Exception as error:
            return peers, f"{type(error).__name__}: {error}"
    return peers, "accepted"


def die_before_writing(memory: str, victim: int, timeout_s: float) -> tuple[str, tuple[int, ...]]:
    """`victim` is killed; the others fetch their own entries, and are told who is missing when they write."""
    with on_device(memory):
        whole = Whole(counts=even_counts())
        table = make_table(num_cpu_timeout_secs=timeout_s)
        whole.write(table)
        indices = torch.arange(sum(whole.counts), device="cuda").view(-1, 1)
        fetch_and_check(table, whole, indices)
        torch.cuda.synchronize()
        dist.barrier()
        if dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        fetch_and_check(table, whole, indices[20 * dist.get_rank() :][:20].contiguous())
        try:
            whole.write(table)
        except TimeoutError as error:
            return str(error), error.peers  # type: ignore[attr-defined]
    return "accepted", ()
