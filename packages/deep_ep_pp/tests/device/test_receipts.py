"""What the device tells the host of a message is read when it is whole, and its memory is not used again too early."""

from __future__ import annotations

from deep_ep_pp.device.layout import encode_header
from deep_ep_pp.device.receipts import Receipt, Receipts


def fill(receipt: Receipt, sizes: list[int], number: int | None = None) -> None:
    for idx, word in enumerate(encode_header(receipt.number if number is None else number, sizes)):
        receipt.words[idx] = word


def expect(receipts: Receipts, number: int, given: list[int], src: int = 0) -> Receipt:
    receipt = receipts.make(f"pp_recv #{number} from rank {src}", src, number, given)
    receipts.add(receipt)
    return receipt


def test_a_receipt_is_done_when_its_last_word_is_there():
    receipts = Receipts(is_pinned=False)
    receipt = expect(receipts, 1, [5, 0, 7])
    words = encode_header(1, [5, 0, 7])
    for idx in (2, 0):
        receipt.words[idx] = words[idx]
        assert not receipt.is_done
    assert receipts.next_wrong() is None
    assert receipts.are_awaited
    receipt.words[1] = words[1]
    assert receipt.is_done
    assert receipt.is_right
    assert receipts.next_wrong() is None
    assert not receipts.are_awaited


def test_each_wrong_message_is_told_once_and_sources_do_not_wait_for_each_other():
    receipts = Receipts(is_pinned=False)
    expect(receipts, 1, [5], src=0)
    wrong = [expect(receipts, number, [5], src=1) for number in (1, 2, 3)]
    fill(wrong[0], [6])
    fill(wrong[1], [5])
    fill(wrong[2], [5], number=4)
    assert receipts.next_wrong() is wrong[0]
    assert receipts.next_wrong() is wrong[2]
    assert receipts.next_wrong() is None
    assert receipts.are_awaited


def test_a_row_is_used_again_when_the_next_message_of_its_source_has_come_and_then_it_is_empty():
    """The copy into it may not have ended, but that of the next message is behind it in the stream."""
    receipts = Receipts(is_pinned=False)
    first = expect(receipts, 1, [5])
    address = first.address
    fill(first, [5])
    assert receipts.next_wrong() is None
    made = [receipts.make("", 0, 2, [5]) for _ in range(200)]
    assert address not in [receipt.address for receipt in made]
    receipts.add(made[0])
    fill(made[0], [5])
    assert receipts.next_wrong() is None
    again = [receipts.make("", 0, 3, [5]) for _ in range(200)]
    (same,) = [receipt for receipt in again if receipt.address == address]
    assert not any(same.words)
