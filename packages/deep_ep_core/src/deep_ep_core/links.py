"""Owns the question of how fast the links of this machine are: NVLink from the driver, network ports from the kernel.

It reports nominal rates and measures nothing. An unknown rate is None with one logged warning, never 0; what to assume
instead is the caller's business.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from deep_ep_core.env import get_env
from deep_ep_core.errors import DeepEPError

__all__ = ["UnknownRateError", "nvlink_gbs", "rdma_gbs"]

_logger = logging.getLogger(__name__)

# Part of a link's rate that payload gets; the rest is headers. The value is part of DeepEP's published behaviour.
_NVLINK_EFFICIENCY = 0.9
_MB_PER_GB = 1000
_BITS_PER_BYTE = 8

_INFINIBAND_ROOT = Path("/sys/class/infiniband")
# The kernel prints for example `400 Gb/sec (4X NDR)` and `4: ACTIVE`.
_PORT_RATE = re.compile(r"([0-9.]+) Gb/sec")
_PORT_IS_ACTIVE = re.compile(r"[0-9]+: ACTIVE\b")
# What opening or reading an attribute says when the port is not there, or its driver answers no such question.
_ABSENT_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.EINVAL})


class UnknownRateError(DeepEPError):
    """What a reader of link rates raises when it cannot tell; `nvlink_gbs` turns it into None and a warning."""


def _read_nvlink_rates_mbs(device_idx: int) -> list[int]:
    """Ask the driver, through NVML, for the rates of a GPU's NVLinks that are up.

    Args:
        device_idx: torch's index of the GPU, so `CUDA_VISIBLE_DEVICES` counts.

    Returns:
        The rate of each such link each way, in MB/s (1e6 bytes); empty for a GPU without NVLink.

    Raises:
        UnknownRateError: There is no such GPU, no NVIDIA driver, or the driver does not tell.
    """
    import pynvml  # loads the driver's library at the first call, which importing this module must not do

    num_devices = torch.cuda.device_count()
    if not 0 <= device_idx < num_devices:
        raise UnknownRateError(f"torch sees {num_devices} CUDA devices")
    # NVML counts all GPUs of the machine, torch the visible ones in an order of its own; the UUID is common to both.
    uuid = f"GPU-{torch.cuda.get_device_properties(device_idx).uuid}"
    absent = {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_NOT_FOUND,
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NO_PERMISSION,
    }
    try:
        pynvml.nvmlInit()
        try:
            return _read_active_links(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        if error.value not in absent:
            raise
        raise UnknownRateError(f"NVML says: {error}") from error


def _read_active_links(handle: object) -> list[int]:
    import pynvml

    (num_links,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_NVLINK_LINK_COUNT])
    if num_links.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(num_links.nvmlReturn)
    rates_mbs = []
    for link_idx in range(num_links.value.uiVal):
        state, rate = pynvml.nvmlDeviceGetFieldValues(
            handle,
            [(pynvml.NVML_FI_DEV_NVLINK_GET_STATE, link_idx), (pynvml.NVML_FI_DEV_NVLINK_GET_SPEED, link_idx)],
        )
        # A link that is not wired on this board has no state. One that sleeps wakes when it is used.
        is_up = state.nvmlReturn == pynvml.NVML_SUCCESS and state.value.uiVal in (
            pynvml.NVML_NVLINK_STATE_ACTIVE,
            pynvml.NVML_NVLINK_STATE_SLEEP,
        )
        if is_up:
            if rate.nvmlReturn != pynvml.NVML_SUCCESS:
                raise pynvml.NVMLError(rate.nvmlReturn)
            rates_mbs.append(rate.value.uiVal)
    return rates_mbs


@functools.cache
def nvlink_gbs(device_idx: int, *, reader: Callable[[int], Sequence[float]] = _read_nvlink_rates_mbs) -> float | None:
    """What a GPU's NVLinks carry together each way: nine tenths of the rates of its active links.

    Args:
        device_idx: torch's index of the GPU.
        reader: Gives the rates of the active links of a GPU in MB/s, or raises `UnknownRateError`.

    Returns:
        The rate in GB/s (1e9 bytes), the same value for the life of the process, or None when it is unknown or the GPU
        has no active NVLink.

    Collective: no.
    """
    try:
        total_mbs = sum(reader(device_idx))
    except UnknownRateError as error:
        _logger.warning("the NVLink rate of GPU %d is unknown: %s", device_idx, error)
        return None
    if total_mbs <= 0:
        _logger.warning("the NVLink rate of GPU %d is unknown: no NVLink of it is active", device_idx)
        return None
    return _NVLINK_EFFICIENCY * total_mbs / _MB_PER_GB


@functools.cache
def rdma_gbs(nic_name: str | None = None, *, root: Path = _INFINIBAND_ROOT) -> float | None:
    """What one RDMA network port carries each way.

    Takes the fastest active port of the card that is named; where it has none, the fastest active port of all cards.

    Args:
        nic_name: Name of the card, or None for the one that `EP_NIC_NAME` names.
        root: Folder in which the kernel lists the cards.

    Returns:
        The nominal rate in GB/s (1e9 bytes), the same value for the life of the process; None when no port is active.

    Collective: no.
    """
    wanted = get_env().nic_name if nic_name is None else nic_name
    rates_gbs = {nic.name: max(rates) for nic in _list_folder(root) if (rates := _active_port_rates_gbs(nic))}
    if not rates_gbs:
        _logger.warning("the RDMA rate is unknown: no active port in %s", root)
        return None
    if wanted not in rates_gbs:
        fastest = max(rates_gbs, key=lambda name: rates_gbs[name])
        _logger.warning(
            "network card %s has no active port; taking the rate of %s, %g GB/s (EP_NIC_NAME names another)",
            wanted,
            fastest,
            rates_gbs[fastest],
        )
        return rates_gbs[fastest]
    return rates_gbs[wanted]


def _active_port_rates_gbs(nic: Path) -> list[float]:
    rates_gbs = []
    for port in _list_folder(nic / "ports"):
        rate = _PORT_RATE.match(_read_attribute(port / "rate"))
        if rate and _PORT_IS_ACTIVE.match(_read_attribute(port / "state")):
            rates_gbs.append(float(rate[1]) / _BITS_PER_BYTE)
    return rates_gbs


def _list_folder(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_attribute(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        if error.errno not in _ABSENT_ERRNOS:
            raise
        return ""
