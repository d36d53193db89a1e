"""Compiles kernels at run time, keeps them, and launches them: `KernelSpec` -> source -> compiler -> cache -> launch.

What a kernel computes is not known here. Nothing is looked for, compiled or loaded at import.
"""

from __future__ import annotations

from deep_ep_core.jit.builder import Builder, CompiledKernel, default_builder
from deep_ep_core.jit.compiler import CompileJob, CompileOutput, Compiler, arch_name, parse_arch
from deep_ep_core.jit.driver import device_arch
from deep_ep_core.jit.launch import LaunchShape, PreparedLaunch, launch_once
from deep_ep_core.jit.mirror import mirror_source
from deep_ep_core.jit.module import Kernel, get_kernel, get_kernels
from deep_ep_core.jit.options import JitOptions
from deep_ep_core.jit.precompile import PrecompileReport, find_ninja, precompile_specs
from deep_ep_core.jit.resources import ResourceUsage
from deep_ep_core.jit.spec import KernelSpec, package_include_dir
from deep_ep_core.jit.structs import (
    Bool,
    ConfigStruct,
    Float32,
    Int32,
    Int64,
    ParamsStruct,
    Pointer,
    UInt32,
    UInt64,
    opaque,
)

__all__ = [
    "Bool",
    "Builder",
    "CompileJob",
    "CompileOutput",
    "CompiledKernel",
    "Compiler",
    "ConfigStruct",
    "Float32",
    "Int32",
    "Int64",
    "JitOptions",
    "Kernel",
    "KernelSpec",
    "LaunchShape",
    "ParamsStruct",
    "Pointer",
    "PrecompileReport",
    "PreparedLaunch",
    "ResourceUsage",
    "UInt32",
    "UInt64",
    "arch_name",
    "default_builder",
    "device_arch",
    "find_ninja",
    "get_kernel",
    "get_kernels",
    "launch_once",
    "mirror_source",
    "opaque",
    "package_include_dir",
    "parse_arch",
    "precompile_specs",
]
