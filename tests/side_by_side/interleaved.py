"""Two or more packages at work on one process group at a time: their calls interleaved, each result compared.

usage: python -m deep_ep_core.launch --ranks 4 interleaved.py [--device cuda] [--backend device] [--rounds 20]

Each partner begins something, and ends it after the others have begun theirs. What ranks must do alike is drawn from a
generator that they share.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from deep_ep_core.local import run_as_script
from deep_ep_cp import ContextBuffer
from deep_ep_engram import EngramTable
from deep_ep_ep import ElasticBuffer
from deep_ep_pp import PipelineBuffer

MIB = 1 << 20
TIMEOUT_S = 60.0


class Partner(Protocol):
    """One package's object on the group."""

    def begin(self, seed: int) -> Callable[[], None]:
        """Start one round; what is returned ends it and compares the result."""

    def close(self) -> None:
        """Release it."""


def numbers(shape: Sequence[int], seed: int, device: str, *, end: int = 256) -> torch.Tensor:
    """Small integers, which no sum here rounds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, end, tuple(shape), generator=generator).to(device)


class Engram:
    """A fetch of random entries; now and then the table is written anew between two rounds."""

    def __init__(self, device: str, backend: Any) -> None:
        self.device = device
        self.table = EngramTable(None, 4 * MIB, num_cpu_timeout_secs=TIMEOUT_S, backend=backend)

    def begin(self, seed: int) -> Callable[[], None]:
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        if seed % 4 == 0:
            self.whole = numbers((30 * num_ranks, 72), seed, self.device).bfloat16()
            self.table.engram_write(self.whole[30 * rank :][:30])
        indices = numbers((17, 3), seed * 100 + rank, self.device, end=30 * num_ranks)
        hook = self.table.engram_fetch(indices)

        def end() -> None:
            assert torch.equal(hook().data, self.whole[indices.view(-1)].view(17, -1)), "engram"

        return end

    def close(self) -> None:
        self.table.close()


class Pipeline:
    """A message to the next rank, received from the one before."""

    def __init__(self, device: str, backend: Any) -> None:
        self.device = device
        self.buffer = PipelineBuffer(None, num_cpu_timeout_secs=TIMEOUT_S, backend=backend)
        self.buffer.pp_set_config(4096, 2)

    def begin(self, seed: int) -> Callable[[], None]:
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        previous = (rank - 1) % num_ranks
        self.buffer.pp_send(numbers((64,), seed * 100 + rank, self.device), (rank + 1) % num_ranks)
        received = torch.zeros(64, dtype=torch.int64, device=self.device)

        def end() -> None:
            self.buffer.pp_recv(received, previous)
            assert torch.equal(received, numbers((64,), seed * 100 + previous, self.device)), "pp"

        return end

    def close(self) -> None:
        self.buffer.close()


class Context:
    """An all-gather in a session of its own."""

    def __init__(self, device: str, backend: Any) -> None:
        self.device = device
        self.buffer = ContextBuffer(None, 2 * MIB, num_cpu_timeout_secs=TIMEOUT_S, device=device, backend=backend)
        self.buffer.agrs_set_config(2 * MIB, 4)

    def begin(self, seed: int) -> Callable[[], None]:
        self.buffer.create_agrs_session()
        gathered, handle = self.buffer.all_gather(numbers((5, 9), seed * 100 + dist.get_rank(), self.device))

        def end() -> None:
            handle()
            of_ranks = [numbers((5, 9), seed * 100 + rank, self.device) for rank in range(dist.get_world_size())]
            assert torch.equal(gathered, torch.stack(of_ranks)), "cp"
            self.buffer.destroy_agrs_session()

        return end

    def close(self) -> None:
        self.buffer.close()


class Elastic:
    """A dispatch, and a combine of what it brought: each token comes back once from each of its ranks."""

    def __init__(self, device: str, backend: Any) -> None:
        self.device = device
        self.buffer = ElasticBuffer(
            None,
            num_max_tokens_per_rank=32,
            hidden=64,
            num_topk=2,
            num_cpu_timeout_secs=TIMEOUT_S,
            num_gpu_timeout_secs=TIMEOUT_S,
            backend=backend,
        )

    def begin(self, seed: int) -> Callable[[], None]:
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        x = numbers((20, 64), seed * 100 + rank, self.device, end=16).bfloat16()
        first = numbers((20, 1), seed * 100 + rank + 50, self.device, end=2 * num_ranks)
        topk_idx = torch.cat([first, (first + 3) % (2 * num_ranks)], dim=1)
        recv_x, _, _, handle, event = self.buffer.dispatch(
            x, topk_idx=topk_idx, num_experts=2 * num_ranks, async_with_compute_stream=True
        )
        assert isinstance(recv_x, torch.Tensor)

        def end() -> None:
            event.current_stream_wait()
            combined, _, _ = self.buffer.combine(recv_x, handle)
            ranks_of_token = (topk_idx // 2).sort(1).values
            num_times = 1 + (ranks_of_token[:, 1:] != ranks_of_token[:, :1]).sum(1, keepdim=True)
            assert torch.equal(combined, x * num_times), "ep"

        return end

    def close(self) -> None:
        self.buffer.close()


PARTNERS: dict[str, Callable[[str, Any], Partner]] = {"pp": Pipeline, "cp": Context, "ep": Elastic}


def run_side_by_side(names: Sequence[str], device: str, backend: str, num_rounds: int = 12) -> int:
    """A table beside the partners of these names; returns how many results were compared.

    Args:
        names: Of `PARTNERS`.
        device: "cpu" or "cuda".
        backend: Of all of them.
        num_rounds: Rounds. In each, all begin in an order of its own and end in another.
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    rng, num_compared = random.Random(3), 0
    with contextlib.ExitStack() as stack:
        partners: list[Partner] = [Engram(device, backend), *(PARTNERS[name](device, backend) for name in names)]
        for partner in partners:
            stack.callback(partner.close)
        for seed in range(num_rounds):
            rng.shuffle(partners)
            ends = [partner.begin(seed) for partner in partners]
            rng.shuffle(ends)
            for end in ends:
                end()
                num_compared += 1
        # What a peer still reads must not go.
        dist.barrier()
    return num_compared


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("collective", "device"), default="collective")
    parser.add_argument("--partners", nargs="+", choices=list(PARTNERS), default=list(PARTNERS))
    parser.add_argument("--rounds", type=int, default=20)
    parsed = parser.parse_args()

    def all_together() -> None:
        num = run_side_by_side(parsed.partners, parsed.device, parsed.backend, parsed.rounds)
        if dist.get_rank() == 0:
            print(f"{num} results compared", flush=True)

    run_as_script(all_together)


if __name__ == "__main__":
    main()
