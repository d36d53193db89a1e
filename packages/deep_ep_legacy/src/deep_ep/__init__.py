"""The import name of DeepEP, for callers that know it: V1 from `deep_ep_legacy`, V2 from `deep_ep_ep`.

The names of V2 are looked up when they are first used, since `deep-ep-ep` is an extra. Importing this module does no
work.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from deep_ep_legacy import Buffer, Config, EventHandle, EventOverlap, __version__, topk_idx_t

if TYPE_CHECKING:
    from deep_ep_ep import ElasticBuffer, EPHandle, get_logical_domain_size, get_physical_domain_size

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]

_FROM_EP = frozenset({"EPHandle", "ElasticBuffer", "get_logical_domain_size", "get_physical_domain_size"})


def __getattr__(name: str) -> Any:
    """A name of V2, from `deep_ep_ep`.

    Raises:
        AttributeError: There is no such name, or `deep-ep-ep` is not installed; so `hasattr` tells which API is there.
        ImportError: The same for `from deep_ep import name` without `deep-ep-ep`.
    """
    if name not in _FROM_EP:
        raise AttributeError(f"module 'deep_ep' has no attribute {name!r}")
    try:
        module = importlib.import_module("deep_ep_ep")
    except ModuleNotFoundError as error:
        if error.name != "deep_ep_ep":
            raise
        message = f"deep_ep.{name} needs the package deep-ep-ep; pip install deep-ep-ep, or deep-ep-legacy[ep]"
        # An import statement would replace the text of an AttributeError by its own, which does not tell what to do.
        is_import = sys._getframe(1).f_globals.get("__name__") == "importlib._bootstrap"
        raise (ImportError if is_import else AttributeError)(message, name=name) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
