"""Gives `EventHandle` and `EventOverlap` under the name that callers of DeepEP import them by. It has nothing else."""

from deep_ep_legacy import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
