"""Uses the module `deep_ep` where `deep_ep_ep` cannot be found; prints what each way to a name came to, as JSON."""

from __future__ import annotations

import importlib.abc
import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class Hidden(importlib.abc.MetaPathFinder):
    """Lets nobody find `deep_ep_ep`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] == "deep_ep_ep":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def outcome(statement: str) -> str:
    try:
        exec(statement, {})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


if __name__ == "__main__":
    sys.meta_path.insert(0, Hidden())
    import deep_ep

    told = {
        "from": outcome("from deep_ep import ElasticBuffer"),
        "attribute": outcome("import deep_ep; deep_ep.EPHandle"),
        "v1": outcome("from deep_ep import Buffer, Config, EventHandle, EventOverlap, topk_idx_t, __version__"),
        "utils": outcome("from deep_ep.utils import EventHandle, EventOverlap"),
        "hasattr": hasattr(deep_ep, "ElasticBuffer"),
    }
    print(json.dumps(told))
