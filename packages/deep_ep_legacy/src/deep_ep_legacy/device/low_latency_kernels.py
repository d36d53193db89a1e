"""Owns the low-latency kernels as the host sees them: mirrors of their parameters, specs and launch shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deep_ep_core.jit import KernelSpec, LaunchShape, package_include_dir
from deep_ep_core.jit.structs import Bool, ConfigStruct, Int32, ParamsStruct, Pointer, UInt32, UInt64
from deep_ep_core.lsa_team import LsaTeam
from deep_ep_core.wait import WaitParams

__all__ = [
    "NUM_THREADS",
    "CallParams",
    "CombineConfig",
    "CombineParams",
    "DispatchConfig",
    "DispatchParams",
    "all_latency_specs",
    "combine_spec",
    "dispatch_spec",
    "launch_shape",
    "usual_latency_specs",
]

NUM_THREADS = 512
"""Threads of a block, `kNumThreads`."""

_INCLUDE_PACKAGES = ("deep_ep_legacy", "deep_ep_core")
# Whether a kernel sends, and whether it receives.
_PARTS = ((True, True), (True, False), (False, True))


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig(ConfigStruct):
    """What dispatch is specialised by; mirror of the struct in `dispatch_params.cuh`."""

    cuda_name: ClassVar[str] = "deep_ep_legacy::low_latency::DispatchConfig"
    has_send: bool
    has_receive: bool
    is_fp8: bool
    is_idx64: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineConfig(ConfigStruct):
    """What combine is specialised by; mirror of the struct in `combine_params.cuh`."""

    cuda_name: ClassVar[str] = "deep_ep_legacy::low_latency::CombineConfig"
    has_send: bool
    has_receive: bool
    is_logfmt: bool
    is_idx64: bool


class CallParams(ParamsStruct):
    """What the parameters of both kernels share; mirror of the struct in `state.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::low_latency::CallParams"
    _fields_ = (
        ("team", LsaTeam),
        ("wait", WaitParams),
        ("notes", WaitParams),
        ("state", Pointer),
        ("mask", Pointer),
        ("epoch", Pointer),
        ("wait_stats", Pointer),
        ("signals_offset", UInt64),
        ("slab_offset", UInt64),
        ("slab_bytes", UInt64),
        ("digest", UInt32),
        ("num_experts", Int32),
        ("num_max_tokens", Int32),
        ("hidden", Int32),
    )


class DispatchParams(ParamsStruct):
    """What dispatch is passed; mirror of the struct in `dispatch_params.cuh`, which says what each field is."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::low_latency::DispatchParams"
    _fields_ = (
        ("call", CallParams),
        ("x", Pointer),
        ("topk_idx", Pointer),
        ("recv_x", Pointer),
        ("recv_scales", Pointer),
        ("recv_count", Pointer),
        ("src_info", Pointer),
        ("layout_range", Pointer),
        ("recv_stats", Pointer),
        ("num_tokens", Int32),
        ("num_topk", Int32),
        ("is_rounded", Bool),
        ("is_ue8m0", Bool),
    )


class CombineParams(ParamsStruct):
    """What combine is passed; mirror of the struct in `combine_params.cuh`, which says what each field is."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::low_latency::CombineParams"
    _fields_ = (
        ("call", CallParams),
        ("x", Pointer),
        ("src_info", Pointer),
        ("layout_range", Pointer),
        ("topk_idx", Pointer),
        ("topk_weights", Pointer),
        ("out", Pointer),
        ("num_tokens", Int32),
        ("num_topk", Int32),
    )


def dispatch_spec(config: DispatchConfig) -> KernelSpec:
    """The dispatch kernel of a configuration."""
    return _spec("dispatch", DispatchParams, config)


def combine_spec(config: CombineConfig) -> KernelSpec:
    """The combine kernel of a configuration."""
    return _spec("combine", CombineParams, config)


def all_latency_specs() -> list[KernelSpec]:
    """Every variant that is launched."""
    return [
        spec
        for has_send, has_receive in _PARTS
        for is_coded in (True, False)
        for is_idx64 in (True, False)
        for spec in _pair(has_send, has_receive, is_coded, is_idx64)
    ]


def usual_latency_specs() -> tuple[KernelSpec, ...]:
    """Those of calls with int64 indices, FP8 or bfloat16 there and bfloat16 back."""
    return tuple(
        spec
        for has_send, has_receive in _PARTS
        for is_coded in (True, False)
        for spec in _pair(has_send, has_receive, is_coded, True)
        if not (isinstance(spec.config, CombineConfig) and spec.config.is_logfmt)
    )


def launch_shape(*, num_sms: int, num_experts: int) -> LaunchShape:
    """One block an SM, with shared memory for two tables of all experts and a sum.

    Args:
        num_sms: Number of blocks.
        num_experts: Experts of all ranks.
    """
    return LaunchShape(grid=(num_sms, 1, 1), block=(NUM_THREADS, 1, 1), smem_bytes=4 * (2 * num_experts + 1))


def _pair(has_send: bool, has_receive: bool, is_coded: bool, is_idx64: bool) -> tuple[KernelSpec, KernelSpec]:
    return (
        dispatch_spec(DispatchConfig(has_send=has_send, has_receive=has_receive, is_fp8=is_coded, is_idx64=is_idx64)),
        combine_spec(CombineConfig(has_send=has_send, has_receive=has_receive, is_logfmt=is_coded, is_idx64=is_idx64)),
    )


def _spec(name: str, params_type: type[ParamsStruct], config: DispatchConfig | CombineConfig) -> KernelSpec:
    parts = {"send": config.has_send, "receive": config.has_receive}
    return KernelSpec(
        label="_".join(["low_latency", name, *(part for part, is_part in parts.items() if is_part)]),
        header=f"deep_ep_legacy/low_latency/{name}_kernel.cuh",
        function=f"deep_ep_legacy::low_latency::{name}",
        params_type=params_type,
        include_dirs=tuple(package_include_dir(package) for package in _INCLUDE_PACKAGES),
        max_threads_per_block=NUM_THREADS,
        config=config,
    )
