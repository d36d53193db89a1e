"""Owns rank processes on this machine: the launcher's processes, the rank pool of tests, and script entry points.

It says which GPU a rank finds, but makes no rank use it and chooses no backend: that is the program's business.
Importing it does not import torch.
"""

from __future__ import annotations

from deep_ep_core.local.config import LaunchConfig
from deep_ep_core.local.pool import Outcome, RankPool
from deep_ep_core.local.processes import RankExit, RankProcesses
from deep_ep_core.local.worker import run_as_script

__all__ = ["LaunchConfig", "Outcome", "RankExit", "RankPool", "RankProcesses", "run_as_script"]
