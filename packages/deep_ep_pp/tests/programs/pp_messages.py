"""What ranks send each other, and how each rank knows what it must get: every byte depends on pair, number and seed."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from pp_setting import SETTING, is_on_device, open_buffer, settle

from deep_ep_core.errors import ConfigError
from deep_ep_core.transport import CollectiveTransport
from deep_ep_pp import PipelineBuffer, collective, get_pp_buffer_size_hint, pp_recv, pp_send, pp_set_config
from deep_ep_pp.ledger import Ledger

# Sizes around the 32 bytes that tensors are rounded up to, none, and one that no socket takes at once.
SIZES = (0, 1, 2, 3, 31, 32, 33, 1000, 4097, 1 << 20)
MAX_BYTES = 4 << 20
TIMEOUT_S = 60


def make_buffer(
    group: dist.ProcessGroup | None = None, *, window: int = 2, max_bytes: int = MAX_BYTES
) -> PipelineBuffer:
    buffer = open_buffer(group, timeout_s=TIMEOUT_S)
    buffer.pp_set_config(max_bytes, window)
    return buffer


def payload(src: int, dst: int, idx: int, size: int, seed: int = 0) -> torch.Tensor:
    """Bytes that no other message has."""
    generator = torch.Generator().manual_seed(hash((src, dst, idx, size, seed)) & 0xFFFFFFFF)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).to(SETTING.device)


def space(size: int) -> torch.Tensor:
    """Where bytes are received into; they are none that a message has."""
    return torch.full((size,), 7, dtype=torch.uint8, device=SETTING.device)


def number(value: int) -> torch.Tensor:
    """A message of one number."""
    return torch.tensor([value], device=SETTING.device)


def check_sizes() -> None:
    """Every size to and from every rank, one tensor a message; the sender overwrites its tensor at once."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    with make_buffer(window=len(SIZES)) as buffer:
        others = [peer for peer in range(num_ranks) if peer != rank]
        for dst in others:
            for idx, size in enumerate(SIZES):
                sent = payload(rank, dst, idx, size)
                buffer.pp_send(sent, dst)
                sent.fill_(0)
        for src in others:
            for idx, size in enumerate(SIZES):
                got = space(size)
                buffer.pp_recv(got, src)
                assert torch.equal(got, payload(src, rank, idx, size)), (src, idx, size)


DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
    torch.complex64,
    torch.bool,
    torch.int64,
    torch.int16,
    torch.uint16,
)


def check_dtypes() -> None:
    """Every dtype to the bit, NaNs and a tensor without dimensions included, all in one message."""
    rank = dist.get_rank()

    def make(filled: bool) -> list[torch.Tensor]:
        tensors = []
        for idx, dtype in enumerate(DTYPES):
            # 3 elements, so that no size is a multiple of 32. All bits of a NaN are kept.
            size = 3 * torch.empty(1, dtype=dtype).element_size()
            data = payload(0, 1, idx, size) if filled else torch.zeros(size, dtype=torch.uint8, device=SETTING.device)
            tensors.append(data.view(dtype).view(3, 1))
        tensors.append(torch.tensor(float("nan") if filled else 0.0, device=SETTING.device))
        return tensors

    with make_buffer() as buffer:
        if rank == 0:
            buffer.pp_send(make(filled=True), 1)
        elif rank == 1:
            got = make(filled=False)
            buffer.pp_recv(got, 0)
            for tensor, expected in zip(got, make(filled=True), strict=True):
                assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), (
                    tensor.dtype
                )


def check_multi_tensor_messages() -> None:
    """One, some without elements, and as many tensors as a message may have; received with another dtype and shape."""
    rank = dist.get_rank()
    shapes = [(5,), (0,), (2, 0, 3), (1, 9), (33,)]
    with make_buffer() as buffer:
        for num_tensors in (1, len(shapes), 32):
            chosen = [shapes[idx % len(shapes)] for idx in range(num_tensors)]
            sent = [
                torch.full(shape, idx + 1, dtype=torch.int32, device=SETTING.device) for idx, shape in enumerate(chosen)
            ]
            if rank == 0:
                buffer.pp_send(tuple(sent), 1)
            elif rank == 1:
                got = [torch.zeros(tensor.numel(), device=SETTING.device) for tensor in sent]
                buffer.pp_recv(got if num_tensors > 1 else got[0], 0)
                for tensor, expected in zip(got, sent, strict=True):
                    assert torch.equal(tensor.view(torch.int32), expected.view(-1))


def check_tensor_with_gradient_is_sent_and_received_into() -> None:
    rank = dist.get_rank()
    with make_buffer() as buffer:
        weights = torch.ones(3, requires_grad=True, device=SETTING.device)
        if rank == 0:
            buffer.pp_send(weights * 2, 1)
        elif rank == 1:
            buffer.pp_recv(weights, 0)
            assert weights.requires_grad
            assert weights.tolist() == [2, 2, 2]


def check_window_wraps(window: int, num_messages: int) -> None:
    """More messages than the window has places, in both directions at once, at a sender that runs ahead."""
    rank = dist.get_rank()
    if rank > 1:
        make_buffer(window=window).close()
        return
    peer = 1 - rank
    with make_buffer(window=window) as buffer:
        for idx in range(num_messages + window):
            if idx < num_messages:
                buffer.pp_send(payload(rank, peer, idx, 100 + idx), peer)
            if idx >= window - 1 and (got_idx := idx - window + 1) < num_messages:
                got = space(100 + got_idx)
                buffer.pp_recv(got, peer)
                assert torch.equal(got, payload(peer, rank, got_idx, 100 + got_idx))


def check_sender_ahead_of_the_window_waits(window: int, size: int) -> None:
    """The window's sends return before the receiver begins; the next one only after it has, on the host or the device.

    Needs no timing: the receiver begins after it was told that the window is full, and says so before it asks.
    """
    rank = dist.get_rank()
    store = dist.PrefixStore(
        f"back-pressure/{SETTING.backend}/{SETTING.device.type}/{window}/{size}", dist.group.WORLD.get_group_store()
    )
    with make_buffer(window=window) as buffer:
        if rank == 0:
            for idx in range(window):
                buffer.pp_send(payload(0, 1, idx, size), 1)
            settle()
            store.set("full", "")
            buffer.pp_send(payload(0, 1, window, size), 1)
            if is_on_device():
                assert not store.check(["receiving"]), "the host must not wait for the receiver"
            settle()
            assert store.check(["receiving"]), "a send beyond the window did not wait for the receiver"
        elif rank == 1:
            store.wait(["full"])
            # A send that does not wait has time to show it.
            with pytest.raises(RuntimeError):
                store.wait(["never"], timedelta(seconds=0.3))
            store.set("receiving", "")
            for idx in range(window + 1):
                got = space(size)
                buffer.pp_recv(got, 0)
                assert torch.equal(got, payload(0, 1, idx, size))


def check_bidirectional(window: int) -> None:
    """All ranks first fill the windows to all others with large messages, and only then receive."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    size = 3 << 20
    others = [peer for peer in range(num_ranks) if peer != rank]
    with make_buffer(window=window) as buffer:
        for idx in range(window):
            for dst in others:
                buffer.pp_send(payload(rank, dst, idx, size), dst)
        for src in others:
            for idx in range(window):
                got = space(size)
                buffer.pp_recv(got, src)
                assert torch.equal(got, payload(src, rank, idx, size)), (src, idx)


@dataclass(frozen=True)
class Step:
    """A send or its receive, in an order of all ranks' steps in which nothing waits."""

    is_send: bool
    src: int
    dst: int
    idx: int
    sizes: tuple[int, ...]


def random_steps(rng: random.Random, num_ranks: int, window: int, num_messages: int) -> list[Step]:
    """Sends and receives between any ranks, interleaved at random within the window."""
    waiting: dict[tuple[int, int], deque[Step]] = {}
    num_sent: dict[tuple[int, int], int] = {}
    steps: list[Step] = []
    num_left = num_messages
    while num_left or any(waiting.values()):
        src, dst = rng.sample(range(num_ranks), 2)
        queue = waiting.setdefault((src, dst), deque())
        if num_left and len(queue) < window and rng.random() < 0.6:
            idx = num_sent[src, dst] = num_sent.get((src, dst), 0) + 1
            sizes = tuple(rng.choice(SIZES[:-1]) for _ in range(rng.choice((1, 1, 1, 2, 5))))
            steps.append(Step(True, src, dst, idx, sizes))
            queue.append(Step(False, src, dst, idx, sizes))
            num_left -= 1
        elif queue:
            steps.append(queue.popleft())
    return steps


def check_random_rounds(first_seed: int, num_rounds: int, rounds_per_config: int) -> int:
    """Rounds of random messages, with another configuration every few rounds. Returns how many were sent.

    `first_seed` is a multiple of `rounds_per_config`.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_sent = 0
    with open_buffer(timeout_s=TIMEOUT_S) as buffer:
        for seed in range(first_seed, first_seed + num_rounds):
            rng = random.Random(seed // rounds_per_config)
            window, max_bytes = rng.randint(1, 4), rng.randint(5 * 4128, 1 << 20)
            if seed % rounds_per_config == 0:
                buffer.pp_set_config(max_bytes, window)
            steps = random_steps(random.Random(seed), num_ranks, window, rng.randint(8, 16))
            # Made before and compared afterwards, so that where streams hold the messages, nothing waits in between.
            payloads = [
                [payload(step.src, step.dst, step.idx * 8 + part, size, seed) for part, size in enumerate(step.sizes)]
                for step in steps
            ]
            received = []
            for step, message in zip(steps, payloads, strict=True):
                if step.is_send and step.src == rank:
                    buffer.pp_send(message, step.dst)
                    num_sent += 1
                elif not step.is_send and step.dst == rank:
                    got = [space(size) for size in step.sizes]
                    buffer.pp_recv(got, step.src)
                    received.append((step, got, message))
            for step, got, message in received:
                for part, (tensor, expected) in enumerate(zip(got, message, strict=True)):
                    assert torch.equal(tensor, expected), (seed, step, part)
    return num_sent


def check_functions() -> None:
    """The functions do what the methods do, with a buffer of upstream's size."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    with open_buffer(None, get_pp_buffer_size_hint(100, 2), TIMEOUT_S) as buffer:
        pp_set_config(buffer, 100, 2)
        pp_send(buffer, number(rank), (rank + 1) % num_ranks)
        got = number(0)
        pp_recv(buffer, got, (rank - 1) % num_ranks, num_sms=4)
        assert got.item() == (rank - 1) % num_ranks


def check_two_buffers_of_one_group() -> None:
    """Messages of two buffers do not mix, though they are asked for in another order than sent."""
    rank = dist.get_rank()
    with make_buffer() as first, make_buffer() as second:
        if rank == 0:
            first.pp_send(number(1), 1)
            second.pp_send(number(2), 1)
        elif rank == 1:
            got = number(0)
            for buffer, expected in ((second, 2), (first, 1)):
                buffer.pp_recv(got, 0)
                assert got.item() == expected


def check_subgroup(members: list[int]) -> None:
    """Ranks are those of the group."""
    group = dist.new_group(members)
    if dist.get_rank() in members:
        with make_buffer(group) as buffer:
            last = len(members) - 1
            assert buffer.rank_idx == members.index(dist.get_rank())
            if buffer.rank_idx == 0:
                buffer.pp_send(number(members[0]), last)
            elif buffer.rank_idx == last:
                got = number(0)
                buffer.pp_recv(got, 0)
                assert got.item() == members[0]
    dist.barrier()


def check_group_without_a_host_backend() -> None:
    """A group that serves GPUs only is given host messages of its own."""
    rank = dist.get_rank()
    group = dist.new_group()
    original = collective.dist.get_backend_config
    transport = CollectiveTransport(group, timeout_s=TIMEOUT_S, name="test", operations=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collective.dist, "get_backend_config", lambda of: "cuda:nccl" if of is group else original(of))
        backend = collective.CollectiveBackend(Ledger(transport))
    assert backend._wire is not group
    backend._window = 1
    peer = rank ^ 1
    backend.send([number(rank)], peer)
    got = number(0)
    backend.recv([got], peer)
    assert got.item() == peer
    backend.flush()
    dist.barrier()


def check_reconfiguration() -> None:
    """After all messages were received, sizes and windows may change, and numbering goes on."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    dst, src = (rank + 1) % num_ranks, (rank - 1) % num_ranks
    with make_buffer(window=1, max_bytes=8) as buffer:
        for window, max_bytes in ((1, 8), (3, 1000), (2, 64), (1, 1)):
            buffer.pp_set_config(max_bytes, window)
            for idx in range(window):
                buffer.pp_send(payload(rank, dst, idx, max_bytes), dst)
            for idx in range(window):
                got = space(max_bytes)
                buffer.pp_recv(got, src)
                assert torch.equal(got, payload(src, rank, idx, max_bytes))
        with pytest.raises(ConfigError, match="the 32 bytes of a slot"):
            buffer.pp_send(space(33), dst)


def check_close_hands_over_what_was_sent() -> None:
    """A sender that closes and drops its buffer has lost nothing, and a receiver may close first."""
    rank = dist.get_rank()
    buffer = make_buffer(window=3)
    if rank == 0:
        for idx in range(3):
            buffer.pp_send(payload(0, 1, idx, 1 << 20), 1)
        buffer.close()
        buffer.close()
        del buffer
    elif rank == 1:
        for idx in range(3):
            got = space(1 << 20)
            buffer.pp_recv(got, 0)
            assert torch.equal(got, payload(0, 1, idx, 1 << 20))
    dist.barrier()
