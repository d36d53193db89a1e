"""What one rank has closed stays for the others until they have closed too, and no one waits for it."""

from __future__ import annotations

import engram_leaving


def test_parts_go_when_every_rank_has_left(rank_pool):
    outcomes = rank_pool(3).run(engram_leaving.leave_in_turn)
    both = ["network", "storage"]
    # Who comes last closes at once, the others when they look; a table that one rank never closes stays.
    assert outcomes == [[[], [], [], both], [[], [], [], both], [[], [], both, both]]
