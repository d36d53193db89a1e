"""Owns the demo, `python -m deep_ep_engram.demo`: n-gram embeddings from a sharded table and from an unsharded one.

Each token of a text is looked up by the 2-gram and the 3-gram that end at it, each through several hashes. The ranks
hold a share of the table each and a share of the tokens. What they fetch must be equal, to the bit, to a lookup in a
table that is in one place. No GPU, no download.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import launch
from deep_ep_core.local import LaunchConfig
from deep_ep_engram.sizing import get_engram_storage_size_hint
from deep_ep_engram.table import EngramTable

__all__ = ["main", "ngram_indices"]

_EXIT_DIFFERENT = 1
_EXIT_CONFIG = 2
_MAX_NGRAM = 3
# Odd multipliers, so that each of them permutes the 64-bit integers.
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)
_TEXT = (
    "a token goes to a rank once however many entries it has there and an entry comes from a rank once "
    "however many tokens want it so the text that repeats itself costs little and the text that does not costs more "
)


def ngram_indices(tokens: torch.Tensor, num_entries: int, num_heads: int) -> torch.Tensor:
    """The entries of each token: for the 2-gram and the 3-gram that end at it, one a head.

    Args:
        tokens: `[num_tokens]` int64, at least 0.
        num_entries: Entries of the table.
        num_heads: Hashes of each n-gram, at most 4.

    Returns:
        `[num_tokens, 2 * num_heads]` int64 in [0, num_entries).
    """
    # Multiplied and shifted as signed 64-bit integers, which wrap around as unsigned ones do.
    multipliers = torch.tensor(_MULTIPLIERS[:num_heads], dtype=torch.uint64).view(torch.int64)
    columns = []
    mixed = (tokens + 1).unsqueeze(1) * multipliers
    for order in range(1, _MAX_NGRAM):
        before = torch.cat([tokens.new_zeros(order), tokens[: len(tokens) - order] + 1])[: len(tokens)]
        mixed = ((mixed ^ (mixed >> 29)) + before.unsqueeze(1)) * multipliers
        columns.append(((mixed ^ (mixed >> 32)) & 0x7FFFFFFF) % num_entries)
    return torch.cat(columns, dim=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 if all lookups are equal, 1 if not, 2 for what cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m deep_ep_engram.demo", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes to start (default: %(default)s)")
    parser.add_argument("--entries", type=int, default=20000, metavar="N", help="of all ranks (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=128, metavar="N", help="of an entry (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.entries < 1 or options.hidden < 1:
            raise ConfigError(f"--entries and --hidden must be positive (got {options.entries}, {options.hidden})")
        if "RANK" in os.environ:
            return _join_ranks(options.entries, options.hidden)
        command = ["-m", "deep_ep_engram.demo", "--entries", str(options.entries), "--hidden", str(options.hidden)]
        return launch(LaunchConfig(num_ranks=options.ranks), command, has_prefix=False)
    except ConfigError as error:
        print(f"deep_ep_engram.demo: {error}", file=sys.stderr, flush=True)
        return _EXIT_CONFIG


def _join_ranks(num_entries: int, hidden: int) -> int:
    """Be one rank."""
    dist.init_process_group("gloo")
    try:
        return _look_up(num_entries, hidden)
    finally:
        dist.destroy_process_group()


def _look_up(num_entries: int, hidden: int, *, num_heads: int = 4, num_repeats: int = 10) -> int:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    # Every rank makes the whole table, which is what the result is compared with, and the whole text.
    whole = torch.randn(num_entries, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.tensor(list(_TEXT.encode() * num_repeats))
    indices = ngram_indices(tokens, num_entries, num_heads).tensor_split(num_ranks)
    shares = whole.tensor_split(num_ranks)
    num_gpu_bytes, num_cpu_bytes = get_engram_storage_size_hint(
        max(len(share) for share in shares), hidden, max(part.numel() for part in indices)
    )
    with EngramTable(None, num_gpu_bytes + num_cpu_bytes, num_cpu_bytes) as table:
        table.engram_write(shares[rank])
        hook = table.engram_fetch(indices[rank])
        data, _ = hook()
    expected = whole[indices[rank]].view(len(data), -1)
    is_equal = torch.tensor(torch.equal(data, expected), dtype=torch.int64)
    dist.all_reduce(is_equal, dist.ReduceOp.MIN)
    if rank == 0:
        num_distinct = len(indices[0].unique())
        print(f"{num_entries} entries of {hidden} bfloat16 over {num_ranks} ranks; {len(tokens)} tokens of text")
        print(f"rank 0: {indices[0].numel()} lookups for {len(data)} tokens, {num_distinct} distinct entries fetched")
        print(f"all ranks: {'equal to' if is_equal else 'DIFFERENT FROM'} the unsharded table, to the bit", flush=True)
    return 0 if is_equal else _EXIT_DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
