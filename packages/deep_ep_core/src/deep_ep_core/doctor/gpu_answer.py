"""Owns the reading of what the process of `gpu_child` said, and the starting of that process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deep_ep_core.doctor.child import ChildOutcome, run_child

__all__ = ["GpuAnswer", "ask_gpus"]

_CHILD_MODULE = "deep_ep_core.doctor.gpu_child"
# Of the whole deadline, what a communicator may take: the rest is for starting Python, torch and CUDA.
_NCCL_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAnswer:
    """What was learned of the GPUs.

    Attributes:
        answers: By step (`driver`, `gpus`, `nccl`), what came of it; a step that has none was not taken or failed.
        errors: By step, why it failed.
        crashed_step: The step whose error is that the process crashed or hung, or None.
        not_asked_because: Why nothing was asked at all, or an empty string.
    """

    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    crashed_step: str | None = None
    not_asked_because: str = ""

    @classmethod
    def of(cls, outcome: ChildOutcome) -> GpuAnswer:
        """What the child said. Where it crashed or hung, the step that it was at failed."""
        answers, errors, doing = {}, {}, "starting Python"
        steps: list[str] = ["driver", "gpus", "nccl"]
        for record in outcome.records:
            if "doing" in record:
                doing = record["doing"]
            elif "answer" in record:
                answers[record["step"]] = record["answer"]
                steps.remove(record["step"])
            elif "error" in record:
                errors[record["step"]] = record["error"]
                steps.remove(record["step"])
        crashed_step = steps[0] if outcome.failure and steps else None
        if crashed_step is not None:
            errors[crashed_step] = f"a process that was {doing} failed: {outcome.failure}"
        return cls(answers=answers, errors=errors, crashed_step=crashed_step)

    @property
    def driver(self) -> Mapping[str, Any] | None:
        """Answer of the driver: `is_present`, `version`, `cuda_version`, `gpu_names`, `reason`; None if unknown."""
        return self.answers.get("driver")

    @property
    def gpus(self) -> list[Mapping[str, Any]] | None:
        """The GPUs that torch sees: `name`, `capability`, `memory_bytes`, `num_sms`, `nvlink_gbs`, `nvlink_reason`."""
        answer = self.answers.get("gpus")
        return None if answer is None else list(answer["gpus"])

    @property
    def has_gpu(self) -> bool | None:
        """Whether this machine has a GPU; None if unknown."""
        if self.gpus or (self.driver is not None and self.driver["gpu_names"]):
            return True
        if self.not_asked_because or self.errors or self.driver is None:
            return None
        return False

    def why_unknown(self, step: str) -> str:
        """Why a step has no answer."""
        if self.not_asked_because:
            return f"not asked: {self.not_asked_because}"
        if step in self.errors:
            return self.errors[step]
        if self.errors:
            return f"not asked, because this failed: {_first(self.errors.values())}"
        return "not asked: there is no GPU that torch can use"


def _first(texts: Iterable[str]) -> str:
    return next(iter(texts))


def ask_gpus(timeout_s: float, *, driver_only: bool) -> GpuAnswer:
    """Ask the driver, torch's CUDA and NCCL, in a process of its own.

    Args:
        timeout_s: Deadline of the whole.
        driver_only: Whether to leave out torch and NCCL, for a torch without CUDA.
    """
    arguments = ["--driver-only"] if driver_only else []
    try:
        return GpuAnswer.of(run_child(_CHILD_MODULE, [*arguments, str(timeout_s * _NCCL_SHARE)], timeout_s=timeout_s))
    except OSError as error:
        return GpuAnswer(errors={"driver": f"a process cannot be started: {error}"})
