"""Owns what happens to keyword arguments that V1 does not have: those of its forks.

A value that asks for nothing is ignored with one warning; any other is refused, since ignoring it would change results.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from deep_ep_core.errors import ConfigError

__all__ = ["ignore_extra_arguments"]

# Arguments of forks that change no result, whatever their value, and why they have no meaning here.
_MEANINGLESS = {
    "use_fabric": "memory is not shared through fabric handles",
    "num_nvl_peers": "the ranks of a node are found, not told",
}
# What a combine of forks takes that overlaps with the multiplication in front of it; without `overlap` it does not look
# at them.
_OVERLAP_ARGUMENTS = (
    "packed_recv_count",
    "comp_signal",
    "block_m",
    "threshold",
    "num_sms",
    "src_signals",
    "src_signal_expect_value",
)
_MEANINGLESS_WITHOUT_OVERLAP = {
    "low_latency_combine": dict.fromkeys(_OVERLAP_ARGUMENTS, "it has a meaning with overlap=True only"),
}
_warned: set[tuple[str, str]] = set()


def ignore_extra_arguments(call: str, extra: Mapping[str, Any]) -> None:
    """Warn of arguments that can be ignored, once for each call and name.

    These are arguments that ask for nothing, and those that have no meaning here or without another one.

    Args:
        call: Name of the call, for the message.
        extra: The arguments that it does not know.

    Raises:
        ConfigError: One has a value that asks for something.
    """
    meaningless = _MEANINGLESS
    if _asks_for_nothing(extra.get("overlap")):
        meaningless = {**meaningless, **_MEANINGLESS_WITHOUT_OVERLAP.get(call, {})}
    for name, value in extra.items():
        if name not in meaningless and not _asks_for_nothing(value):
            raise ConfigError(
                f"{call} must be called without arguments that it does not have (got {name}={_shown(value)}); leave it "
                "out: no value but a default such as None, False or 0 can be ignored"
            )
        if (call, name) not in _warned:
            _warned.add((call, name))
            reason = meaningless.get(name, "it is no argument here, and the value asks for nothing")
            warnings.warn(f"{call} ignores {name}={_shown(value)}: {reason}", stacklevel=3)


def _asks_for_nothing(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and not value


def _shown(value: Any) -> str:
    return f"a tensor of {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
