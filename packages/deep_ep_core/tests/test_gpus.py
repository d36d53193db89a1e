from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from deep_ep_core.errors import ConfigError
from deep_ep_core.local.gpus import find_gpus, parse_visible_devices, visible_devices

GPUS = ("GPU-aa01", "GPU-ab02", "GPU-cc03", "GPU-dd04")


class FakeNvmlError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A management library that knows four GPUs."""

    def init() -> None:
        library.num_open += 1

    def shutdown() -> None:
        library.num_open -= 1

    library = SimpleNamespace(
        NVMLError=FakeNvmlError,
        num_open=0,
        uuids=list(GPUS),
        nvmlInit=init,
        nvmlShutdown=shutdown,
        nvmlDeviceGetCount=lambda: len(library.uuids),
        nvmlDeviceGetHandleByIndex=lambda idx: idx,
        nvmlDeviceGetUUID=lambda idx: library.uuids[idx],
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Makes NVML's Python package absent; writes the script that `nvidia-smi` is, and returns the PATH to it."""
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def write(script: str) -> str:
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 9\n{script}\n')
        program.chmod(0o755)
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("setting", "indices"),
    [
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 3 ", [1, 3]),
        ("GPU-cc03", [2]),
        ("GPU-c,GPU-aa", [2, 0]),
        ("GPU-dd04,0", [3, 0]),
        # CUDA reads up to the first entry that it does not know.
        ("1,-1,2", [1]),
        ("1,7,2", [1]),
        ("1,,2", [1]),
        ("1,MIG-cc03", [1]),
        ("GPU-a", []),
        ("GPU-zz,1", []),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        # And rejects a list that names a GPU twice.
        ("0,0", []),
        ("1,0,GPU-ab", []),
    ],
)
def test_visible_devices_are_read_by_the_rules_of_cuda(setting, indices):
    assert parse_visible_devices(setting, GPUS) == tuple(GPUS[idx] for idx in indices)


def test_all_gpus_are_found_and_the_driver_is_let_go(nvml):
    assert find_gpus({}) == GPUS
    assert nvml.num_open == 0


def test_gpus_that_the_user_hides_are_not_found(nvml):
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "3,GPU-ab02"}) == ("GPU-dd04", "GPU-ab02")


def test_setting_that_names_no_gpu_is_quoted(nvml):
    with pytest.raises(ConfigError, match=r"needs an NVIDIA GPU .*CUDA_VISIBLE_DEVICES='5' names none of the 4 GPUs"):
        find_gpus({"CUDA_VISIBLE_DEVICES": "5"})


def test_driver_that_is_not_there_is_told_in_its_words(nvml):
    def fail() -> None:
        raise FakeNvmlError("Driver Not Loaded")

    nvml.nvmlInit = fail
    with pytest.raises(ConfigError, match="NVML says: Driver Not Loaded"):
        find_gpus({})


def test_machine_without_gpus_is_no_place_for_cuda(nvml):
    nvml.uuids = []
    with pytest.raises(ConfigError, match=r'NVML finds no GPU\); .* or use device="cpu"'):
        find_gpus({"CUDA_VISIBLE_DEVICES": "0"})


def test_nvidia_smi_stands_in_for_the_python_package(smi):
    path = smi(
        'echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa01)"\n'
        'echo "  MIG 1g.10gb     Device  0: (UUID: MIG-77)"\n'
        'echo "GPU 1: Some (odd) name (UUID: GPU-ab02)"'
    )
    assert find_gpus({"PATH": path}) == ("GPU-aa01", "GPU-ab02")
    assert find_gpus({"PATH": path, "CUDA_VISIBLE_DEVICES": "1"}) == ("GPU-ab02",)


def test_nvidia_smi_that_fails_is_quoted(smi):
    with pytest.raises(ConfigError, match="nvidia-smi -L says: no driver here"):
        find_gpus({"PATH": smi("echo no driver here >&2; exit 9")})


def test_neither_package_nor_program_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match="nvidia-smi is not on PATH, and the package nvidia-ml-py is not installed"):
        find_gpus({"PATH": str(tmp_path)})


@pytest.mark.parametrize(
    ("num_gpus", "num_ranks", "num_nodes"),
    [(4, 4, 1), (4, 4, 2), (4, 2, 2), (4, 3, 3), (1, 8, 2), (2, 8, 4), (2, 6, 2), (3, 8, 2), (4, 8, 2)],
)
def test_local_rank_finds_the_gpu_of_the_rank(num_gpus, num_ranks, num_nodes):
    gpus = GPUS[:num_gpus]
    per_node = num_ranks // num_nodes
    for rank in range(num_ranks):
        node, local_rank = divmod(rank, per_node)
        seen = visible_devices(gpus, node * per_node).split(",")
        assert sorted(seen) == sorted(gpus), "every rank sees every GPU"
        assert seen[local_rank % len(seen)] == gpus[rank % num_gpus]


def test_looking_for_gpus_imports_neither_torch_nor_nvml_early():
    program = "import sys, deep_ep_core.launch; print(sorted({'torch', 'pynvml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
