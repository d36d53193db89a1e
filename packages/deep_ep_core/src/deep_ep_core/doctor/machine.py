"""Owns what the probes are given: the settings, and what the driver, torch and NCCL said of the GPUs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deep_ep_core.doctor.gpu_answer import GpuAnswer
from deep_ep_core.env import VARIABLES, Env, load_env
from deep_ep_core.errors import ConfigError

if TYPE_CHECKING:
    from deep_ep_core.jit.options import JitOptions

__all__ = ["Machine", "Settings", "read_all_settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings.

    Attributes:
        env: The settings; where they cannot be read, what the environment has of allowed ones.
        refusal: Why they cannot be read, or an empty string.
        warnings: What reading them warned of.
    """

    env: Env
    refusal: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the probes are given.

    Attributes:
        environ: The environment.
        settings_paths: The settings files, the strongest first.
        settings: What both together say.
        gpus: What was learned of the GPUs.
    """

    environ: Mapping[str, str]
    settings_paths: tuple[Path, ...]
    settings: Settings
    gpus: GpuAnswer

    @property
    def jit_options(self) -> JitOptions:
        """Where the run-time compiler looks."""
        from deep_ep_core.jit.options import JitOptions  # imports torch, which may be what is broken

        return JitOptions.from_env(self.settings.env)


def read_all_settings(environ: Mapping[str, str], settings_paths: Sequence[Path]) -> Settings:
    """Read the settings as `deep_ep_core.env` does, but keep what it refuses and warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            env, refusal = load_env(environ, settings_paths), ""
        except ConfigError as error:
            env, refusal = load_env(_allowed(environ)), str(error)
    return Settings(env=env, refusal=refusal, warnings=tuple(str(warning.message) for warning in caught))


def _allowed(environ: Mapping[str, str]) -> dict[str, str]:
    allowed = {}
    for variable in VARIABLES:
        text = environ.get(variable.name)
        if text is not None and variable.is_set_by(text):
            with contextlib.suppress(ConfigError):
                variable.parse(text, "the environment")
                allowed[variable.name] = text
    return allowed
