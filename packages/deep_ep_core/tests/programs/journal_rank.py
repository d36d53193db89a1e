"""A rank that notes its start and its end in the journal of `mps_fake.py`, and prints its environment between them.

Usage: journal_rank.py end|raise|sleep. The others sleep for an hour when rank 1 raises.
"""

import json
import os
import sys
import time


def note(text: str) -> None:
    with open(os.environ["FAKE_MPS_JOURNAL"], "a") as journal:
        journal.write(f"{text}\n")


def main() -> None:
    note(f"rank {os.environ['RANK']} started {os.getpid()}")
    print(json.dumps({"environment": dict(os.environ)}), flush=True)
    if sys.argv[1] == "raise" and os.environ["RANK"] == "1":
        raise ValueError("the value is wrong on purpose")
    if sys.argv[1] != "end":
        time.sleep(3600)


main()
