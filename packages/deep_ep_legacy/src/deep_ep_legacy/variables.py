"""Owns the warning that environment variables of V1's build have no effect here. It reads them, and nothing else."""

from __future__ import annotations

import functools
import os
import warnings

__all__ = ["warn_of_v1_variables"]

# TORCH_CUDA_ARCH_LIST is not here: it is set for many other builds, so a warning of it would be noise.
_WITHOUT_EFFECT = {
    "DISABLE_SM90_FEATURES": "V1's kernels are not built here, so there is nothing to leave out",
    "DISABLE_AGGRESSIVE_PTX_INSTRS": "no such load or store is used in any case",
    "EP_NVSHMEM_ROOT_DIR": "this version does not use NVSHMEM",
    "NVSHMEM_DIR": "this version does not use NVSHMEM",
}


@functools.cache
def warn_of_v1_variables() -> None:
    """Warn of each variable of V1 that is set and has no effect, once in a process."""
    for name, reason in _WITHOUT_EFFECT.items():
        if os.environ.get(name):
            warnings.warn(f"{name} is set but has no effect on deep_ep_legacy: {reason}", stacklevel=3)
