"""Runs core's device headers on a GPU and prints a table; the exit status is 1 if anything is wrong.

usage: python gpu_check.py [--sanitize] [--part single|ranks]
       python -m deep_ep_core.launch --ranks 4 gpu_check.py [--sanitize] [--part single|ranks]

Not a pytest module: it needs a GPU of compute capability 9.0 or newer, torch with CUDA, cuda-bindings, nvcc or NVRTC,
and for the part with several ranks NCCL 2.30.4 or newer. Several ranks on one GPU need MPS: without it their kernels
take turns, and each wait for a peer costs a time slice.

With --sanitize all sizes are small, for compute-sanitizer:
    compute-sanitizer --tool memcheck python gpu_check.py --sanitize
    compute-sanitizer --tool racecheck python gpu_check.py --sanitize
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import check_ranks
import check_single
import torch
import torch.distributed as dist
from check_bench import Bench, Row, merge_rows, print_table

from deep_ep_core.env import get_env
from deep_ep_core.jit import Builder, JitOptions

TIMEOUT_S = 60.0
SANITIZE_TIMEOUT_S = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run core's device headers on a GPU.")
    parser.add_argument("--sanitize", action="store_true", help="small sizes, for compute-sanitizer")
    parser.add_argument("--part", choices=["single", "ranks", "all"], default="all")
    parser.add_argument("--cache-dir", type=Path, default=None, help="cache of compiled kernels")
    arguments = parser.parse_args()
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if arguments.part == "ranks" and num_ranks == 1:
        parser.error("--part ranks needs several ranks: start it by python -m deep_ep_core.launch")
    if num_ranks > torch.cuda.device_count():
        os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    options = (
        JitOptions.from_env(get_env()) if arguments.cache_dir is None else JitOptions(cache_dir=arguments.cache_dir)
    )
    bench = Bench(
        device=device,
        builder=Builder(options),
        rank=rank,
        is_small=arguments.sanitize,
        timeout_s=SANITIZE_TIMEOUT_S if arguments.sanitize else TIMEOUT_S,
    )
    rows: list[Row] = []
    if rank == 0:
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {num_ranks} ranks", flush=True)
    if num_ranks > 1:
        dist.init_process_group("gloo")
    if arguments.part != "ranks":
        # One rank is enough, and the others must not take its time.
        if rank == 0:
            check_single.run_checks(bench)
            rows += bench.rows
            bench.rows = []
        if num_ranks > 1:
            dist.barrier()
    if num_ranks > 1 and arguments.part != "single":
        check_ranks.run_checks(bench)
        all_rows: list[list[Row]] = [[] for _ in range(num_ranks)]
        dist.all_gather_object(all_rows, bench.rows)
        rows += merge_rows(all_rows)
    # Every rank must agree on the outcome: the launcher ends the others when one fails.
    is_right = print_table(rows) if rank == 0 and rows else True
    if rank == 0:
        print("all right" if is_right else "WRONG", flush=True)
    if num_ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
