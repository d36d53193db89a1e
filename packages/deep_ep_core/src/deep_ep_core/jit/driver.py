"""Owns the thin step to the CUDA driver, through the package cuda-bindings, which is imported at the first call."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from deep_ep_core.errors import ConfigError, TransportError
from deep_ep_core.jit.compiler import arch_name

__all__ = ["check_status", "device_arch", "driver_call", "load_driver"]


@functools.cache
def load_driver() -> Any:
    """The module `cuda.bindings.driver`, with the driver initialised.

    Raises:
        ConfigError: cuda-bindings is not installed.
        TransportError: There is no driver, or it does not initialise.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise ConfigError(
            f"launching a kernel needs the package cuda-bindings ({error}); install deep-ep-core[cu13]"
        ) from error
    try:
        status = driver.cuInit(0)[0]
    except RuntimeError as error:
        # cuda-bindings finds no libcuda.
        raise TransportError(f"the CUDA driver must be installed ({error})", call="cuInit") from error
    check_status(driver, "cuInit", status)
    return driver


def check_status(driver: Any, name: str, status: Any, *, what: str = "") -> None:
    """Raise if a driver call failed.

    Args:
        driver: The module `cuda.bindings.driver`.
        name: The call.
        status: What it returned.
        what: What it was called for, for the message.

    Raises:
        TransportError: With the call's name and the symbolic name of its error.
    """
    if status != driver.CUresult.CUDA_SUCCESS:
        text = driver.cuGetErrorString(status)[1]
        explanation = text.decode() if isinstance(text, bytes) else "no explanation"
        called = f"{name} of {what}" if what else name
        raise TransportError(f"{called} failed: {status.name} ({explanation})", call=name, code_name=status.name)


def driver_call(name: str, *args: Any) -> Any:
    """Call a function of the driver and return its result, if it has one.

    Raises:
        TransportError: The call fails.
    """
    driver = load_driver()
    status, *results = getattr(driver, name)(*args)
    check_status(driver, name, status)
    return results[0] if len(results) == 1 else results


@functools.cache
def device_arch(device_idx: int) -> str:
    """The architecture that kernels for a device are compiled for, for example `sm_90a`."""
    attributes = load_driver().CUdevice_attribute
    device = driver_call("cuDeviceGet", device_idx)
    major = driver_call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = driver_call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return arch_name(major, minor)
