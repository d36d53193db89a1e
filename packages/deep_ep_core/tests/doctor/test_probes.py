from __future__ import annotations

import builtins
import dataclasses
import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest
import torch
from nccl_fake import FakeNccl

from deep_ep_core.doctor.findings import Status
from deep_ep_core.doctor.gpu_answer import GpuAnswer
from deep_ep_core.doctor.probes import compilers, torch_build
from deep_ep_core.doctor.probes.cache import look_at_cache
from deep_ep_core.doctor.probes.compilers import look_at_compilers
from deep_ep_core.doctor.probes.gpus import look_at_gpus
from deep_ep_core.doctor.probes.nccl import look_at_nccl
from deep_ep_core.doctor.probes.network import look_at_network
from deep_ep_core.doctor.probes.packages import look_at_packages
from deep_ep_core.doctor.probes.settings import look_at_settings
from deep_ep_core.doctor.probes.torch_build import look_at_torch, torch_cuda_version
from deep_ep_core.errors import ConfigError
from deep_ep_core.jit import toolchain
from deep_ep_core.jit.toolchain import Nvcc, Nvrtc, ToolkitHeaders
from deep_ep_core.nccl import library as nccl_library
from deep_ep_core.nccl.library import NcclLibrary


def with_gpus(bench, *gpus, peers=None):
    peers = peers or [[True] * len(gpus)] * len(gpus)
    answer = {"gpus": list(gpus), "peers": peers, "reason": "" if gpus else "torch sees none"}
    return GpuAnswer(answers={"driver": bench.driver, "gpus": answer, "nccl": bench.nccl})


# Python and torch


def test_this_torch_is_described(bench):
    found = bench.found(look_at_torch, bench.machine())
    assert found["torch"].facts["version"] == torch.__version__
    assert found["torch's CUDA"].facts["cuda"] == torch_cuda_version()
    assert found["gloo"].status is Status.OK


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.9.1+cu130", Status.MISSING), ("2.10.0", Status.OK), ("2.13.0+cpu", Status.OK), ("3.0.0a1", Status.OK)],
)
def test_torch_must_be_new_enough(bench, monkeypatch, version, status):
    monkeypatch.setattr(torch, "__version__", version)
    finding = bench.found(look_at_torch, bench.machine())["torch"]
    assert finding.status is status
    assert finding.is_needed
    assert ("pip install" in finding.sentence) is (status is Status.MISSING)


def test_a_torch_that_does_not_import_is_missing_and_the_rest_goes_on(bench, monkeypatch):
    import_really = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return import_really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    finding = bench.found(look_at_torch, bench.machine())["torch"]
    assert finding.status is Status.MISSING
    assert "libcudart.so.13" in finding.text
    assert torch_cuda_version() is None


# GPUs


def test_good_gpus_are_described(bench):
    found = bench.found(look_at_gpus, bench.machine(bench.two_h100))
    assert found["driver"].facts == {"version": "580.82.07", "cuda": "13.0"}
    assert found["GPU 1"].text == "NVIDIA H100 80GB HBM3, compute capability 9.0, 80.0 GiB, 132 SMs"
    assert found["GPUs"].facts == {"num_gpus": 2, "num_visible_gpus": 2}
    assert found["peer access"].text == "all 2 GPUs reach each other"
    assert found["NVLink"].text == "405 GB/s a GPU each way"


def test_unknown_nvlink_rates_are_unknown_with_the_reason(bench):
    unknown = {**bench.h100, "nvlink_gbs": None, "nvlink_reason": "no NVLink of it is active"}
    found = bench.found(look_at_gpus, bench.machine(with_gpus(bench, unknown, unknown)))
    assert (found["NVLink"].status, found["NVLink"].text) == (Status.UNKNOWN, "no NVLink of it is active")
    found = bench.found(look_at_gpus, bench.machine(with_gpus(bench, bench.h100, unknown)))
    assert found["NVLink"].text == "GB/s each way: GPU 0 405, GPU 1 unknown"


def test_gpus_apart_are_named(bench):
    peers = [[True, True, False], [True, True, True], [True, True, True]]
    answer = with_gpus(bench, bench.h100, bench.h100, bench.h100, peers=peers)
    finding = bench.found(look_at_gpus, bench.machine(answer))["peer access"]
    assert finding.status is Status.WARNING
    assert "GPUs 0-2 do not reach" in finding.text
    assert not finding.blocks_device


def test_an_old_gpu_blocks_only_where_there_is_no_other(bench):
    old = {**bench.h100, "name": "NVIDIA A100", "capability": [8, 0]}
    alone = bench.found(look_at_gpus, bench.machine(with_gpus(bench, old)))["GPU 0"]
    beside = bench.found(look_at_gpus, bench.machine(with_gpus(bench, old, bench.h100)))["GPU 0"]
    assert (alone.status, beside.status) == (Status.MISSING, Status.MISSING)
    assert (alone.blocks_device, beside.blocks_device) == (True, False)


def test_hidden_gpus_are_counted(bench):
    machine = bench.machine(with_gpus(bench), environ={"CUDA_VISIBLE_DEVICES": ""})
    finding = bench.found(look_at_gpus, machine)["GPUs"]
    assert finding.blocks_device
    assert "none of 2 (CUDA_VISIBLE_DEVICES=)" in finding.text
    machine = bench.machine(with_gpus(bench, bench.h100), environ={"CUDA_VISIBLE_DEVICES": "1"})
    finding = bench.found(look_at_gpus, machine)["GPUs"]
    assert (finding.status, finding.text) == (Status.NOTE, "torch sees 1 of 2 (CUDA_VISIBLE_DEVICES=1)")


def test_gpus_that_torch_was_not_asked_about_are_named_by_the_driver(bench):
    answer = GpuAnswer(answers={"driver": bench.driver})
    finding = bench.found(look_at_gpus, bench.machine(answer))["GPUs"]
    assert finding.status is Status.UNKNOWN
    assert "NVIDIA H100" in finding.text


def test_mps_is_found_on_path(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.found(look_at_gpus, bench.machine())["MPS"].status is Status.NOTE
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert bench.found(look_at_gpus, bench.machine())["MPS"].facts == {"path": str(program)}


# Network


def add_card(root: Path, name: str, rate: str, state: str) -> None:
    port = root / name / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text(f"{rate} Gb/sec (4X NDR)\n")
    (port / "state").write_text(f"{state}\n")


def test_each_card_has_its_own_rate(bench, tmp_path):
    add_card(tmp_path, "mlx5_0", "400", "1: DOWN")
    add_card(tmp_path, "mlx5_1", "400", "4: ACTIVE")
    add_card(tmp_path, "mlx5_2", "200", "4: ACTIVE")
    for _ in range(2):  # asked again, it must not take one card's rate for another's
        found = bench.found(look_at_network, bench.machine(), tmp_path)
        assert [found[f"mlx5_{idx}"].facts["gbs"] for idx in range(3)] == [None, 50.0, 25.0]
        assert found["RDMA"].facts["card"] == "mlx5_1"
        assert "mlx5_0 has no active port" in found["RDMA"].text
    wanted = bench.machine(environ={"EP_NIC_NAME": "mlx5_2"})
    assert bench.found(look_at_network, wanted, tmp_path)["RDMA"].facts["gbs"] == 25.0


def test_cards_that_are_down_have_an_unknown_rate(bench, tmp_path):
    add_card(tmp_path, "mlx5_0", "400", "1: DOWN")
    assert bench.found(look_at_network, bench.machine(), tmp_path)["RDMA"].status is Status.UNKNOWN


def test_no_card_is_only_a_note(bench, tmp_path):
    finding = bench.found(look_at_network, bench.machine(), tmp_path / "none")["RDMA"]
    assert (finding.status, finding.facts["gbs"]) == (Status.NOTE, None)


# NCCL


@pytest.fixture
def make_nccl(monkeypatch, tmp_path):
    """An NCCL installation of versions of its library and its headers, in EP_NCCL_ROOT_DIR."""

    def make(version: int, headers: tuple[int, int, int] | None = None) -> dict[str, str]:
        monkeypatch.setattr(nccl_library, "mapped_libraries", lambda maps_text: ())
        library = NcclLibrary(FakeNccl(version), path="/lib/libnccl.so.2", found_via="EP_NCCL_ROOT_DIR")
        monkeypatch.setattr(nccl_library, "_open_first", lambda root_dir, open_library: library)
        include_dir = tmp_path / "nccl" / "include"
        include_dir.mkdir(parents=True, exist_ok=True)
        if headers is not None:
            names = ("NCCL_MAJOR", "NCCL_MINOR", "NCCL_PATCH")
            macros = "".join(f"#define {name} {value}\n" for name, value in zip(names, headers, strict=True))
            (include_dir / "nccl.h").write_text(macros)
            (include_dir / "nccl_device.h").write_text("")
        return {"EP_NCCL_ROOT_DIR": str(include_dir.parent)}

    return make


def test_a_complete_nccl_is_described(bench, make_nccl):
    found = bench.found(look_at_nccl, bench.machine(bench.two_h100, environ=make_nccl(23007, (2, 30, 7))))
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(
        ("NCCL", "NCCL headers", "windows", "GIN"), Status.OK
    )
    assert found["NCCL"].facts["version"] == found["NCCL headers"].facts["version"] == "2.30.7"
    assert found["GIN"].text == "GDAKI to any rank, GDAKI along rails"


@pytest.mark.parametrize(
    ("cuda", "package"), [("13.0", "nvidia-nccl-cu13>=2.30.4"), ("12.8", "nvidia-nccl-cu12>=2.30.4")]
)
def test_an_old_nccl_is_described_and_blocks(bench, make_nccl, monkeypatch, cuda, package):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    environ = make_nccl(22809)
    found = bench.found(look_at_nccl, bench.machine(bench.two_h100, environ=environ))
    finding = found["NCCL"]
    assert found["windows"].text == "see NCCL"
    assert (finding.status, finding.blocks_device) == (Status.MISSING, True)
    assert finding.facts["version"] == "2.28.9"
    assert finding.facts["is_new_enough"] is False
    assert f'pip install "{package}"' in finding.sentence
    allowed = bench.machine(environ={**environ, "EP_SUPPRESS_NCCL_CHECK": "1"})
    assert not bench.found(look_at_nccl, allowed)["NCCL"].blocks_device


def test_two_libraries_in_one_process_block(bench, monkeypatch):
    paths = ("/opt/torch/libnccl.so.2", "/usr/lib/libnccl.so.2")
    monkeypatch.setattr(nccl_library, "mapped_libraries", lambda maps_text: paths)
    monkeypatch.setattr(
        nccl_library,
        "_open_mapped",
        lambda path, open_library: NcclLibrary(FakeNccl(23007), path=path, found_via="the libraries of this process"),
    )
    finding = bench.found(look_at_nccl, bench.machine(bench.two_h100))["NCCL"]
    assert (finding.status, finding.blocks_device) == (Status.WARNING, True)
    assert all(path in finding.text for path in paths)


def test_a_setting_without_effect_is_a_note(bench):
    finding = bench.found(look_at_settings, bench.machine(environ={"TORCH_CUDA_ARCH_LIST": "9.0a"}))
    assert finding["TORCH_CUDA_ARCH_LIST"].status is Status.NOTE
    assert "without effect" in finding["TORCH_CUDA_ARCH_LIST"].text


def test_no_nccl_blocks_and_names_what_to_install(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(nccl_library, "mapped_libraries", lambda maps_text: ())
    found = bench.found(look_at_nccl, bench.machine(environ={"EP_NCCL_ROOT_DIR": str(tmp_path)}))
    assert found["NCCL"].blocks_device
    assert "pip install" in found["NCCL"].fix
    assert found["NCCL headers"].status is Status.MISSING
    assert str(tmp_path) in found["NCCL headers"].text


def test_headers_of_another_version_are_warned_of(bench, make_nccl):
    finding = bench.found(look_at_nccl, bench.machine(environ=make_nccl(23203, (2, 30, 7))))["NCCL headers"]
    assert finding.status is Status.WARNING
    assert "2.32.3" in finding.text


def test_a_refusal_of_nccl_blocks_and_a_crash_leaves_it_open(bench, make_nccl):
    answers, errors = {"driver": bench.driver, "gpus": bench.gpus}, {"nccl": "TransportError: cannot register windows"}
    machine = bench.machine(GpuAnswer(answers=answers, errors=errors), environ=make_nccl(23007))
    refused = bench.found(look_at_nccl, machine)
    assert refused["windows"].blocks_device
    assert "cannot register windows" in refused["windows"].text
    crashed = dataclasses.replace(machine.gpus, crashed_step="nccl")
    found = bench.found(look_at_nccl, dataclasses.replace(machine, gpus=crashed))
    assert found["windows"].leaves_device_open
    assert found["GIN"].status is Status.UNKNOWN


def test_gin_that_is_not_there_is_a_note(bench, make_nccl):
    nccl = {**bench.nccl, "gin_type": "NONE", "railed_gin_type": "NONE"}
    answer = GpuAnswer(answers={**bench.two_h100.answers, "nccl": nccl})
    finding = bench.found(look_at_nccl, bench.machine(answer, environ=make_nccl(23007)))["GIN"]
    assert (finding.status, finding.facts["gin_type"]) == (Status.NOTE, "NONE")


# Compilers


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """All compilers, NVRTC of CUDA 13; parts can be taken away."""
    parts = {
        "find_nvrtc": Nvrtc(api=None, version="13.0.88"),
        "find_toolkit_headers": ToolkitHeaders(include_dirs=(tmp_path,), version="13000", found_via="a test"),
        "find_nvcc": Nvcc(path=tmp_path / "nvcc", version="12.8.93", found_via="a test"),
    }
    for name in parts:
        monkeypatch.setattr(toolchain, name, lambda *options, name=name: parts[name])
    for name in ("g++", "ninja"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{name} 12.2.0'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compilers.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(compilers.importlib.metadata, "version", lambda name: "13.0.3")
    return parts


def test_all_compilers_are_described(bench, tools):
    found = bench.found(look_at_compilers, bench.machine(bench.two_h100))
    assert {finding.status for finding in found.values()} == {Status.OK}
    assert found["host compiler"].facts["version"] == "g++ 12.2.0"
    assert found["compiling"].text == "NVRTC compiles kernels; for those that reach other machines, nvcc is there"


def test_nvcc_alone_compiles_too(bench, tools):
    tools["find_nvrtc"] = "cuda-bindings finds no NVRTC library"
    found = bench.found(look_at_compilers, bench.machine(bench.two_h100))
    assert found["NVRTC"].status is Status.MISSING
    assert not found["NVRTC"].blocks_device
    assert (found["compiling"].status, found["compiling"].text) == (Status.OK, "nvcc compiles kernels")


@pytest.mark.parametrize("lost", ["nvcc", "g++"])
def test_without_a_whole_compiler_nothing_runs(bench, tools, tmp_path, lost):
    tools["find_nvrtc"] = "cuda-bindings finds no NVRTC library"
    if lost == "nvcc":
        tools["find_nvcc"] = None
    else:
        (tmp_path / "g++").unlink()
    finding = bench.found(look_at_compilers, bench.machine(bench.two_h100))["compiling"]
    assert finding.blocks_device
    assert 'pip install "deep-ep-core[cu13]"' in finding.fix


def test_a_compiler_newer_than_the_driver_blocks(bench, tools):
    answer = GpuAnswer(answers={**bench.two_h100.answers, "driver": {**bench.driver, "cuda_version": [12, 8]}})
    assert bench.found(look_at_compilers, bench.machine(answer))["driver for it"].blocks_device
    # nvcc of CUDA 12 does the work where it is asked to.
    wanted = bench.machine(answer, environ={"EP_JIT_NVCC_COMPILER": "/opt/nvcc"})
    assert "driver for it" not in bench.found(look_at_compilers, wanted)


def test_an_nvcc_that_is_refused_is_missing_with_the_reason(bench, monkeypatch):
    def refuse(options):
        raise ConfigError("nvcc must be 12.3 or newer")

    monkeypatch.setattr(toolchain, "find_nvcc", refuse)
    finding = bench.found(look_at_compilers, bench.machine())["nvcc"]
    assert (finding.status, finding.text) == (Status.MISSING, "nvcc must be 12.3 or newer")


def test_cuda_bindings_are_needed(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert bench.found(look_at_compilers, bench.machine())["cuda-bindings"].blocks_device


def test_a_program_that_fails_is_unknown(bench, tools, tmp_path):
    (tmp_path / "ninja").write_text("#!/bin/sh\nexit 3\n")
    assert bench.found(look_at_compilers, bench.machine())["ninja"].status is Status.UNKNOWN


def test_nvcc_ccbin_names_the_host_compiler(bench, tools, tmp_path):
    shutil.copy(tmp_path / "g++", tmp_path / "my-g++")
    for wanted, name in ((tmp_path / "my-g++", "my-g++"), (tmp_path, "g++")):
        found = bench.found(look_at_compilers, bench.machine(environ={"NVCC_CCBIN": str(wanted)}))
        assert found["host compiler"].facts["path"] == str(tmp_path / name)


# The cache


def test_a_cache_is_counted_and_not_made(bench, tmp_path):
    root = tmp_path / "new" / "cache"
    finding = bench.found(look_at_cache, bench.machine(environ={"EP_JIT_CACHE_DIR": str(root)}))["cache folder"]
    assert (finding.status, finding.facts["num_entries"]) == (Status.OK, 0)
    assert list(tmp_path.iterdir()) == []
    entry = root / "cache" / f"copy.{'0' * 32}"
    entry.mkdir(parents=True)
    (entry / "kernel.cubin").write_bytes(bytes(3000))
    finding = bench.found(look_at_cache, bench.machine(environ={"EP_JIT_CACHE_DIR": str(root)}))["cache folder"]
    assert (finding.facts["num_entries"], finding.facts["num_bytes"]) == (1, 3000)


def test_a_cache_that_cannot_be_written_is_warned_of(bench, tmp_path):
    (tmp_path / "file").write_text("")
    environ = {"EP_JIT_CACHE_DIR": str(tmp_path / "file" / "cache")}
    finding = bench.found(look_at_cache, bench.machine(environ=environ))["cache folder"]
    assert finding.status is Status.WARNING
    assert finding.facts["is_writable"] is False
    assert "EP_JIT_CACHE_DIR" in finding.fix


# Settings and packages


def test_a_misspelt_setting_is_warned_of_with_the_right_name(bench):
    findings = look_at_settings(bench.machine(environ={"EP_JIT_CACHEDIR": "/x"}))
    assert [finding.status for finding in findings] == [Status.WARNING]
    assert "did you mean EP_JIT_CACHE_DIR?" in findings[0].text


def test_what_is_set_is_listed_with_its_place(bench, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"EP_NIC_NAME": "mlx5_3", "EP_JIT_DEBUG": "1"}')
    machine = bench.machine(environ={"EP_NIC_NAME": "mlx5_1", "CUDA_HOME": ""}, settings_paths=[path])
    listed = [(finding.name, finding.facts["value"], finding.facts["source"]) for finding in look_at_settings(machine)]
    assert listed == [
        ("EP_NIC_NAME", "mlx5_1", "the environment"),
        ("EP_NIC_NAME", "mlx5_3", f"{path} (hidden)"),
        ("EP_JIT_DEBUG", "1", str(path)),
    ]


def test_a_value_that_is_not_allowed_blocks_and_costs_no_other_setting(bench):
    machine = bench.machine(environ={"EP_JIT_DEBUG": "perhaps", "EP_NIC_NAME": "mlx5_1"})
    findings = look_at_settings(machine)
    assert findings[0].blocks_device
    assert "EP_JIT_DEBUG must be" in findings[0].text
    assert machine.settings.env.nic_name == "mlx5_1"
    assert [(finding.name, finding.status) for finding in findings[1:]] == [
        ("EP_NIC_NAME", Status.OK),
        ("EP_JIT_DEBUG", Status.WARNING),
    ]


def test_a_corrupt_settings_file_blocks(bench, tmp_path):
    (tmp_path / "config.json").write_text("[")
    findings = look_at_settings(bench.machine(settings_paths=[tmp_path / "config.json"]))
    assert [finding.blocks_device for finding in findings] == [True]


def test_packages_are_listed_without_importing_them(bench):
    before = set(sys.modules)
    found = bench.found(look_at_packages, bench.machine())
    assert found["deep-ep-core"].facts["version"] == importlib.metadata.version("deep-ep-core")
    assert len(found) == 6
    assert not {name for name in set(sys.modules) - before if name.startswith("deep_ep_") and "core" not in name}


def test_gloo_that_is_missing_is_told(bench, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    assert bench.found(look_at_torch, bench.machine())[torch_build.GLOO].status is Status.MISSING
