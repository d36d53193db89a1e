"""Owns how the streams of all ranks meet, once an operation, and how it comes out that they came with different calls.

A rank tells each peer, behind what it wrote there, that it came, and what with; its stream waits until all have told it
the same. The host waits for none of it: the digests that came are copied to it, and compared when it next looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from deep_ep_core.copy_engine import Copy, copy_batch
from deep_ep_core.cuda_streams import RecordedEvent
from deep_ep_core.errors import CommTimeoutError, DeepEPError, RankMismatchError
from deep_ep_core.stream_order import CudaStreamOrder
from deep_ep_core.stream_signals import Awaited, StreamSignals
from deep_ep_core.transport import CollectiveTransport
from deep_ep_cp.agreed import agreed_by_call, digest_of_call
from deep_ep_cp.device.memory import NUM_HALVES, WORD_BYTES, ContextMemory
from deep_ep_cp.region import Region

__all__ = ["MAX_AHEAD", "Meetings"]

_DIGEST_BITS = 32
# Digests are read as signed integers of 64 bits.
_NUM_NUMBERS = 1 << 31

MAX_AHEAD = 1024
"""Meetings that the host may be ahead of the device. It waits for the oldest one beyond that."""


class _Meeting(NamedTuple):
    operation: str
    session_idx: int
    regions: Sequence[Region]
    digest: int
    heard: torch.Tensor
    event: RecordedEvent


class Meetings:
    """The meetings of one buffer, in the order of its operations, which is the same on every rank.

    Args:
        memory: Where the words are.
        signals: Writes and waits.
        transport: Finds the words for ranks that disagree; its operations are those of the calls.
        num_ahead: See `MAX_AHEAD`.
    """

    def __init__(
        self,
        memory: ContextMemory,
        signals: StreamSignals,
        transport: CollectiveTransport,
        *,
        num_ahead: int = MAX_AHEAD,
    ) -> None:
        self._memory = memory
        self._signals = signals
        self._transport = transport
        self._order = CudaStreamOrder(memory.device)
        rank, num_ranks = memory.rank, memory.num_ranks
        # Each rank begins with another peer, so that they do not all write to one.
        self._peers = [(rank + step) % num_ranks for step in range(1, num_ranks)]
        # On the CPU, for tests, copies need no pinned memory.
        is_cuda = memory.device.type == "cuda"
        self._heard = torch.zeros(num_ahead, num_ranks, dtype=torch.int64, device="cpu", pin_memory=is_cuda)
        self._pending: deque[_Meeting] = deque()
        self._num_meetings = 0
        self._failure: DeepEPError | None = None

    def check(self, stream: torch.cuda.Stream) -> None:
        """Raise what is known by now of meetings that were enqueued. Blocks no host, unless ranks disagree.

        Args:
            stream: The stream that is to be used next.

        Raises:
            CommTimeoutError: A rank did not come in time.
            RankMismatchError: The ranks came with different calls; the host has asked them by then which.
            ConfigError: A graph captures the stream.
        """
        if self._failure is not None:
            raise self._failure
        # Before waits that expired are told of: ranks that disagree may wait for each other in the end.
        while self._pending and self._order.is_done(self._pending[0].event):
            self._compare(self._pending.popleft())
        self._signals.check_usable(stream.cuda_stream)

    def meet(self, stream: torch.cuda.Stream, operation: str, session_idx: int, regions: Sequence[Region]) -> None:
        """Let a stream wait until every rank's stream has come to the same operation.

        What the streams wrote before is there for all of them then.

        Args:
            stream: The stream.
            operation: One of the transport's operations.
            session_idx: Number of the session.
            regions: What the call uses; none for the end of a session.
        """
        if not self._peers:
            return
        if len(self._pending) == len(self._heard):
            stream.synchronize()
            self.check(stream)
        self._num_meetings += 1
        idx, memory, signals = self._num_meetings, self._memory, self._signals
        handle, half, rank = stream.cuda_stream, idx % NUM_HALVES, memory.rank
        # With the number of the meeting, as an old digest must not be taken for one of this meeting.
        digest = idx % _NUM_NUMBERS << _DIGEST_BITS | digest_of_call(operation, session_idx, regions)
        words = []
        for peer in self._peers:
            words.append((memory.digest_address(peer, half, rank), digest))
            words.append((memory.arrival_address(peer, rank), idx))
        signals.write_all(handle, words)
        awaited = [Awaited(memory.arrival_address(rank, peer), idx, peer) for peer in self._peers]
        signals.wait_all(handle, awaited, phase=f"{operation} in session {session_idx}")
        # Before this rank comes to the next meeting, and so before a peer can write to this half again.
        row = self._heard[idx % len(self._heard)]
        copy_batch(handle, [Copy(row.data_ptr(), memory.digest_address(rank, half, 0), memory.num_ranks * WORD_BYTES)])
        self._pending.append(_Meeting(operation, session_idx, regions, digest, row, RecordedEvent(stream)))

    def _compare(self, meeting: _Meeting) -> None:
        heard = meeting.heard.tolist()
        others = [peer for peer in self._peers if heard[peer] != meeting.digest]
        if not others:
            return
        strayed = [peer for peer in others if heard[peer] >> _DIGEST_BITS != meeting.digest >> _DIGEST_BITS]
        if strayed:
            # The wait has expired and let the stream go on without them.
            self._signals.check()
        # Meetings behind this one are of no use, and may never be complete.
        self._signals.abandon()
        try:
            # All ranks see that they disagree, so all come here, but for those that gave up waiting for this one.
            self._transport.begin(meeting.operation, agreed_by_call(meeting.session_idx, meeting.regions))
        except RankMismatchError as error:
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(error.values))
            self._failure = RankMismatchError(
                f"every rank of the group must call {self._transport.name} with the same {error.field} (got {listed}; "
                f"seen in {meeting.operation} on rank {self._memory.rank}, after the bytes were sent); make the ranks "
                "agree, and a new buffer on all of them: what was gathered in this session may be overwritten",
                field=error.field,
                values=error.values,
            )
            raise self._failure from error
        except CommTimeoutError as error:
            self._failure = self._left_behind(meeting, strayed) if strayed else error
            raise self._failure from error
        except DeepEPError as error:
            self._failure = error
            raise
        assert not others, (meeting, heard)

    def _left_behind(self, meeting: _Meeting, peers: Sequence[int]) -> CommTimeoutError:
        """What to raise where peers are at a later meeting and do not answer: they gave up waiting for this rank."""
        rank, phase = self._memory.rank, f"{meeting.operation} in session {meeting.session_idx}"
        names = f"rank{'s' if len(peers) > 1 else ''} {', '.join(map(str, peers))}"
        return CommTimeoutError(
            f"{self._transport.name}: {phase}: rank {rank} must come within the timeout of its peers, but {names} gave "
            f"up waiting and went on; see what held rank {rank} up, or raise the timeout if it was only slow. What was "
            "gathered is undefined: make the buffer anew on all ranks, or stop",
            phase=phase,
            rank=rank,
            peers=peers,
        )
