"""Owns the benchmark of V1's low-latency calls: `python -m deep_ep_legacy.bench`."""

__all__: list[str] = []
