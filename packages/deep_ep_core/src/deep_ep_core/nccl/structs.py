"""Owns the layout of every struct that is passed to NCCL, for each of its versions.

NCCL only ever appends members, and learns from `size` and `version` how much of a struct its caller knows. So each
struct is one list of members here, each with the version that brought it. A test compiles the same lists against NCCL's
headers. What kernels are passed, `ncclDevComm`, is kept as bytes: its members are NCCL's own affair.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

__all__ = [
    "NEWEST_KNOWN_VERSION",
    "STRUCTS",
    "UNDEFINED_INT",
    "TeamStruct",
    "UniqueId",
    "claimed_version",
    "dev_comm_fields",
    "fixed_dev_comm_bytes",
    "new_struct",
    "struct_type",
]

NEWEST_KNOWN_VERSION = 23203
"""The newest version whose headers these layouts were compared with. To a newer NCCL, callers pass as this one."""

UNDEFINED_INT = -(2**31)
"""What NCCL takes as "not set" where zero has a meaning."""

_MAGIC = 0xCAFEBEEF
_V2_30_7, _V2_31, _V2_32 = 23007, 23100, 23200

_Int, _Size, _Bool, _Pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_bool, ctypes.c_void_p
_UInt, _UInt64 = ctypes.c_uint, ctypes.c_uint64
_HEAD: tuple[tuple[str, Any, int], ...] = (("size", _Size, 0), ("magic", _UInt, 0), ("version", _UInt, 0))

STRUCTS: dict[str, tuple[tuple[str, Any, int], ...]] = {
    "ncclConfig_t": (
        *_HEAD,
        ("blocking", _Int, 0),
        ("cgaClusterSize", _Int, 0),
        ("minCTAs", _Int, 0),
        ("maxCTAs", _Int, 0),
        ("netName", _Pointer, 0),
        ("splitShare", _Int, 0),
        ("trafficClass", _Int, 0),
        ("commName", _Pointer, 0),
        ("collnetEnable", _Int, 0),
        ("CTAPolicy", _Int, 0),
        ("shrinkShare", _Int, 0),
        ("nvlsCTAs", _Int, 0),
        ("nChannelsPerNetPeer", _Int, 0),
        ("nvlinkCentricSched", _Int, 0),
        ("graphUsageMode", _Int, 0),
        ("numRmaCtx", _Int, 0),
        ("maxP2pPeers", _Int, 0),
        ("graphStreamOrdering", _Int, _V2_30_7),
        ("launchOrderImplicit", _Int, _V2_31),
        ("numRmaSig", _Int, _V2_31),
        ("rmaEagerInit", _Int, _V2_31),
        ("hostCftMode", _Int, _V2_31),
        ("nvlsHostMode", _Int, _V2_32),
    ),
    "ncclCommProperties": (
        *_HEAD,
        ("rank", _Int, 0),
        ("nRanks", _Int, 0),
        ("cudaDev", _Int, 0),
        ("nvmlDev", _Int, 0),
        ("deviceApiSupport", _Bool, 0),
        ("multimemSupport", _Bool, 0),
        ("ginType", _Int, 0),
        ("nLsaTeams", _Int, 0),
        ("hostRmaSupport", _Bool, 0),
        ("railedGinType", _Int, 0),
        ("commHash", _UInt64, _V2_31),
        ("ginMinStride", _Int, _V2_31),
        ("ginConnectionType", _Int, _V2_31),
        ("ginSupport", _Bool * 64, _V2_31),
        ("devCommRuntimeVersionSize", _Size, _V2_31),
        ("cftSupport", _Bool, _V2_32),
        ("cftMulticastSupport", _Bool, _V2_32),
        ("cftCountedSupport", _Bool, _V2_32),
    ),
    "ncclDevCommRequirements": (
        *_HEAD,
        ("resourceRequirementsList", _Pointer, 0),
        ("teamRequirementsList", _Pointer, 0),
        ("lsaMultimem", _Bool, 0),
        ("barrierCount", _Int, 0),
        ("lsaBarrierCount", _Int, 0),
        ("railGinBarrierCount", _Int, 0),
        ("lsaLLA2ABlockCount", _Int, 0),
        ("lsaLLA2ASlotCount", _Int, 0),
        ("ginForceEnable", _Bool, 0),
        ("ginContextCount", _Int, 0),
        ("ginSignalCount", _Int, 0),
        ("ginCounterCount", _Int, 0),
        ("ginConnectionType", _Int, 0),
        ("ginExclusiveContexts", _Bool, 0),
        ("ginQueueDepth", _Int, 0),
        ("ginTrafficClass", _Int, 0),
        ("worldGinBarrierCount", _Int, 0),
        ("ginStrongSignalsRequired", _Bool, _V2_30_7),
        ("ginVaSignalsRequired", _Bool, _V2_30_7),
        ("ginCustomStride", _Int, _V2_31),
        ("ginType", _Int, _V2_31),
        ("useRuntimeVersion", _Bool, _V2_31),
        ("cftCaps", _Int, _V2_31),
        ("cftBarrierCount", _Int, _V2_31),
    ),
}
"""(name, type, version that brought it) of every member, by the struct's name in C. 0: as old as what is supported."""

# The members that NCCL's own initialisers set to something else than zero.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ncclConfig_t": {
        name: UNDEFINED_INT for name, kind, _ in STRUCTS["ncclConfig_t"][len(_HEAD) :] if kind is not _Pointer
    },
    "ncclCommProperties": {},
    "ncclDevCommRequirements": {
        "ginContextCount": 4,
        "ginTrafficClass": UNDEFINED_INT,
        "ginStrongSignalsRequired": True,
        "ginVaSignalsRequired": True,
        "ginCustomStride": 1,
    },
}


class UniqueId(ctypes.Structure):
    """`ncclUniqueId`: what ranks must share to found a communicator."""

    _fields_ = (("internal", ctypes.c_ubyte * 128),)


class TeamStruct(ctypes.Structure):
    """`ncclTeam`: every `stride`-th rank of the communicator, `nRanks` of them, this one at place `rank`."""

    _fields_ = (("nRanks", _Int), ("rank", _Int), ("stride", _Int))


def claimed_version(library_version: int) -> int:
    """The version that calls are made in the name of: the library's own, or the newest one that is known here."""
    return min(library_version, NEWEST_KNOWN_VERSION)


@functools.cache
def struct_type(name: str, version: int) -> type[ctypes.Structure]:
    """The struct as the headers of a version define it.

    Args:
        name: Its name in C, a key of `STRUCTS`.
        version: Version code of the headers.
    """
    fields = [(field, kind) for field, kind, since in STRUCTS[name] if since <= version]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def new_struct(name: str, library_version: int, **values: Any) -> Any:
    """A struct as NCCL's initialiser makes it, for a library of that version.

    Args:
        name: Its name in C, a key of `STRUCTS`.
        library_version: Version code of the library.
        values: Members to set. One that the library does not know yet is left out.
    """
    version = claimed_version(library_version)
    kind = struct_type(name, version)
    known = {field[0] for field in kind._fields_}
    members = {"size": ctypes.sizeof(kind), "magic": _MAGIC, "version": version, **_DEFAULTS[name], **values}
    return kind(**{member: value for member, value in members.items() if member in known})


def fixed_dev_comm_bytes(library_version: int) -> int | None:
    """`sizeof(ncclDevComm)` where it is known beforehand; None since 2.31, where the library itself tells.

    Before 2.31 kernels must be compiled with headers of the library's version. Since then the library can be asked for
    the struct of its own version, whichever version its caller knows.
    """
    return 240 if library_version < _V2_31 else None


def dev_comm_fields(library_version: int) -> dict[str, int]:
    """Byte offsets of the `uint32_t` members of `ncclDevComm` that the host reads.

    Empty for a version that is not known here: kernels read these members through NCCL's headers in any case.
    """
    if library_version > NEWEST_KNOWN_VERSION:
        return {}
    is_old = library_version < _V2_31
    return {"ginSignalCount": 184 if is_old else 136, "ginContextCount": 200 if is_old else 152}
