from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from deep_ep_core.env import reset_env
from deep_ep_core.links import UnknownRateError, nvlink_gbs, rdma_gbs


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    for cache in (nvlink_gbs, rdma_gbs):
        cache.cache_clear()
    reset_env()
    yield
    for cache in (nvlink_gbs, rdma_gbs):
        cache.cache_clear()
    reset_env()


def _field(value: int, status: int = pynvml.NVML_SUCCESS) -> SimpleNamespace:
    return SimpleNamespace(nvmlReturn=status, value=SimpleNamespace(uiVal=value))


class FakeNvml:
    """Answers for a machine with one GPU that torch numbers 2 and NVML knows by its UUID."""

    def __init__(self, links: list[tuple[SimpleNamespace, SimpleNamespace]]) -> None:
        self.links = links
        self.num_inits = 0
        self.num_shutdowns = 0
        self.init_error: int | None = None
        self.num_links = _field(len(links))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda idx: SimpleNamespace(uuid=f"uuid-of-{idx}"))
        for name in ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetFieldValues"):
            monkeypatch.setattr(pynvml, name, getattr(self, name))

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.num_inits += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_shutdowns += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-uuid-of-2":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "handle"

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[Any]) -> list[SimpleNamespace]:  # noqa: N802
        assert handle == "handle"
        answers = []
        for field in fields:
            if field == pynvml.NVML_FI_DEV_NVLINK_LINK_COUNT:
                answers.append(self.num_links)
            else:
                kind, link_idx = field
                column = [pynvml.NVML_FI_DEV_NVLINK_GET_STATE, pynvml.NVML_FI_DEV_NVLINK_GET_SPEED].index(kind)
                answers.append(self.links[link_idx][column])
        return answers


_UP = _field(pynvml.NVML_NVLINK_STATE_ACTIVE)
_ASLEEP = _field(pynvml.NVML_NVLINK_STATE_SLEEP)
_DOWN = _field(pynvml.NVML_NVLINK_STATE_INACTIVE)
_REFUSED = _field(0, pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_nvlink_rate_is_nine_tenths_of_all_links() -> None:
    """18 links of 26562 MB/s: an H100 or H200."""
    assert nvlink_gbs(0, reader=lambda device_idx: [26562] * 18) == pytest.approx(0.9 * 18 * 26.562)


def test_reader_is_asked_for_the_device_and_once_for_each() -> None:
    asked = []

    def reader(device_idx: int) -> list[int]:
        asked.append(device_idx)
        return [1000 * (device_idx + 1)]

    assert [nvlink_gbs(idx, reader=reader) for idx in (0, 1, 0, 1)] == pytest.approx([0.9, 1.8, 0.9, 1.8])
    assert asked == [0, 1]


def test_unknown_nvlink_rate_is_none_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def reader(device_idx: int) -> list[int]:
        raise UnknownRateError("the driver is on holiday")

    assert nvlink_gbs(3, reader=reader) is None
    assert nvlink_gbs(3, reader=reader) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "GPU 3 is unknown: the driver is on holiday" in caplog.text


def test_gpu_without_active_link_has_no_rate(caplog: pytest.LogCaptureFixture) -> None:
    assert nvlink_gbs(0, reader=lambda device_idx: []) is None
    assert "no NVLink of it is active" in caplog.text


def test_reader_bug_is_not_taken_for_an_unknown_rate() -> None:
    def reader(device_idx: int) -> list[int]:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        nvlink_gbs(0, reader=reader)


def test_driver_is_asked_by_uuid_and_only_links_that_are_up_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each link has a rate of its own, so that a wrong choice of links shows in the sum."""
    nvml = FakeNvml(
        [
            (_UP, _field(1000)),
            (_DOWN, _field(20000)),
            (_ASLEEP, _field(300000)),
            (_REFUSED, _REFUSED),
            (_UP, _field(4000000)),
            (_DOWN, _REFUSED),
        ]
    )
    nvml.install(monkeypatch)
    assert nvlink_gbs(2) == pytest.approx(0.9 * 4301)
    assert (nvml.num_inits, nvml.num_shutdowns) == (1, 1)


def test_gpu_that_nvml_does_not_know_has_no_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml([(_UP, _field(1000))])
    nvml.install(monkeypatch)
    assert nvlink_gbs(1) is None
    assert "GPU 1 is unknown: NVML says: Not Found" in caplog.text
    assert (nvml.num_inits, nvml.num_shutdowns) == (1, 1)


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_machine_without_driver_has_no_rate(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml([])
    nvml.init_error = code
    nvml.install(monkeypatch)
    assert nvlink_gbs(2) is None
    assert len(caplog.records) == 1


def test_gpu_that_tells_no_link_count_or_no_rate_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over the links that happened to answer would be too small and look right."""
    nvml = FakeNvml([(_UP, _field(1000)), (_UP, _REFUSED)])
    nvml.install(monkeypatch)
    assert nvlink_gbs(2) is None
    nvlink_gbs.cache_clear()
    nvml.num_links = _REFUSED
    assert nvlink_gbs(2) is None


def test_broken_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([])
    nvml.init_error = pynvml.NVML_ERROR_GPU_IS_LOST
    nvml.install(monkeypatch)
    with pytest.raises(pynvml.NVMLError):
        nvlink_gbs(2)


def test_device_that_torch_does_not_see_has_no_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FakeNvml([(_UP, _field(1000))]).install(monkeypatch)
    assert nvlink_gbs(3) is None
    assert nvlink_gbs(-1) is None
    assert caplog.text.count("torch sees 3 CUDA devices") == 2


def _add_port(root: Path, nic: str, port: int, rate: str, state: str = "4: ACTIVE") -> Path:
    folder = root / nic / "ports" / str(port)
    folder.mkdir(parents=True)
    (folder / "rate").write_text(f"{rate}\n")
    (folder / "state").write_text(f"{state}\n")
    return folder


def test_named_card_is_taken_even_if_another_is_faster(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _add_port(tmp_path, "mlx5_0", 1, "800 Gb/sec (4X XDR)")
    _add_port(tmp_path, "mlx5_1", 1, "400 Gb/sec (4X NDR)")
    assert rdma_gbs("mlx5_1", root=tmp_path) == 50.0
    assert caplog.records == []


def test_fastest_active_port_of_a_card_is_taken(tmp_path: Path) -> None:
    _add_port(tmp_path, "mlx5_0", 1, "100 Gb/sec (4X EDR)")
    _add_port(tmp_path, "mlx5_0", 2, "200 Gb/sec (4X HDR)")
    _add_port(tmp_path, "mlx5_0", 3, "400 Gb/sec (4X NDR)", state="1: DOWN")
    _add_port(tmp_path, "mlx5_0", 4, "400 Gb/sec (4X NDR)", state="5: ACTIVE_DEFER")
    assert rdma_gbs("mlx5_0", root=tmp_path) == 25.0


def test_rate_may_have_a_fraction(tmp_path: Path) -> None:
    _add_port(tmp_path, "mlx5_0", 1, "2.5 Gb/sec (1X SDR)")
    assert rdma_gbs("mlx5_0", root=tmp_path) == 2.5 / 8


def test_environment_names_the_card_when_the_caller_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_port(tmp_path, "mlx5_0", 1, "400 Gb/sec (4X NDR)")
    _add_port(tmp_path, "mlx5_7", 1, "200 Gb/sec (4X HDR)")
    monkeypatch.setenv("EP_NIC_NAME", "mlx5_7")
    assert rdma_gbs(root=tmp_path) == 25.0
    assert rdma_gbs("mlx5_0", root=tmp_path) == 50.0


@pytest.mark.parametrize("nic", ["mlx5_9", "mlx5_0"])
def test_fastest_active_port_stands_in_for_a_card_without_one(
    nic: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for a card that is not there, once for one whose cable is out."""
    _add_port(tmp_path, "mlx5_0", 1, "400 Gb/sec (4X NDR)", state="1: DOWN")
    _add_port(tmp_path, "mlx5_1", 1, "100 Gb/sec (4X EDR)")
    _add_port(tmp_path, "bnxt_re0", 1, "200 Gb/sec (4X HDR)")
    assert rdma_gbs(nic, root=tmp_path) == 25.0
    assert rdma_gbs(nic, root=tmp_path) == 25.0
    assert len(caplog.records) == 1
    assert f"network card {nic} has no active port; taking the rate of bnxt_re0, 25 GB/s" in caplog.text


@pytest.mark.parametrize("exists", [False, True])
def test_machine_without_cards_has_no_rate(exists: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "infiniband"
    if exists:
        root.mkdir()
    assert rdma_gbs("mlx5_0", root=root) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_rate_is_read_once(tmp_path: Path) -> None:
    port = _add_port(tmp_path, "mlx5_0", 1, "400 Gb/sec (4X NDR)")
    assert rdma_gbs("mlx5_0", root=tmp_path) == 50.0
    (port / "rate").write_text("100 Gb/sec (4X EDR)\n")
    assert rdma_gbs("mlx5_0", root=tmp_path) == 50.0


def test_port_without_attributes_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "mlx5_0" / "ports" / "1").mkdir(parents=True)
    (tmp_path / "mlx5_1").mkdir()
    (tmp_path / "abi_version").write_text("1\n")
    _add_port(tmp_path, "mlx5_2", 1, "400 Gb/sec (4X NDR)")
    assert rdma_gbs("mlx5_2", root=tmp_path) == 50.0


@pytest.mark.parametrize(("code", "is_absence"), [(errno.EINVAL, True), (errno.ENODEV, True), (errno.EIO, False)])
def test_only_absence_is_taken_for_absence(
    code: int, is_absence: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_port(tmp_path, "mlx5_0", 1, "400 Gb/sec (4X NDR)")

    def fail(path: Path, **_: object) -> str:
        raise OSError(code, "the port does not answer", str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    if is_absence:
        assert rdma_gbs("mlx5_0", root=tmp_path) is None
    else:
        with pytest.raises(OSError, match="does not answer"):
            rdma_gbs("mlx5_0", root=tmp_path)
