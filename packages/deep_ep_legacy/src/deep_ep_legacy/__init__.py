"""The V1 API: `Buffer` with its normal and low-latency calls, and `Config`.

The wheel also holds the module `deep_ep`, which gives existing callers these names and those of `deep-ep-ep`. Importing
this package does no work.
"""

from deep_ep_core.stream import EventHandle, EventOverlap
from deep_ep_legacy.buffer import Buffer
from deep_ep_legacy.config import Config
from deep_ep_legacy.handles import InternodeHandle, IntranodeHandle
from deep_ep_legacy.layout import topk_idx_t

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "InternodeHandle",
    "IntranodeHandle",
    "__version__",
    "topk_idx_t",
]
