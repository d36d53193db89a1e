"""The benchmark: `python -m deep_ep_cp.bench`.

Not part of what `deep_ep_cp` promises: names and options here may change with any version.
"""
