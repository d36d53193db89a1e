"""Owns what the device tells the host of received messages: their headers, compared with what was asked for.

The host does not wait for a message, so it can compare only later. Looking costs no CUDA call.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

import torch

from deep_ep_pp.device.layout import HEADER_WORDS, WORD_BYTES, Header, decode_header, stamp_of

__all__ = ["Receipt", "Receipts"]

_ROWS_PER_BLOCK = 64
_ROW_BYTES = HEADER_WORDS * WORD_BYTES


class Receipt:
    """What the host will be told of one message.

    Args:
        operation: The receive, for messages.
        src: The rank that sent it.
        number: Its number.
        given: Bytes of each tensor that it is received into.
        words: Where a stream copies its header to, `HEADER_WORDS` words, all 0 before.

    Attributes:
        operation, src, number, given: As passed.
        words: As passed.
        header: The header, once `is_done`.
    """

    __slots__ = ("given", "header", "number", "operation", "src", "words")

    def __init__(self, operation: str, src: int, number: int, given: list[int], words: Any) -> None:
        self.operation = operation
        self.src = src
        self.number = number
        self.given = given
        self.words = words
        self.header: Header | None = None

    @property
    def address(self) -> int:
        """Where a stream copies the header to."""
        return ctypes.addressof(self.words)

    @property
    def is_done(self) -> bool:
        """Whether the header is there: each of its words is written as a whole, and none is 0."""
        if self.header is None and self.words[0]:
            self.header = decode_header(self.words[:])
        return self.header is not None

    @property
    def is_right(self) -> bool:
        """Whether the message that came is the one that was asked for."""
        header = self.header
        return header is not None and header.stamp == stamp_of(self.number) and header.sizes == self.given


class Receipts:
    """The receipts of one rank that are not compared yet, in their order for each source.

    Args:
        is_pinned: Whether the rows are pinned memory, which streams can write; False for tests.
    """

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._blocks: list[torch.Tensor] = []
        self._spare: list[Any] = []
        self._pending: dict[int, deque[Receipt]] = {}
        # The last row of each source, into which a copy may still write words that do not count.
        self._lingering: dict[int, Any] = {}

    def make(self, operation: str, src: int, number: int, given: list[int]) -> Receipt:
        """A receipt for the next message of a source; the caller lets a stream fill it, and then adds or takes it."""
        if not self._spare:
            self._add_block()
        words = self._spare.pop()
        ctypes.memset(ctypes.addressof(words), 0, _ROW_BYTES)
        return Receipt(operation, src, number, given, words)

    def add(self, receipt: Receipt) -> None:
        """Take a receipt that a stream will fill."""
        self._pending.setdefault(receipt.src, deque()).append(receipt)

    @property
    def are_awaited(self) -> bool:
        """Whether a message has not come yet."""
        return any(not receipt.is_done for receipts in self._pending.values() for receipt in receipts)

    def next_wrong(self) -> Receipt | None:
        """The next receipt whose message came and is not what was asked for. Each is told once."""
        for receipts in self._pending.values():
            while receipts and receipts[0].is_done:
                receipt = receipts.popleft()
                self.let_go(receipt)
                if not receipt.is_right:
                    return receipt
        return None

    def let_go(self, receipt: Receipt) -> None:
        """Use the row of a receipt that is done again, once the next message of its source is."""
        before = self._lingering.get(receipt.src)
        if before is not None:
            self._spare.append(before)
        self._lingering[receipt.src] = receipt.words

    def _add_block(self) -> None:
        # Rows are kept: there are never many more than receives were under way at once.
        block = torch.zeros(_ROWS_PER_BLOCK, HEADER_WORDS, dtype=torch.int64, device="cpu", pin_memory=self._is_pinned)
        self._blocks.append(block)
        row_type = ctypes.c_int64 * HEADER_WORDS
        self._spare += [row_type.from_address(block.data_ptr() + idx * _ROW_BYTES) for idx in range(_ROWS_PER_BLOCK)]
