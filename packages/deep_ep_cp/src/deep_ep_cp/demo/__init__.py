"""Owns the demo, `python -m deep_ep_cp.demo`: attention over a sequence that is split over ranks, and unsplit.

It is no library: read `attention` for how a model uses `deep_ep_cp`. Nothing else in the package imports it.
"""
