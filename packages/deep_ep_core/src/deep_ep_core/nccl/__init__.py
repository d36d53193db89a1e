"""The NCCL runtime: one libnccl, communicators, windows, device communicators.

Host calls only. Nothing is looked for, loaded or called at import.
"""

from __future__ import annotations

from deep_ep_core.nccl.communicator import Communicator
from deep_ep_core.nccl.device_comm import DeviceComm, DeviceCommConfig, GinConfig, GinConnection
from deep_ep_core.nccl.library import MIN_NCCL_VERSION, NcclLibrary, load_nccl
from deep_ep_core.nccl.properties import CommProperties, GinType, Team
from deep_ep_core.nccl.shared import shared_communicator
from deep_ep_core.nccl.window import WINDOW_ALIGNMENT, NcclMemory, Window, WindowFlags

__all__ = [
    "MIN_NCCL_VERSION",
    "WINDOW_ALIGNMENT",
    "CommProperties",
    "Communicator",
    "DeviceComm",
    "DeviceCommConfig",
    "GinConfig",
    "GinConnection",
    "GinType",
    "NcclLibrary",
    "NcclMemory",
    "Team",
    "Window",
    "WindowFlags",
    "load_nccl",
    "shared_communicator",
]
