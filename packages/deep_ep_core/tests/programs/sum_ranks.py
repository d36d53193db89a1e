"""A worker script: the form that the multi-rank test modules have."""

import os
import sys

import torch
import torch.distributed as dist

from deep_ep_core.local import run_as_script


def ranks_add_up() -> None:
    total = torch.tensor([dist.get_rank()])
    dist.all_reduce(total)
    assert total.item() == sum(range(dist.get_world_size()))


def last_rank_is_content() -> None:
    if "fail" in sys.argv and dist.get_rank() == int(os.environ["WORLD_SIZE"]) - 1:
        raise ValueError("the last rank is not content")


if __name__ == "__main__":
    run_as_script(ranks_add_up, last_rank_is_content)
