"""Owns the demo's command line: starts the ranks or joins those that are there, and tells how the results compare."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch.distributed as dist

from deep_ep_core.errors import ConfigError
from deep_ep_core.launch import launch
from deep_ep_core.local import LaunchConfig
from deep_ep_cp.demo.attention import AttentionConfig, compare

__all__ = ["main"]

_DEFAULT_NUM_RANKS = 4
# Sums of float64 in another order; a wrong token or mask makes differences of the order of 1.
_TOLERANCE = 1e-10
_EXIT_DISAGREEMENT = 1
_EXIT_CONFIG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 if the results agree, 1 if not, 2 for what cannot be run as asked."""
    options = _parser().parse_args(arguments)
    try:
        return _join_ranks(options) if "RANK" in os.environ else _start_ranks(options)
    except ConfigError as error:
        print(f"deep_ep_cp.demo: {error}", file=sys.stderr, flush=True)
        return _EXIT_CONFIG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deep_ep_cp.demo",
        description="Causal attention over a sequence that is split over ranks, forward and backward, compared with "
        "the same in one process. On CPUs.",
    )
    parser.add_argument("--ranks", type=int, default=_DEFAULT_NUM_RANKS, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=AttentionConfig().num_tokens, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    return parser


def _start_ranks(options: argparse.Namespace) -> int:
    _check_tokens(options.tokens, options.ranks)
    command = ["-m", "deep_ep_cp.demo", "--tokens", str(options.tokens), "--seed", str(options.seed)]
    return launch(LaunchConfig(num_ranks=options.ranks), command, has_prefix=False)


def _join_ranks(options: argparse.Namespace) -> int:
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    _check_tokens(options.tokens, num_ranks)
    config = AttentionConfig(num_tokens=options.tokens, seed=options.seed)
    differences = compare(config)
    dist.destroy_process_group()
    is_equal = all(difference <= _TOLERANCE for difference in differences.values())
    if rank == 0:
        print(f"causal attention, {config.num_tokens} tokens, {config.num_heads} heads of {config.head_dim}, float64")
        print(f"{num_ranks} ranks with {config.num_tokens // num_ranks} tokens each, against one process:")
        for name, difference in differences.items():
            print(f"  {name:24} largest relative difference {difference:.1e}, allowed {_TOLERANCE:.0e}")
        print(f"the split and the unsplit attention {'AGREE' if is_equal else 'DISAGREE'}", flush=True)
    return 0 if is_equal else _EXIT_DISAGREEMENT


def _check_tokens(num_tokens: int, num_ranks: int) -> None:
    if num_ranks < 1 or num_tokens < 1 or num_tokens % num_ranks:
        raise ConfigError(
            f"the number of tokens must be a positive multiple of the number of ranks (got {num_tokens} tokens for "
            f"{num_ranks} ranks); every rank has equally many"
        )


if __name__ == "__main__":
    sys.exit(main())
