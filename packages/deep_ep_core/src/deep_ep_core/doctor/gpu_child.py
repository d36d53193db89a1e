"""Owns what is asked of the driver, of torch's CUDA and of NCCL. It is run in a process of its own, for any may hang.

usage: python -m deep_ep_core.doctor.gpu_child [--driver-only] TIMEOUT_S

Prints one JSON object a line: `{"doing": ...}` before each step, and `{"step": ..., "answer": {...}}` or
`{"step": ..., "error": ...}` after it. `gpu_answer` reads them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

__all__ = ["main"]

_DRIVER_LIBRARY = "libcuda.so.1"


def main(arguments: Sequence[str]) -> int:
    """Take the steps, each only if the one before it gives it something to do.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit status, 0: what went wrong is in the output.
    """
    report = _take_stdout()
    driver = _step(report, "driver", "asking the driver", _ask_driver)
    is_absent = driver is not None and not driver["is_present"]
    if is_absent or "--driver-only" in arguments:
        return 0
    gpus = _step(report, "gpus", "asking torch for the GPUs", _ask_torch)
    if gpus is not None and gpus["gpus"]:
        _step(report, "nccl", "opening a communicator of one rank", lambda: _ask_nccl(float(arguments[-1])))
    return 0


def _take_stdout() -> TextIO:
    """Keep the output for the answers: NCCL and others write to stdout too, and what they write goes to stderr."""
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return report


def _step(report: TextIO, name: str, doing: str, ask: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    print(json.dumps({"doing": doing}), file=report, flush=True)
    try:
        answer = ask()
    except Exception as error:
        print(json.dumps({"step": name, "error": f"{type(error).__name__}: {error}"}), file=report, flush=True)
        return None
    print(json.dumps({"step": name, "answer": answer}), file=report, flush=True)
    return answer


def _ask_driver() -> dict[str, Any]:
    """Version and GPUs, by NVML. Without NVML there may be a driver nevertheless, on boards that have no NVML."""
    import pynvml

    absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    answer: dict[str, Any] = {"is_present": True, "version": None, "cuda_version": None, "gpu_names": [], "reason": ""}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value not in absent:
            raise
        return {**answer, "is_present": _has_driver_library(), "reason": f"NVML says: {error}"}
    code = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    names = [
        pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(idx)) for idx in range(pynvml.nvmlDeviceGetCount())
    ]
    version = pynvml.nvmlSystemGetDriverVersion()
    return {**answer, "version": version, "cuda_version": [code // 1000, code % 1000 // 10], "gpu_names": names}


def _has_driver_library() -> bool:
    try:
        ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def _ask_torch() -> dict[str, Any]:
    """The GPUs that torch sees, and who reaches whom."""
    import torch

    from deep_ep_core.doctor.logged import LoggedWarnings
    from deep_ep_core.links import nvlink_gbs

    try:
        torch.cuda.init()
    except Exception as error:
        return {"gpus": [], "peers": [], "reason": str(error)}
    gpus = []
    for idx in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(idx)
        with LoggedWarnings("deep_ep_core.links") as logged:
            rate_gbs = nvlink_gbs(idx)
        gpus.append(
            {
                "name": found.name,
                "capability": [found.major, found.minor],
                "memory_bytes": found.total_memory,
                "num_sms": found.multi_processor_count,
                "nvlink_gbs": rate_gbs,
                "nvlink_reason": "; ".join(logged.messages),
            }
        )
    indices = range(len(gpus))
    peers = [[a == b or torch.cuda.can_device_access_peer(a, b) for b in indices] for a in indices]
    return {"gpus": gpus, "peers": peers, "reason": "" if gpus else "torch sees none"}


def _ask_nccl(timeout_s: float) -> dict[str, Any]:
    """What NCCL says of a communicator of this process alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks up the machine's name, which need not resolve
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    import torch
    import torch.distributed as dist

    from deep_ep_core.nccl.communicator import Communicator

    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in its list of names
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with Communicator.open(None, torch.device("cuda", 0), reuse=False, timeout_s=timeout_s) as communicator:
        answer = dataclasses.asdict(communicator.properties)
    return {**answer, "gin_type": answer["gin_type"].name, "railed_gin_type": answer["railed_gin_type"].name}


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    # All is said: what taking down CUDA and NCCL may do is not waited for.
    sys.stderr.flush()
    os._exit(exit_status)
