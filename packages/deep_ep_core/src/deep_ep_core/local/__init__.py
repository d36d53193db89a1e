"""Owns rank processes on this machine: the launcher's processes, the rank pool of tests, and script entry points.

It does not choose a backend or place ranks on devices: that is the program's business. Importing it does not import
torch.
"""

from __future__ import annotations

from deep_ep_core.local.pool import Outcome, RankPool
from deep_ep_core.local.processes import LaunchConfig, RankExit, RankProcesses
from deep_ep_core.local.worker import run_as_script

__all__ = ["LaunchConfig", "Outcome", "RankExit", "RankPool", "RankProcesses", "run_as_script"]
