"""Small methods, configs and hints, arguments and variables of V1 without an effect, and MPI communicators."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import legacy_buffer
import pytest
import torch

from deep_ep_core.errors import ConfigError
from deep_ep_legacy import Buffer, Config, extra_arguments, variables
from deep_ep_legacy.extra_arguments import ignore_extra_arguments


def test_small_methods_do_what_they_say(rank_pool):
    rank_pool(2).run(legacy_buffer.check_small_methods)


def test_buffer_made_in_inference_mode_serves_outside_of_it(rank_pool):
    rank_pool(2).run(legacy_buffer.check_buffer_of_inference_mode)


def test_arguments_of_forks_are_ignored_with_one_warning_each(rank_pool):
    pool = rank_pool(2)
    for messages in pool.run(legacy_buffer.check_extra_arguments):
        expected = [
            "Buffer ignores use_fabric=True: memory is not shared through fabric handles",
            "Buffer ignores num_nvl_peers=4: the ranks of a node are found, not told",
            "Buffer ignores overlap=False: it is no argument here, and the value asks for nothing",
            "dispatch ignores x_global_scale=None: it is no argument here, and the value asks for nothing",
            "combine ignores packed_recv_count=None: it is no argument here, and the value asks for nothing",
        ]
        assert messages == expected


OVERLAP_ARGUMENTS = {
    "packed_recv_count": torch.ones(2),
    "comp_signal": torch.ones(2),
    "block_m": 64,
    "threshold": 8,
    "num_sms": 3,
    "src_signals": torch.ones(2),
    "src_signal_expect_value": 1,
}


@pytest.mark.parametrize("name", OVERLAP_ARGUMENTS)
def test_what_belongs_to_overlap_is_ignored_without_it(monkeypatch, name):
    """SGLang passes all of them, with overlap=False too."""
    monkeypatch.setattr(extra_arguments, "_warned", set())
    extra = {name: OVERLAP_ARGUMENTS[name]}
    with pytest.warns(UserWarning, match=f"{name}=.*: it has a meaning with overlap=True only"):
        ignore_extra_arguments("low_latency_combine", extra)
    with pytest.warns(UserWarning, match="overlap=False"):
        ignore_extra_arguments("low_latency_combine", {**extra, "overlap": False})
    for call, given in (("low_latency_combine", {**extra, "overlap": True}), ("low_latency_dispatch", extra)):
        with pytest.raises(ConfigError, match=f"{call} must be called without"):
            ignore_extra_arguments(call, given)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_buffer_serves_normal_and_low_latency_calls(rank_pool, num_ranks):
    rank_pool(num_ranks).run(legacy_buffer.check_low_latency_buffer)


def test_communicators_become_groups(rank_pool):
    rank_pool(4).run(legacy_buffer.check_communicators)


def test_a_program_of_mpi_alone_gets_its_default_group(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # Else gloo looks up the machine's own name, which need not resolve.
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    commands = [[sys.executable, legacy_buffer.__file__, str(tmp_path), str(rank), "2"] for rank in range(2)]
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        for rank in ranks:
            output, errors = rank.communicate(timeout=60)
            assert (rank.returncode, output) == (0, "right\n"), errors
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("num_ranks", "nvl_bytes", "rdma_bytes"),
    [(8, 335_709_824, 0), (16, 377_673_984, 91_887_744), (32, 377_675_264, 168_023_680)],
)
def test_size_hints_are_those_of_v1(num_ranks, nvl_bytes, rdma_bytes):
    config = Buffer.get_dispatch_config(num_ranks)
    assert config.get_nvl_buffer_size_hint(7168 * 2, num_ranks) == nvl_bytes
    assert config.get_rdma_buffer_size_hint(7168 * 2, num_ranks) == rdma_bytes
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, num_ranks, 288) == 2_146_961_792


def test_default_configs_are_those_of_v1_with_the_sms_of_the_class():
    assert Config() == Config(20, 6, 256, 6, 256 + 2), "the last is rounded up to a multiple of the third"
    assert Buffer.num_sms == 20
    try:
        Buffer.set_num_sms(24)
        assert Buffer.get_dispatch_config(2) == Config(24, 24, 256, 6, 128)
        assert Buffer.get_combine_config(160) == Config(24, 2, 720, 8, 128)
    finally:
        Buffer.set_num_sms(20)
    assert Buffer.is_sm90_compiled()
    keywords = {"num_sms": 20, "num_max_nvl_chunked_send_tokens": 36, "num_max_nvl_chunked_recv_tokens": 288}
    rdma = {"num_max_rdma_chunked_send_tokens": 20, "num_max_rdma_chunked_recv_tokens": 128}
    assert Buffer.get_dispatch_config(16) == Config(**keywords, **rdma)


def test_variables_of_v1_are_named_once(monkeypatch):
    names = ("DISABLE_SM90_FEATURES", "DISABLE_AGGRESSIVE_PTX_INSTRS", "EP_NVSHMEM_ROOT_DIR", "NVSHMEM_DIR")
    for name in names:
        monkeypatch.setenv(name, "1")
    variables.warn_of_v1_variables.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        variables.warn_of_v1_variables()
        variables.warn_of_v1_variables()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(names)
    for name, message in zip(names, messages, strict=True):
        assert message.startswith(f"{name} is set but has no effect on deep_ep_legacy: ")


@pytest.mark.parametrize(("context_device", "current", "stays"), [(None, 0, False), (0, 0, True), (0, 1, False)])
def test_kernels_may_run_on_the_current_stream_of_their_own_device(monkeypatch, context_device, current, stays):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    buffer = Buffer.__new__(Buffer)
    buffer._context = None if context_device is None else SimpleNamespace(device_idx=context_device)
    assert buffer._may_stay is stays
