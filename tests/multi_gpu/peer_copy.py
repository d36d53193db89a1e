"""Measures how fast GPUs copy to each other: the ceiling for everything that crosses NVLink on this machine.

usage: python peer_copy.py [--num-gpus N] [--mib 256] [--rounds 5] [--device cuda|cpu]

One process copies between the memories of all GPUs, each copy on a pair of streams of its own. Prints a line of JSON
for each pattern: `one-way` (GPU 0 to GPU 1), `both-ways` (these two to each other), `ring` (each to the next), `all`
(each to all others). `each_way_gbs` is what leaves each sender in GB/s (1e9 bytes); as much comes to each receiver. Of
the rounds the fastest counts, since it stands for what the links can do; `median_gbs` is beside it.

With --device cpu the copies stay in the memory of this machine: it shows that the program runs, and nothing of links.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PATTERNS = ("one-way", "both-ways", "ring", "all")
_COPIES_PER_ROUND = 8
_NUM_WARMUP = 2
_ALIGNMENT = 4096
_BYTES_PER_MIB = 1 << 20
_BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copy:
    """A copy from one GPU to another, on a stream of each: torch orders a copy with the current streams of both."""

    source: torch.Tensor
    target: torch.Tensor
    streams: Sequence[torch.cuda.Stream]

    def start(self) -> None:
        """Enqueue it."""
        with contextlib.ExitStack() as stack:
            for stream in self.streams:
                stack.enter_context(torch.cuda.stream(stream))
            self.target.copy_(self.source, non_blocking=True)


def pairs_of(pattern: str, num_gpus: int) -> list[tuple[int, int]]:
    """The copies of a pattern, as (from GPU, to GPU)."""
    if pattern == "one-way":
        return [(0, 1)]
    if pattern == "both-ways":
        return [(0, 1), (1, 0)]
    if pattern == "ring":
        return [(gpu, (gpu + 1) % num_gpus) for gpu in range(num_gpus)]
    assert pattern == "all"
    return [(source, target) for source in range(num_gpus) for target in range(num_gpus) if source != target]


def measure(pattern: str, devices: Sequence[torch.device], *, num_bytes: int, num_rounds: int) -> dict[str, object]:
    """Copy in a pattern, check what arrived, and say how fast it was.

    Args:
        pattern: One of `PATTERNS`.
        devices: The GPUs.
        num_bytes: What leaves each GPU in one round of copies.
        num_rounds: Rounds that count.
    """
    pairs = pairs_of(pattern, len(devices))
    num_senders = len({source for source, _ in pairs})
    num_each = num_bytes * num_senders // len(pairs) // _ALIGNMENT * _ALIGNMENT
    copies = [
        _make_copy(devices[source], devices[target], num_each, seed) for seed, (source, target) in enumerate(pairs)
    ]
    times_s = []
    for _ in range(_NUM_WARMUP + num_rounds):
        _synchronize(devices)
        start = time.perf_counter()
        for _ in range(_COPIES_PER_ROUND):
            for copy in copies:
                copy.start()
        _synchronize(devices)
        times_s.append(time.perf_counter() - start)
    for copy in copies:
        assert torch.equal(copy.source, copy.target.to(copy.source.device)), f"{pattern}: other bytes arrived"
    bytes_each_way = num_each * len(pairs) // num_senders * _COPIES_PER_ROUND
    rates = [bytes_each_way / time_s / _BYTES_PER_GB for time_s in times_s[_NUM_WARMUP:]]
    return {
        "op": "peer-copy",
        "pattern": pattern,
        "num_gpus": len(devices),
        "each_way_gbs": round(max(rates), 2),
        "median_gbs": round(statistics.median(rates), 2),
        "bytes_each_way": bytes_each_way,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="peer_copy.py", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--num-gpus", type=int, metavar="N", help="(default: all)")
    parser.add_argument("--mib", type=int, default=256, metavar="N", help="MiB that leave each GPU at a time")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that count (default: 5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    is_cuda = options.device == "cuda"
    num_gpus = options.num_gpus or (torch.cuda.device_count() if is_cuda else 2)
    if num_gpus < 2 or (is_cuda and num_gpus > torch.cuda.device_count()):
        found = f", torch sees {torch.cuda.device_count()} GPUs" if is_cuda else ""
        print(f"peer_copy.py: --num-gpus must be 2 to the number of GPUs (got {num_gpus}{found})", file=sys.stderr)
        return 2
    devices = [torch.device("cuda", gpu) if is_cuda else torch.device("cpu") for gpu in range(num_gpus)]
    pairs = pairs_of("all", num_gpus)
    has_peer_access = all(torch.cuda.can_device_access_peer(*pair) for pair in pairs) if is_cuda else None
    for pattern in PATTERNS:
        found = measure(pattern, devices, num_bytes=options.mib * _BYTES_PER_MIB, num_rounds=options.rounds)
        print(json.dumps({**found, "device": options.device, "has_peer_access": has_peer_access}), flush=True)
    return 0


def _make_copy(source: torch.device, target: torch.device, num_bytes: int, seed: int) -> Copy:
    generator = torch.Generator(device=source).manual_seed(seed)
    content = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=source, generator=generator)
    streams = [torch.cuda.Stream(device) for device in (source, target) if device.type == "cuda"]
    return Copy(source=content, target=torch.empty_like(content, device=target), streams=streams)


def _synchronize(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
