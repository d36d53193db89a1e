"""Owns the make-believe network between processes of one machine: an RMA plugin for NCCL, so GIN runs without a NIC.

The plugin is C, in `plugin/`, and is compiled on first use. The launcher gives it to its ranks with `--nodes`; other
starters pass `loopback_variables` on. It is for tests: a real network is NCCL's own business.
"""

from __future__ import annotations

from deep_ep_core.loopback.build import build_plugin
from deep_ep_core.loopback.counters import PeerCounts, read_counters
from deep_ep_core.loopback.variables import loopback_variables

__all__ = ["PeerCounts", "build_plugin", "loopback_variables", "read_counters"]
