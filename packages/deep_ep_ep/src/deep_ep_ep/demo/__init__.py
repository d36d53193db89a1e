"""Owns the demo, `python -m deep_ep_ep.demo`: a small MoE language model, trained with and without expert parallelism.

It is no library: read `sharded` for how a model uses `deep_ep_ep`. Nothing else in the package imports it.
"""
