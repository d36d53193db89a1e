from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deep_ep_core.doctor.findings import Finding
from deep_ep_core.doctor.gpu_answer import GpuAnswer
from deep_ep_core.doctor.machine import Machine, read_all_settings

NO_GPU = GpuAnswer(
    answers={
        "driver": {"is_present": False, "version": None, "cuda_version": None, "gpu_names": [], "reason": "no library"}
    }
)
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "capability": [9, 0],
    "memory_bytes": 80 * 2**30,
    "num_sms": 132,
    "nvlink_gbs": 405.0,
    "nvlink_reason": "",
}
DRIVER = {
    "is_present": True,
    "version": "580.82.07",
    "cuda_version": [13, 0],
    "gpu_names": [H100["name"]] * 2,
    "reason": "",
}
GPUS = {"gpus": [H100, H100], "peers": [[True, True], [True, True]], "reason": ""}
NCCL = {
    "has_device_api": True,
    "has_multimem": True,
    "has_host_rma": False,
    "gin_type": "GDAKI",
    "railed_gin_type": "GDAKI",
}
TWO_H100 = GpuAnswer(answers={"driver": DRIVER, "gpus": GPUS, "nccl": NCCL})


class Bench:
    """Make-believe machines, and a way to the findings of a probe by name."""

    no_gpu, two_h100 = NO_GPU, TWO_H100
    driver, gpus, nccl, h100 = DRIVER, GPUS, NCCL, H100

    def machine(
        self, gpus: GpuAnswer = NO_GPU, environ: dict[str, str] | None = None, settings_paths: Sequence[Path] = ()
    ) -> Machine:
        environ = {} if environ is None else environ
        return Machine(
            environ=environ,
            settings_paths=tuple(settings_paths),
            settings=read_all_settings(environ, settings_paths),
            gpus=gpus,
        )

    def found(self, look: Callable[..., Sequence[Finding]], machine: Machine, *args: Any) -> dict[str, Finding]:
        findings = look(machine, *args)
        by_name = {finding.name: finding for finding in findings}
        assert len(by_name) == len(findings), "a name came twice"
        return by_name


@pytest.fixture
def bench() -> Bench:
    return Bench()
