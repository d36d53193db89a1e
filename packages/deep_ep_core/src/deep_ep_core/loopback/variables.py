"""Owns the variables that put a rank on the loopback network. It sets none itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deep_ep_core.env import get_env
from deep_ep_core.loopback.build import build_plugin

__all__ = ["NETWORK_CHOICES", "loopback_variables"]

NETWORK_CHOICES = ("NCCL_RMA_PLUGIN", "NCCL_GIN_PLUGIN", "NCCL_GIN_TYPE", "NCCL_GIN_ENABLE", "NCCL_RMA_DISABLE")
"""Variables by which a user chooses NCCL's one-sided network; with any of them set, nothing is chosen here."""

# GIN of this type puts NCCL's own device queues on top of an RMA plugin.
_GIN_TYPE_PROXY = "2"


def loopback_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank needs in its environment to use the loopback network; compiles it if need be.

    Args:
        environment: The user's environment.

    Returns:
        Variables to add, empty where the user has chosen a network or has turned GIN off. The plugin reads
        `EP_LOOPBACK_*` from the environment only, so those that come from a settings file are among them.

    Raises:
        ConfigError: There is no C compiler, or a setting is not allowed.
        CompileError: The plugin does not compile.
    """
    env = get_env()
    if env.disable_gin or any(name in environment for name in NETWORK_CHOICES):
        return {}
    variables = {"NCCL_RMA_PLUGIN": str(build_plugin()), "NCCL_GIN_TYPE": _GIN_TYPE_PROXY}
    settings: dict[str, int | Path | None] = {
        "EP_LOOPBACK_DELAY_US": env.loopback_delay_us,
        "EP_LOOPBACK_REORDER": env.loopback_reorder,
        "EP_LOOPBACK_DROP_RANK": env.loopback_drop_rank,
        "EP_LOOPBACK_DROP_AFTER": env.loopback_drop_after,
        "EP_LOOPBACK_COUNTERS": None if env.loopback_counters is None else env.loopback_counters.absolute(),
    }
    variables.update({name: str(value) for name, value in settings.items() if value is not None})
    return variables
