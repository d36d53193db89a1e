"""Rows that a caller permuted find their way back to the order in which dispatch laid them."""

from __future__ import annotations

import pytest
import torch

from deep_ep_ep.device.plan import source_order


@pytest.mark.parametrize("num_padding", [0, 3])
@pytest.mark.parametrize("counts", [(3, 0, 4), (0, 0, 0), (1,)], ids=str)
def test_permuted_rows_come_back_and_rows_without_a_source_come_last(counts, num_padding):
    row_ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    num_real = sum(counts)
    generator = torch.Generator().manual_seed(0)
    metadata = torch.full((num_real + num_padding, 4), -7, dtype=torch.int32)
    # Global indices of tokens grow with (source rank, token), and what lies behind the real rows is not initialised.
    sources = torch.arange(num_real, dtype=torch.int32) * 3
    permutation = torch.randperm(num_real, generator=generator)
    metadata[:num_real, 0] = sources[permutation]
    order = source_order(metadata, row_ends)
    assert order.dtype == torch.int64
    assert torch.equal(metadata.index_select(0, order)[:num_real, 0], sources)
    assert sorted(order.tolist()) == list(range(num_real + num_padding))
    assert order[num_real:].tolist() == list(range(num_real, num_real + num_padding))
