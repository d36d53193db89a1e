"""Owns which GPUs a local launch uses, and in which order each rank sees them.

It asks NVML, the driver's management library, which makes no CUDA context: the process that starts ranks takes no
memory of a GPU and may fork. Letting ranks of one GPU run at once is the business of `deep_ep_core.local.mps`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from deep_ep_core.errors import ConfigError

__all__ = ["SHARED_GPU_DEFAULTS", "find_gpus", "parse_visible_devices", "visible_devices"]

# What NCCL and CUDA need where ranks share a GPU, unless the user's environment says otherwise. NCCL refuses two ranks
# of one GPU without the first. Kernels of all ranks wait for each other, so they must fit on the GPU at once: with
# NCCL's own default number of blocks, 4 ranks on an H100 hung in their first all-reduce (NCCL 2.30.7, 2026-11-24). A
# client of MPS has few hardware queues, and streams of a process share them: what a waiting kernel waits for must not
# be queued behind it. With the default, signals of the loopback network were, now and then; with 8 queues never.
SHARED_GPU_DEFAULTS: Mapping[str, str] = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_MAX_CTAS": "2",
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",
}

_SMI_TIMEOUT_S = 60.0
_SMI_LINE = re.compile(r"^GPU \d+: .*\(UUID: (GPU-[^)]+)\)", flags=re.MULTILINE)


def find_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs of this machine that `CUDA_VISIBLE_DEVICES` lets a process see, in the order in which it sees them.

    Args:
        environment: Where `CUDA_VISIBLE_DEVICES` and `PATH` are looked up. An index counts GPUs by PCI bus, as CUDA
            does where all GPUs are of one model or `CUDA_DEVICE_ORDER` is `PCI_BUS_ID`.

    Returns:
        Their UUIDs, at least one.

    Raises:
        ConfigError: There is none.
    """
    gpus, reason = _all_gpus(environment)
    setting = environment.get("CUDA_VISIBLE_DEVICES")
    if gpus and setting is not None:
        reason = f"CUDA_VISIBLE_DEVICES={setting!r} names none of the {len(gpus)} GPUs of this machine, or one twice"
        gpus = parse_visible_devices(setting, gpus)
    if not gpus:
        raise ConfigError(
            f'device="cuda" needs an NVIDIA GPU that this process may see (got none: {reason}); run where there '
            'is one with its driver, unset CUDA_VISIBLE_DEVICES, or use device="cpu"'
        )
    return gpus


def parse_visible_devices(setting: str, gpus: Sequence[str]) -> tuple[str, ...]:
    """What a value of `CUDA_VISIBLE_DEVICES` selects, by CUDA's rules.

    Args:
        setting: Indices into `gpus` and UUIDs, or their beginnings, between commas. The first entry that names no GPU
            ends the list; MIG instances are not looked for. A GPU that is named twice leaves none.
        gpus: UUIDs of all GPUs.

    Returns:
        The UUIDs of the selected GPUs, in the order in which they are named.
    """
    selected: list[str] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdecimal():
            matches = list(gpus[int(entry) : int(entry) + 1])
        else:
            matches = [uuid for uuid in gpus if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(matches) != 1:
            break
        selected += matches
    return tuple(selected) if len(set(selected)) == len(selected) else ()


def visible_devices(gpus: Sequence[str], first_rank_of_node: int) -> str:
    """The `CUDA_VISIBLE_DEVICES` of the ranks of a make-believe node.

    A script takes the GPU `LOCAL_RANK % device_count`, and `LOCAL_RANK` begins at 0 in every node. So the list is
    turned until the GPU of the node's first rank comes first; then rank r of all ranks gets GPU r % num_gpus. No GPU is
    left out: ranks can open each other's memory however they do it.

    UUIDs rather than indices: an MPS server counts the GPUs that it was started with, so an index would mean
    different GPUs in a rank and in its server.

    Args:
        gpus: UUIDs of the GPUs that the launch uses.
        first_rank_of_node: Rank, among all ranks, of the node's first rank.
    """
    shift = first_rank_of_node % len(gpus)
    return ",".join([*gpus[shift:], *gpus[:shift]])


def _all_gpus(environment: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """UUIDs of all GPUs by PCI bus, and a reason for the case that there are none."""
    try:
        import pynvml  # a source checkout may run without it; loads the driver's library at the first call
    except ModuleNotFoundError:
        return _gpus_of_smi(environment)
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(idx) for idx in range(pynvml.nvmlDeviceGetCount())]
            return tuple(pynvml.nvmlDeviceGetUUID(handle) for handle in handles), "NVML finds no GPU"
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return (), f"NVML says: {error}"


def _gpus_of_smi(environment: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return (), "nvidia-smi is not on PATH, and the package nvidia-ml-py is not installed"
    try:
        done = subprocess.run(
            [program, "-L"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SMI_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi -L did not end within {_SMI_TIMEOUT_S:g} s"
    if done.returncode != 0:
        return (), f"nvidia-smi -L says: {done.stdout.strip()}"
    return tuple(_SMI_LINE.findall(done.stdout)), "nvidia-smi -L lists no GPU"
