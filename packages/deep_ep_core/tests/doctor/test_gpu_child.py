"""What the child asks, with make-believe drivers; on a machine without GPUs its real run ends at the driver."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from nccl_fake import FakeNccl

import deep_ep_core.links
from deep_ep_core.doctor import gpu_child
from deep_ep_core.doctor.gpu_answer import ask_gpus
from deep_ep_core.nccl import communicator


class NvmlError(Exception):
    def __init__(self, value):
        super().__init__(f"code {value}")
        self.value = value


def make_nvml(error=None):
    def init():
        if error is not None:
            raise NvmlError(error)

    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_ERROR_LIBRARY_NOT_FOUND=12,
        NVML_ERROR_DRIVER_NOT_LOADED=9,
        nvmlInit=init,
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13020,
        nvmlSystemGetDriverVersion=lambda: "580.82.07",
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda idx: idx,
        nvmlDeviceGetName=lambda handle: f"GPU {handle}",
    )


def test_the_driver_tells_its_version_and_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml())
    answer = gpu_child._ask_driver()
    assert answer["version"] == "580.82.07"
    assert answer["cuda_version"] == [13, 2]
    assert answer["gpu_names"] == ["GPU 0", "GPU 1"]


@pytest.mark.parametrize("error", [9, 12])
@pytest.mark.parametrize("has_library", [False, True])
def test_without_nvml_the_driver_library_decides(monkeypatch, error, has_library):
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml(error))
    monkeypatch.setattr(gpu_child, "_DRIVER_LIBRARY", "libc.so.6" if has_library else "libno_such_driver.so.1")
    answer = gpu_child._ask_driver()
    assert answer["is_present"] is has_library
    assert f"code {error}" in answer["reason"]


def test_a_driver_that_answers_with_an_error_is_not_taken_for_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml(18))
    with pytest.raises(NvmlError, match="code 18"):
        gpu_child._ask_driver()


def test_torch_tells_gpus_rates_and_peers(monkeypatch):
    found = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda idx: found)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) == (0, 1))

    def nvlink_gbs(idx):
        if idx == 1:
            deep_ep_core.links._logger.warning("the rate of GPU %d is unknown: it sleeps", idx)
        return 405.0 if idx == 0 else None

    monkeypatch.setattr(deep_ep_core.links, "nvlink_gbs", nvlink_gbs)
    answer = gpu_child._ask_torch()
    assert [gpu["capability"] for gpu in answer["gpus"]] == [[9, 0], [9, 0]]
    assert [gpu["nvlink_gbs"] for gpu in answer["gpus"]] == [405.0, None]
    assert answer["gpus"][1]["nvlink_reason"] == "the rate of GPU 1 is unknown: it sleeps"
    assert answer["peers"] == [[True, True], [False, True]]


def test_a_torch_that_cannot_start_cuda_tells_why(monkeypatch):
    def fail():
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "init", fail)
    assert gpu_child._ask_torch() == {"gpus": [], "peers": [], "reason": "the driver is too old"}


def test_a_communicator_of_one_rank_is_asked_and_closed(monkeypatch):
    fake = FakeNccl()
    fake.gin_type, fake.railed_gin_type = 2, 3
    # Set already, so that they are not set for the tests that follow.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    open_real = communicator.Communicator.open

    def open_on_cpu(group, device, **kwargs):
        assert device == torch.device("cuda", 0)
        return open_real(group, torch.device("cpu"), load_library=fake.library, **kwargs)

    monkeypatch.setattr(communicator.Communicator, "open", open_on_cpu)
    try:
        answer = gpu_child._ask_nccl(30.0)
    finally:
        torch.distributed.destroy_process_group()
    assert answer["has_device_api"] is True
    assert (answer["gin_type"], answer["railed_gin_type"]) == ("PROXY", "GDAKI")
    assert fake.count("ncclCommAbort") == 1


def test_the_real_child_tells_about_this_machine():
    answer = ask_gpus(60.0, driver_only=True)
    assert answer.errors == {}
    assert answer.driver is not None
    assert answer.has_gpu is bool(answer.driver["gpu_names"])
    assert answer.gpus is None
