"""Gradients of the functions: finite differences, both directions of each other, and ranks that differ."""

from __future__ import annotations

import torch
import torch.distributed as dist
from cp_calls import assert_bits_equal, expected_gather, expected_sum, make_buffer, make_tensor
from cp_setting import arange, full, ones

from deep_ep_cp import all_gather, reduce_scatter


def check_gradcheck() -> None:
    """Finite differences move one rank's input at a time, so each rank's loss counts in turn."""
    buffer, rank, num_ranks = make_buffer(), dist.get_rank(), dist.get_world_size()
    for function, shape in ((all_gather, (2, 3)), (reduce_scatter, (num_ranks, 2))):
        x = make_tensor(shape, torch.float64, rank).requires_grad_()
        weights = [make_tensor(shape, torch.float64, 5, source) for source in range(num_ranks)]
        y = function(buffer, x)
        weight = make_tensor(y.shape, torch.float64, 6, rank)
        (y.sin() * weight).sum().backward()
        direction = weights[rank]
        # The loss of all ranks, moved along all ranks' directions at once.
        step = 1e-6
        losses = [(function(buffer, x.detach() + sign * step * direction).sin() * weight).sum() for sign in (1, -1)]
        expected = ((losses[0] - losses[1]) / (2 * step)).cpu()
        got = (x.grad * direction).sum().cpu()
        for value in (expected, got):
            dist.all_reduce(value)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def check_each_is_the_others_backward() -> None:
    """To the bit, bfloat16 with one rounding included; a batch, of which an integer has no gradient."""
    buffer, rank, num_ranks = make_buffer(), dist.get_rank(), dist.get_world_size()
    for dtype in (torch.bfloat16, torch.float32, torch.complex64):
        x = make_tensor((5,), dtype, rank).requires_grad_()
        y, ids = all_gather(buffer, [x, arange(3)])
        assert not ids.requires_grad
        y.backward(make_tensor((num_ranks, 5), dtype, 1, rank))
        assert_bits_equal(x.grad, expected_sum((5,), dtype, 1))
        x = make_tensor((num_ranks, 5), dtype, rank).requires_grad_()
        reduce_scatter(buffer, x).backward(make_tensor((5,), dtype, 2, rank))
        assert_bits_equal(x.grad, expected_gather((5,), dtype, 2))


def check_second_derivatives() -> None:
    """The sum over ranks of a loss whose second derivative is known: 6 x of each gathered copy."""
    buffer, rank, num_ranks = make_buffer(), dist.get_rank(), dist.get_world_size()
    x = make_tensor((4,), torch.float64, rank).requires_grad_()
    (first,) = torch.autograd.grad((all_gather(buffer, x) ** 3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, num_ranks * 3 * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    # Every rank's loss depends on every rank's x, and every rank's first derivative is asked for.
    torch.testing.assert_close(second, num_ranks * 6 * x)


def check_who_wants_a_gradient_may_differ() -> None:
    """Rank 0 needs none for the first tensor, and uses one of the results only; backward is the same call for all."""
    buffer, rank, num_ranks = make_buffer(), dist.get_rank(), dist.get_world_size()
    one, two = ones(3, requires_grad=rank != 0), ones(2, requires_grad=True)
    first, second = all_gather(buffer, [one, two])
    (second.sum() if rank == 0 else first.sum() + second.sum()).backward()
    assert (one.grad is None) == (rank == 0)
    if rank:
        assert one.grad.tolist() == [num_ranks - 1] * 3
    assert two.grad.tolist() == [num_ranks] * 2


def check_backward_in_a_session() -> None:
    buffer = make_buffer()
    x = ones(3, requires_grad=True)
    with buffer.agrs_new_session():
        kept, wait = buffer.all_gather(full((2,), dist.get_rank()))
        all_gather(buffer, x).sum().backward()
        wait()
        assert kept[:, 0].tolist() == list(range(buffer.num_ranks))
    assert x.grad.tolist() == [buffer.num_ranks] * 3
