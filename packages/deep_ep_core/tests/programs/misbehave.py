"""One rank misbehaves once all are up; the others sleep for an hour, or end well if it is `hang` that it does.

Usage: misbehave.py FOLDER RANK raise|exit|kill|hang. Each rank starts a child and leaves both process ids in FOLDER.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def announce(folder: Path, rank: int) -> None:
    child = subprocess.Popen(["sleep", "3600"])
    draft = folder / f"{rank}.draft"
    draft.write_text(f"{os.getpid()} {child.pid}")
    draft.rename(folder / f"{rank}.pids")
    while len(list(folder.glob("*.pids"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)


def sleep_for_an_hour() -> None:
    time.sleep(3600)


def misbehave(action: str) -> None:
    if action == "raise":
        raise ValueError("the value is wrong on purpose")
    if action == "exit":
        sys.exit(7)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sleep_for_an_hour()


def main() -> None:
    folder, bad_rank, action = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    rank = int(os.environ["RANK"])
    announce(folder, rank)
    if rank == bad_rank:
        misbehave(action)
    elif action != "hang":
        sleep_for_an_hour()


main()
