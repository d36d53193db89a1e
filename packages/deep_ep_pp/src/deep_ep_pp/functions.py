"""Owns the methods of `PipelineBuffer` as functions, with the buffer first; nothing here keeps one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deep_ep_pp.buffer import PipelineBuffer

__all__ = ["pp_recv", "pp_send", "pp_set_config"]


def pp_set_config(buffer: PipelineBuffer, num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> None:
    """`PipelineBuffer.pp_set_config`. Collective: yes."""
    buffer.pp_set_config(num_max_tensor_bytes, num_max_inflight_tensors)


def pp_send(
    buffer: PipelineBuffer, t: torch.Tensor | Sequence[torch.Tensor], dst_rank_idx: int, num_sms: int = 0
) -> None:
    """`PipelineBuffer.pp_send`. Collective: no, between two ranks."""
    buffer.pp_send(t, dst_rank_idx, num_sms)


def pp_recv(
    buffer: PipelineBuffer, t: torch.Tensor | Sequence[torch.Tensor], src_rank_idx: int, num_sms: int = 0
) -> None:
    """`PipelineBuffer.pp_recv`. Collective: no, between two ranks."""
    buffer.pp_recv(t, src_rank_idx, num_sms)
