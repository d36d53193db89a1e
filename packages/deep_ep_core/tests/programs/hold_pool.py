"""Keeps the two ranks of a pool busy until it is killed; each rank prints its process id."""

import os
import time

from deep_ep_core.local import RankPool


def hold() -> None:
    print(os.getpid())
    time.sleep(3600)


if __name__ == "__main__":
    RankPool(2).run(hold, timeout_s=3700)
