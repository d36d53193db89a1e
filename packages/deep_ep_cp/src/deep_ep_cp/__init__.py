"""All-gather and reduce-scatter for context parallelism, in sessions over one buffer.

`ContextBuffer` is the entry point. `all_gather` and `reduce_scatter` do the same in one call each, with gradients.
Importing this package does no work.
"""

from deep_ep_cp.buffer import ContextBuffer
from deep_ep_cp.functions import all_gather, reduce_scatter
from deep_ep_cp.handle import SessionHandle

__version__ = "0.1.0"

__all__ = ["ContextBuffer", "SessionHandle", "__version__", "all_gather", "reduce_scatter"]
