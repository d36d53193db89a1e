"""Row exchanges between all ranks, or some, whose results each rank checks byte by byte.

Rows are random bytes that both ends of a pair can make, unlike those of any other pair, so that a row from a wrong
place cannot pass, nor one that went through arithmetic: among the bytes are NaNs of every kind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from deep_ep_core.transport import CollectiveTransport, Operation, Rows

# Rows from each rank (down) to each rank (across): none, one, many, and a rank that sends nothing.
UNEVEN = ((1, 0, 3, 33), (0, 0, 0, 0), (32, 31, 2, 1), (5, 7, 0, 4))
OWN_ONLY = ((3, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 33))
NONE = ((0, 0, 0, 0),) * 4

Counts = Sequence[Sequence[int]]


def make_transport(group: dist.ProcessGroup | None = None, timeout_s: float = 60.0) -> CollectiveTransport:
    return CollectiveTransport(group, timeout_s=timeout_s, name="the test", operations=["move", "turn"])


def refusal_of(call: Callable[[], object]) -> str:
    """The message with which a call is refused."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def make_run(source: int, target: int, num_rows: int, row_shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The rows from one rank to another, as bytes."""
    generator = torch.Generator().manual_seed(source * 100 + target)
    # A bool has two values only.
    end = 2 if dtype == torch.bool else 256
    num_bytes = num_rows * math.prod(row_shape) * dtype.itemsize
    return torch.randint(0, end, (num_bytes,), dtype=torch.uint8, generator=generator)


def make_rows(rank: int, counts: Counts, row_shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What a rank sends."""
    runs = [make_run(rank, target, num, row_shape, dtype) for target, num in enumerate(counts[rank])]
    return torch.cat(runs).view(dtype).view(sum(counts[rank]), *row_shape)


def check_arrived(
    arrived: torch.Tensor, rank: int, counts: Counts, row_shape: Sequence[int], dtype: torch.dtype
) -> None:
    runs = [make_run(source, rank, row[rank], row_shape, dtype) for source, row in enumerate(counts)]
    assert arrived.shape == (sum(row[rank] for row in counts), *row_shape)
    assert arrived.dtype == dtype
    assert torch.equal(arrived.cpu().view(-1).view(torch.uint8), torch.cat(runs))


def move(
    transport: CollectiveTransport,
    counts: Counts,
    row_shape: Sequence[int] = (5,),
    dtype: torch.dtype = torch.int64,
    device: str = "cpu",
    operation: Operation | None = None,
) -> None:
    """One exchange, an operation of its own unless it is part of one, with its check."""
    rank = transport.rank
    operation = operation or transport.begin("move", [])
    rows = make_rows(rank, counts, row_shape, dtype).to(device)
    arrived = operation.exchange_rows(rows, counts[rank], [row[rank] for row in counts], "rows")
    assert arrived.device == rows.device
    check_arrived(arrived, rank, counts, row_shape, dtype)


def check_move(counts: Counts, row_shape: Sequence[int], dtype: torch.dtype) -> None:
    move(make_transport(), counts, row_shape, dtype)


def check_move_into_larger_tensor() -> None:
    transport = make_transport()
    rank, dtype = transport.rank, torch.float8_e4m3fn
    num_recv_rows = [row[rank] for row in UNEVEN]
    out = torch.full((sum(num_recv_rows) + 7, 16), 0xA5, dtype=torch.uint8).view(dtype)
    operation = transport.begin("move", [])
    arrived = operation.exchange_rows(make_rows(rank, UNEVEN, (16,), dtype), UNEVEN[rank], num_recv_rows, "rows", out)
    assert arrived is out
    check_arrived(out[: sum(num_recv_rows)], rank, UNEVEN, (16,), dtype)
    assert (out.view(torch.uint8)[sum(num_recv_rows) :] == 0xA5).all(), "rows behind the last one were written"


def check_several_tensors() -> None:
    """Tensors of different dtypes and shapes between the same pairs at once: none may take another's place."""
    transport = make_transport()
    rank = transport.rank
    kinds: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((3,), torch.int32),
        ((4096,), torch.bfloat16),
        ((), torch.float32),
        ((2, 2), torch.float32),
    ]
    operation = transport.begin("move", [])
    parts = [Rows(make_rows(rank, UNEVEN, shape, dtype)) for shape, dtype in kinds]
    arrived = operation.exchange(parts, UNEVEN[rank], [row[rank] for row in UNEVEN], "parts")
    for tensor, (shape, dtype) in zip(arrived, kinds, strict=True):
        check_arrived(tensor, rank, UNEVEN, shape, dtype)


def check_exchange_of_nothing_waits_for_nobody() -> None:
    """Rank 0 is through before the others begin."""
    transport = make_transport()
    operation = transport.begin("move", [])
    if transport.rank > 0:
        dist.barrier()
    move(transport, NONE, operation=operation)
    if transport.rank == 0:
        dist.barrier()


def check_several_exchanges_of_an_operation() -> None:
    transport = make_transport()
    operation = transport.begin("move", [])
    for row_shape in ((1,), (1000,), ()):
        move(transport, UNEVEN, row_shape, operation=operation)
    assert operation.num_phases == 4, "the header and three exchanges"


def mistake_own_rows() -> None:
    """A count of this rank's own rows that differs is a bug here, which a copy would hide by repeating the one row."""
    transport = make_transport()
    rank = transport.rank
    operation = transport.begin("move", [])
    num_recv_rows = [3 if target == rank else 0 for target in range(transport.num_ranks)]
    num_send_rows = [1 if target == rank else 0 for target in range(transport.num_ranks)]
    operation.exchange_rows(torch.ones(1, 2), num_send_rows, num_recv_rows, "rows")


def check_peer_values() -> None:
    transport = make_transport()
    rank = transport.rank
    values = [[10 * rank + peer, -(2**63) + peer, rank] for peer in range(transport.num_ranks)]
    operation = transport.begin("move", [], values)
    assert operation.peer_values == [[10 * peer + rank, -(2**63) + rank, peer] for peer in range(transport.num_ranks)]
    assert transport.begin("turn", []).peer_values == [[] for _ in range(transport.num_ranks)]
    assert [list(row) for row in transport.begin("turn", [], [[1, 2, 3, rank]] * transport.num_ranks).peer_values] == [
        [1, 2, 3, peer] for peer in range(transport.num_ranks)
    ]


def check_two_transports_on_one_group() -> None:
    """Each counts its own operations, and their exchanges may be interleaved."""
    first, second = make_transport(), make_transport(dist.group.WORLD)
    first.begin("turn", [])
    on_first, on_second = first.begin("move", []), second.begin("move", [])
    assert (on_first.idx, on_second.idx) == (2, 1)
    move(second, UNEVEN, (2,), operation=on_second)
    move(first, UNEVEN, (3,), torch.int16, operation=on_first)
    move(second, OWN_ONLY, (2,), operation=on_second)


def check_subgroup(members: list[int]) -> None:
    """Ranks of a group are counted in the group; those outside it cannot make a transport, and need not take part."""
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        assert "made by the members of its group only" in refusal_of(lambda: make_transport(group))
        return
    transport = make_transport(group)
    assert (transport.rank, transport.num_ranks) == (members.index(dist.get_rank()), len(members))
    assert transport.group is group
    counts = [[3 * source + target for target in range(len(members))] for source in range(len(members))]
    move(transport, counts)
    told = refusal_of(lambda: transport.begin("move" if transport.rank == 0 else "turn", []))
    assert "rank 0: move, rank 1: turn" in told
    assert f"on rank {transport.rank}" in told
    dist.destroy_process_group(group)


def check_groups_of_one() -> None:
    """A rank alone exchanges with itself, and waits for nobody."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group = groups[dist.get_rank()]
    transport = make_transport(group)
    operation = transport.begin("move", [], [[7]])
    assert operation.peer_values == [[7]]
    move(transport, [[4]], operation=operation)
    dist.destroy_process_group(group)


def check_default_group() -> None:
    transport = make_transport(None)
    assert transport.group is dist.group.WORLD
    assert (transport.rank, transport.num_ranks) == (dist.get_rank(), dist.get_world_size())


def check_move_on_gpu(backend: str) -> None:
    """Tensors of a GPU over a group that has, or lacks, a backend for it."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    group = dist.new_group(backend=backend)
    transport = make_transport(group)
    size = transport.num_ranks
    counts = [[2 * source + target + 1 for target in range(size)] for source in range(size)]
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        move(transport, counts, (64,), dtype, device="cuda")
    move(transport, counts, (64,), torch.int16, device="cpu")
    dist.destroy_process_group(group)
