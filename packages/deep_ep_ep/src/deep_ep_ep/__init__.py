"""Expert-parallel dispatch and combine for mixture-of-experts models.

`ElasticBuffer` is the entry point. `deep_ep_ep.autograd` makes its calls differentiable, `deep_ep_ep.quant` casts to
FP8 and back, `deep_ep_ep.reference` says what the results must be. Importing this package does no work.
"""

from deep_ep_core.stream import EventHandle, EventOverlap
from deep_ep_ep.buffer import ElasticBuffer, get_logical_domain_size, get_physical_domain_size, topk_idx_t
from deep_ep_ep.handle import EPHandle

__version__ = "0.1.0"

__all__ = [
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]
