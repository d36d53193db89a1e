"""Owns the device backend: V1's calls as CUDA kernels over the windows of an LSA team.

Nothing here is imported before a buffer opens the backend.
"""

__all__: list[str] = []
