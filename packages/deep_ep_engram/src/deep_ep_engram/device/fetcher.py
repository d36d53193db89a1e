"""Owns the launch of the kernel that copies fetched rows, and the news of indices that are out of range.

Where entries lie is said by `storage`, what comes over the network by `network`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deep_ep_core.jit import LaunchShape, PreparedLaunch, get_kernel
from deep_ep_core.wait import TimeoutLog
from deep_ep_engram.checks import out_of_range
from deep_ep_engram.device.fetch_kernel import (
    MAX_FETCH_BLOCKS,
    EntryTable,
    FetchParams,
    IndexList,
    StagedRows,
    fetch_launch_shape,
    fetch_spec,
    word_bytes_of,
)

__all__ = ["FetchRequest", "RowFetcher", "index_list"]

_INDEX_PHASE = "the check of indices"
# Most tables: rows of whole 16 bytes.
_USUAL_WORD_BYTES = 16
# The report waits for nothing; a log wants a timeout all the same.
_NO_WAIT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FetchRequest:
    """What one fetch wants, and where it goes.

    Attributes:
        indices: `[num_tokens, num_each]` int32 or int64.
        data: `[num_tokens, num_each * hidden]`, contiguous.
        row_bytes: Bytes of an entry.
        sf: The scales of all entries; None without.
        out_sf: Where those that are wanted go, in either layout.
        fetch_idx: Number of the fetch.
    """

    indices: torch.Tensor
    data: torch.Tensor
    row_bytes: int
    sf: torch.Tensor | None
    out_sf: torch.Tensor | None
    fetch_idx: int

    @property
    def num_rows(self) -> int:
        """Entries that are wanted, equal ones counted as often as they are."""
        return self.indices.numel()


def index_list(indices: torch.Tensor) -> IndexList:
    """Indices as kernels take them."""
    return IndexList(values=indices.data_ptr(), is_wide=indices.dtype == torch.int64)


class RowFetcher:
    """The lists that kernels look entries up in, and the kernel that copies rows.

    Args:
        rank: This rank.
        device: Device of this rank.
        addresses: Where this rank sees the entries of each rank; 0 where no load reaches them.
        num_gpu_ranks: Ranks that run on this rank's GPU, and share its SMs.

    Attributes:
        table: The lists, for kernel parameters. They stay where they are.
    """

    def __init__(self, *, rank: int, device: torch.device, addresses: Sequence[int], num_gpu_ranks: int) -> None:
        self._rank = rank
        self._device = device
        assert device.index is not None, "a communicator knows which device it is on"
        self._device_idx: int = device.index
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._max_blocks = max(min(num_sms // num_gpu_ranks, MAX_FETCH_BLOCKS), 1)
        self._starts = torch.zeros(len(addresses) + 1, dtype=torch.int64, device=device)
        self._entries = torch.tensor(addresses, dtype=torch.uint64).view(torch.int64).to(device)
        self.table = EntryTable(
            starts=self._starts.data_ptr(), entries=self._entries.data_ptr(), num_ranks=len(addresses)
        )
        self._num_entries = 0
        self._log = TimeoutLog(rank=rank, device=device)
        self._report = self._log.params(first_phase=self._log.add_phases([_INDEX_PHASE]), timeout_s=_NO_WAIT_S)
        self._launches: dict[tuple[int, LaunchShape], PreparedLaunch] = {}

    def set_starts(self, starts: Sequence[int]) -> None:
        """Let kernels know the entries of each rank. No fetch may be under way; the host waits."""
        self._starts.copy_(torch.tensor(starts, dtype=torch.int64))
        self._num_entries = starts[-1]

    def prepare(self, row_bytes: int = _USUAL_WORD_BYTES) -> None:
        """Compile the kernel for rows of that size, or take it from the cache.

        Raises:
            CompileError: It does not compile.
        """
        get_kernel(fetch_spec(word_bytes_of(row_bytes)), self._device_idx)

    def launch(self, request: FetchRequest, stream: int, staged: StagedRows | None = None) -> None:
        """Copy the rows that loads reach, and all scales; or the rows that came over the network.

        Args:
            request: What is wanted.
            stream: Handle of the stream.
            staged: Where the rows that came over the network lie; None copies all others.
        """
        num_each = request.indices.size(1)
        has_sf = request.sf is not None and request.out_sf is not None
        params = FetchParams(
            table=self.table,
            indices=index_list(request.indices),
            report=self._report,
            staged=staged or StagedRows(rows=None, slot_of_row=None, row_of_slot=None),
            data=request.data.data_ptr(),
            sf=request.sf.data_ptr() if request.sf is not None else None,
            out_sf=request.out_sf.data_ptr() if request.out_sf is not None else None,
            num_rows=request.num_rows,
            row_bytes=request.row_bytes,
            sf_token_stride=request.out_sf.stride(0) if request.out_sf is not None else 0,
            sf_column_stride=request.out_sf.stride(1) if request.out_sf is not None else 0,
            fetch_idx=request.fetch_idx,
            num_each=num_each,
            num_packs=request.sf.size(1) if has_sf and request.sf is not None else 0,
            is_staged=staged is not None,
        )
        shape = fetch_launch_shape(request.num_rows, request.row_bytes, max_blocks=self._max_blocks)
        self._prepared(word_bytes_of(request.row_bytes), shape)(params, stream)

    def check(self) -> None:
        """Raise if a kernel has met an index that is out of range, once for all that were met so far.

        Raises:
            ConfigError: It names one of them, and the fetch.

        Stream: the host waits for the device before it raises; without a report there is no CUDA call.
        """
        if not self._log.has_record:
            return
        report = self._log.read()
        assert report is not None, "there is a record"
        # As `find_source` in `fetch_rows.cuh` fills it.
        position, num_each, fetch_idx = report.expected, report.peer, report.waited_ns
        index = report.seen - 2**64 if report.seen >= 2**63 else report.seen
        # The table can be used again.
        self._log.reset()
        place = list(divmod(position, num_each))
        raise out_of_range(self._rank, self._num_entries, f"{index} at {place} of engram_fetch #{fetch_idx}")

    def _prepared(self, word_bytes: int, shape: LaunchShape) -> PreparedLaunch:
        found = self._launches.get((word_bytes, shape))
        if found is None:
            kernel = get_kernel(fetch_spec(word_bytes), self._device_idx)
            found = self._launches[word_bytes, shape] = PreparedLaunch(kernel, shape)
        return found
