"""A table whose entries are sharded over the ranks of a group, and fetched by index.

`EngramTable` is the entry point; `engram_write` and `engram_fetch` are its methods as functions. Importing this package
does no work.
"""

from deep_ep_engram.backend import Fetched, FetchHook
from deep_ep_engram.functions import engram_fetch, engram_write
from deep_ep_engram.sizing import get_engram_storage_size_hint
from deep_ep_engram.table import EngramTable

__version__ = "0.1.0"

__all__ = [
    "EngramTable",
    "FetchHook",
    "Fetched",
    "__version__",
    "engram_fetch",
    "engram_write",
    "get_engram_storage_size_hint",
]
