from __future__ import annotations

import gc
import logging
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import nccl_fake
import pytest
import torch
import torch.distributed as dist
from nccl_fake import CPU, FakeNccl, open_fake

from deep_ep_core.errors import TransportError
from deep_ep_core.nccl import Communicator, GinType, Team, Window, communicator
from deep_ep_core.topology import Topology


@pytest.fixture(scope="module", autouse=True)
def group():
    """A default group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield
    dist.destroy_process_group()


class FakeBackend:
    """Torch's NCCL backend of a group, with a communicator after the first collective."""

    def __init__(self) -> None:
        self.comm = 0

    def _comm_ptr(self) -> int:
        if self.comm is None:
            raise RuntimeError("NCCL communicator was aborted")
        return self.comm


@pytest.fixture
def torch_backend(monkeypatch):
    """Lets torch seem to have an NCCL backend that calls the same library."""
    backend = FakeBackend()

    def all_reduce(tensor, group):
        assert tensor.numel() == 1
        backend.comm = nccl_fake.COMM

    monkeypatch.setattr(dist.ProcessGroup, "_get_backend", lambda group, device: backend)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(communicator.NcclLibrary, "is_torchs", True)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: type("Stream", (), {"synchronize": lambda self: None})()
    )
    return backend


def test_a_communicator_is_made_without_blocking_and_waited_for():
    fake = FakeNccl()
    fake.num_polls_in_progress = 3
    with open_fake(fake) as opened:
        assert opened.is_owned
        assert opened.handle == nccl_fake.COMM
        assert (opened.rank, opened.num_ranks) == (0, 1)
    assert fake.num_polls_in_progress == 0


def test_a_communicator_that_is_not_made_in_time_is_aborted():
    fake = FakeNccl()
    fake.num_polls_in_progress = 10**9
    with pytest.raises(TransportError, match="ncclCommInitRankConfig must be done within") as caught:
        open_fake(fake, timeout_s=0.5)
    assert caught.value.code_name == "ncclInProgress"
    assert fake.count("ncclCommAbort") == 1


def test_a_communicator_that_fails_in_the_background_is_aborted():
    fake = FakeNccl()
    fake.failures["async"] = 6
    with pytest.raises(TransportError, match="rank 0 of 1: ncclRemoteError"):
        open_fake(fake)
    assert fake.count("ncclCommAbort") == 1


def test_teams_and_topology_are_what_nccl_says():
    library = FakeNccl(num_ranks=8, rank=5, lsa_size=4).library()
    opened = Communicator(library, nccl_fake.COMM, transport=_Ranks(5, 8), device=CPU, is_owned=False)
    assert opened.world == Team(num_ranks=8, rank=5, stride=1)
    assert opened.lsa == Team(num_ranks=4, rank=1, stride=1)
    assert opened.rail == Team(num_ranks=2, rank=1, stride=4)
    assert opened.topology == Topology(rank=5, num_ranks=8, num_scaleup_ranks=4)
    assert opened.needs_gin
    assert [opened.lsa_rank_of(rank) for rank in range(8)] == [None] * 4 + [0, 1, 2, 3]


def test_one_lsa_team_needs_no_network():
    library = FakeNccl(num_ranks=8, rank=5).library()
    opened = Communicator(library, nccl_fake.COMM, transport=_Ranks(5, 8), device=CPU, is_owned=False)
    assert not opened.needs_gin
    assert opened.topology.num_scaleout_ranks == 1


def test_a_team_that_nccl_cannot_form_is_an_error(monkeypatch):
    fake = FakeNccl(lsa_size=0)
    monkeypatch.setattr(FakeNccl, "_TeamLsa", lambda self, comm: nccl_fake.TeamStruct(0, 0, 0))
    monkeypatch.setattr(FakeNccl, "_CommQueryProperties", _properties_of_one_rank)
    with pytest.raises(TransportError, match="ncclTeamLsa failed"):
        open_fake(fake)
    assert fake.count("ncclCommAbort") == 1


def _properties_of_one_rank(self, comm, out):
    out._obj.nRanks, out._obj.deviceApiSupport = 1, True


def test_ranks_whose_memory_cannot_be_shared_are_told_what_is_needed():
    fake = FakeNccl()
    fake.has_device_api = False
    with pytest.raises(TransportError, match="NCCL_CUMEM_ENABLE and NCCL_WIN_ENABLE must not be 0"):
        open_fake(fake)
    assert fake.count("ncclCommAbort") == 1


@pytest.mark.parametrize("version", [23007, 23203])
def test_the_size_of_the_device_communicator_comes_from_the_library_where_it_tells(version):
    with open_fake(FakeNccl(version)) as opened:
        assert opened.properties.dev_comm_bytes == (240 if version == 23007 else 248)


def test_a_gin_type_that_is_newer_than_the_list_is_known_as_other():
    fake = FakeNccl()
    fake.gin_type, fake.railed_gin_type = 9, 2
    with open_fake(fake) as opened:
        assert (opened.properties.gin_type, opened.properties.railed_gin_type) == (GinType.OTHER, GinType.PROXY)


def test_closing_twice_destroys_once_and_never_waits_for_peers():
    fake = FakeNccl()
    opened = open_fake(fake)
    opened.close()
    opened.close()
    assert fake.count("ncclCommAbort") == 1
    assert fake.count("ncclCommDestroy") == 0
    assert not opened.is_alive
    with pytest.raises(TransportError, match="is closed; open a new one"):
        _ = opened.handle
    assert "closed" in repr(opened)


def test_a_communicator_that_is_dropped_is_destroyed():
    fake = FakeNccl()
    opened = open_fake(fake)
    del opened
    gc.collect()
    assert fake.count("ncclCommAbort") == 1


def test_closing_does_not_raise_when_nccl_fails(caplog):
    fake = FakeNccl()
    opened = open_fake(fake)
    fake.failures["ncclCommAbort"] = 1
    with caplog.at_level(logging.WARNING):
        opened.close()
    assert "was left behind" in caplog.text


def test_torchs_communicator_is_borrowed_and_never_destroyed(torch_backend):
    fake = FakeNccl()
    with open_fake(fake) as opened:
        assert not opened.is_owned
        assert opened.handle == nccl_fake.COMM
        assert "torch's" in repr(opened)
    assert fake.count("ncclCommInitRankConfig") == 0
    assert fake.count("ncclCommAbort") == 0


def test_reuse_can_be_turned_off_by_argument_and_by_environment(torch_backend, monkeypatch, fresh_env):
    with open_fake(FakeNccl(), reuse=False) as opened:
        assert opened.is_owned
    monkeypatch.setenv("EP_REUSE_NCCL_COMM", "0")
    with open_fake(FakeNccl()) as opened:
        assert opened.is_owned
    with open_fake(FakeNccl(), reuse=True) as opened:
        assert not opened.is_owned


def test_nothing_is_borrowed_from_a_torch_that_calls_another_library(torch_backend, monkeypatch):
    monkeypatch.setattr(communicator.NcclLibrary, "is_torchs", False)
    with open_fake(FakeNccl()) as opened:
        assert opened.is_owned


def test_a_backend_without_a_communicator_is_an_error(torch_backend, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    with pytest.raises(TransportError, match="EP_REUSE_NCCL_COMM=0"):
        open_fake(FakeNccl())


@pytest.mark.parametrize("gone", [None, 0, 0xC1])
def test_a_communicator_that_torch_destroyed_is_not_called_again(torch_backend, gone):
    fake = FakeNccl()
    opened = open_fake(fake)
    window = Window(opened, 0x1000, 4096)
    torch_backend.comm = gone
    num_calls = len(fake.log)
    assert not opened.is_alive
    window.close()
    opened.close()
    assert len(fake.log) == num_calls


def test_what_torch_destroyed_says_so(torch_backend):
    opened = open_fake(FakeNccl())
    torch_backend.comm = None
    with pytest.raises(TransportError, match="torch has destroyed it"):
        _ = opened.handle


def test_ranks_share_the_unique_id_of_the_first(rank_pool):
    answers = rank_pool(4).run(nccl_fake.open_on_ranks, [23007] * 4)
    assert {unique_id for unique_id, _ in answers} == {bytes((7 * place) % 256 for place in range(128))}
    assert answers[3][1] == "Communicator(rank 3 of 4, own, NCCL 2.30.7, LSA team of 1)"


@pytest.mark.parametrize(
    ("versions", "listed"),
    [
        ([23007, 23203], "rank 0: 2.30.7, rank 1: 2.32.3"),
        ([23007, 0], "rank 0: 2.30.7, rank 1: none that will do"),
    ],
)
def test_ranks_with_different_nccl_are_all_told(rank_pool, versions, listed):
    outcomes = rank_pool(2).run_catching(nccl_fake.open_on_ranks, versions)
    assert [outcome.error_type_name for outcome in outcomes] == ["RankMismatchError"] * 2
    assert all(f"NCCL version (got {listed}" in (outcome.error_message or "") for outcome in outcomes)


def test_where_no_rank_has_nccl_each_says_what_it_lacks(rank_pool):
    outcomes = rank_pool(2).run_catching(nccl_fake.open_on_ranks, [0, 0])
    assert [(outcome.error_type_name, outcome.error_message) for outcome in outcomes] == [
        ("TransportError", "no NCCL here")
    ] * 2


def test_the_interpreter_ends_well_with_everything_open():
    """Also when a tensor of the heap is among what the interpreter drops last."""
    program = (
        "import gc, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import torch, torch.distributed as dist\n"
        "from nccl_fake import FakeNccl, HostMemory, open_fake\n"
        "from deep_ep_core.window import ControlRegion, SymmetricMemory\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "region = ControlRegion(name='test.flags', num_bytes=64)\n"
        "memory = SymmetricMemory(open_fake(FakeNccl()), regions=[region], heap_bytes=8192, allocate=HostMemory)\n"
        "tensor = memory.heap.empty((16,), torch.float32)\n"
        "weight = torch.ones(16, requires_grad=True)\n"
        "sys.modules['keep'] = kept = [tensor, (weight * tensor.fill_(2)).sum(), memory.control('test.flags')]\n"
        "kept.append(kept)\n"
        "torch.kept = kept\n"
    )
    command = [sys.executable, "-X", "dev", "-c", program, str(Path(nccl_fake.__file__).parent)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "Traceback" not in answer.stderr


class _Ranks:
    """The place of a rank, in the stead of a transport."""

    timeout_s = 30.0

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def begin(self, operation, fields):
        pass
