"""Pipeline-parallel send and receive between any ranks of a group, with an in-flight window.

`PipelineBuffer` is the entry point; the functions do the same with the buffer as their first argument.
`python -m deep_ep_pp.demo` runs a pipeline with them. Importing this package does no work.
"""

from deep_ep_pp.buffer import BackendName, PipelineBuffer
from deep_ep_pp.functions import pp_recv, pp_send, pp_set_config
from deep_ep_pp.sizing import get_pp_buffer_size_hint

__version__ = "0.1.0"

__all__ = [
    "BackendName",
    "PipelineBuffer",
    "__version__",
    "get_pp_buffer_size_hint",
    "pp_recv",
    "pp_send",
    "pp_set_config",
]
