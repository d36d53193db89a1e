"""Owns what the choice of a backend has beside core's: where received rows live."""

from __future__ import annotations

from typing import Literal, get_args

from deep_ep_core.backend_choice import BackendName, agreed_by_backend, check_backend
from deep_ep_core.errors import ConfigError
from deep_ep_core.transport import AgreedField

__all__ = ["BackendName", "RecvMemory", "agreed_by_choice", "check_choice"]

RecvMemory = Literal["auto", "window", "torch"]
"""Where received rows live, see `ElasticBuffer`."""


def check_choice(backend: object, recv_memory: object) -> None:
    """Check the names.

    Raises:
        ConfigError: One is none of those that there are.
    """
    check_backend(backend)
    if recv_memory not in get_args(RecvMemory):
        raise ConfigError(f'recv_memory must be "auto", "window" or "torch" (got {recv_memory!r})')


def agreed_by_choice(backend: BackendName, recv_memory: RecvMemory) -> list[AgreedField]:
    """The values of a choice that every rank must pass alike."""
    memories = get_args(RecvMemory)
    return [
        *agreed_by_backend(backend),
        AgreedField(name="recv_memory", value=memories.index(recv_memory), show=lambda value: str(memories[value])),
    ]
