"""The device backend: what the collective one is held to, to the bit, and what only this one does.

Ranks share one GPU or have one each, on one node and on make-believe nodes between which a loopback network lies.
"""

import pp_device
import pp_failures
import pp_messages
import pp_schedule
import pytest
from pp_setting import run_check

from deep_ep_pp.demo.__main__ import main as demo_main

pytestmark = pytest.mark.gpu

# Ranks and nodes.
SHAPES = [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2)]
# The backend, and where tensors lie; a device backend brings those of the host to its GPU.
SETTINGS = [("device", "cuda"), ("device", "cpu"), ("collective", "cuda")]
SETTING_NAMES = ["-".join(setting) for setting in SETTINGS]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}", scope="module")
def shape(request):
    return request.param


@pytest.fixture
def ranks(gpu_rank_pool, shape):
    return gpu_rank_pool(*shape)


class TestAnyRanks:
    """On every shape; parametrised by it first, so that its ranks start once."""

    def test_auto_takes_the_device_backend_inside_a_node(self, ranks):
        ranks.run(run_check, pp_device.check_the_choice, "auto", "cuda")

    @pytest.mark.parametrize(("backend", "device"), SETTINGS, ids=SETTING_NAMES)
    def test_messages_of_any_size_arrive_between_any_two_ranks(self, ranks, backend, device):
        ranks.run(run_check, pp_messages.check_sizes, backend, device)

    @pytest.mark.parametrize(("backend", "device"), SETTINGS, ids=SETTING_NAMES)
    def test_every_dtype_arrives_to_the_bit(self, ranks, backend, device):
        ranks.run(run_check, pp_messages.check_dtypes, backend, device)

    @pytest.mark.parametrize(("backend", "device"), SETTINGS, ids=SETTING_NAMES)
    def test_several_tensors_are_one_message(self, ranks, backend, device):
        ranks.run(run_check, pp_messages.check_multi_tensor_messages, backend, device)

    @pytest.mark.parametrize(("window", "num_messages"), [(1, 5), (3, 10)])
    def test_the_window_wraps(self, ranks, window, num_messages):
        ranks.run(run_check, pp_messages.check_window_wraps, "device", "cuda", window, num_messages)

    @pytest.mark.parametrize(("window", "size"), [(1, 0), (3, 1 << 20)])
    def test_a_sender_ahead_of_the_window_waits_in_its_stream(self, ranks, window, size):
        ranks.run(run_check, pp_messages.check_sender_ahead_of_the_window_waits, "device", "cuda", window, size)

    def test_both_directions_at_once_do_not_wait_for_each_other(self, ranks):
        ranks.run(run_check, pp_messages.check_bidirectional, "device", "cuda", 2)

    def test_the_host_runs_ahead_of_the_device(self, ranks):
        ranks.run(run_check, pp_device.check_the_host_runs_ahead, "device", "cuda")

    def test_messages_on_changing_streams_keep_their_order(self, ranks):
        ranks.run(run_check, pp_device.check_streams, "device", "cuda")

    def test_a_reconfiguration_between_messages_takes_effect(self, ranks):
        ranks.run(run_check, pp_messages.check_reconfiguration, "device", "cuda")

    def test_closing_hands_over_what_was_sent(self, ranks):
        ranks.run(run_check, pp_messages.check_close_hands_over_what_was_sent, "device", "cuda")

    def test_random_interleavings_arrive_to_the_bit(self, ranks, shape):
        ranks.run(run_check, pp_messages.check_random_rounds, "device", "cuda", 1000 * shape[0], 30, 10, timeout_s=240)


class TestFourRanks:
    @pytest.fixture
    def ranks(self, gpu_rank_pool):
        return gpu_rank_pool(4)

    def test_a_thousand_random_rounds_arrive_to_the_bit(self, ranks):
        """Mixed sizes, peers, tensors, windows and configurations; streams hold whole rounds."""
        sent = ranks.run(run_check, pp_messages.check_random_rounds, "device", "cuda", 4000, 1000, 10, timeout_s=280)
        assert sum(sent) >= 8000

    def test_the_functions_and_a_buffer_of_upstreams_size_do_the_same(self, ranks):
        ranks.run(run_check, pp_messages.check_functions, "device", "cuda")

    def test_ranks_of_a_subgroup_are_counted_in_the_subgroup(self, ranks):
        ranks.run(run_check, pp_messages.check_subgroup, "device", "cuda", [1, 3])

    def test_a_late_rank_at_the_end_of_a_chain_is_named_to_all_who_wait(self, ranks):
        told = ranks.run(run_check, pp_failures.wait_for_a_late_rank, "device", "cuda", 6.0)
        for rank in (1, 2, 3):
            assert told[rank]["peers"] == [0], told[rank]["message"]
            assert told[rank]["phase"] == f"pp_recv #1 from rank {rank - 1}"
            assert "rank 0 says nothing" in told[rank]["message"]

    def test_a_rank_that_refuses_is_named_with_its_reason_to_all_who_wait(self, ranks):
        told = ranks.run(run_check, pp_failures.refuse_to_send, "device", "cuda", 5.0)
        for rank in (1, 2):
            assert told[rank]["peers"] == [0], told[rank]["message"]
            assert "rank 0 refused: a message must fit into the 64 bytes" in told[rank]["message"]

    def test_configuring_with_a_message_on_its_way_is_refused_on_all_ranks(self, ranks):
        told = ranks.run(run_check, pp_failures.reconfigure_with_a_message_on_its_way, "device", "cuda")
        for message in told:
            assert "got 1 sent by rank 3 to rank 1, which received 0" in message

    def test_ranks_that_configure_differently_are_all_told_and_keep_what_they_had(self, ranks):
        for told in ranks.run(run_check, pp_failures.disagree_in_configuration, "device", "cuda", 2, (64, 3)):
            assert told["field"] == "num_max_tensor_bytes"

    @pytest.mark.parametrize("num_microbatches", [3, 8])
    def test_gradients_of_1f1b_are_those_of_the_whole_model(self, ranks, num_microbatches):
        differences = ranks.run(run_check, pp_schedule.gradient_differences, "device", "cuda", num_microbatches)
        assert max(differences) < 1e-12


class TestTwoRanks:
    @pytest.fixture
    def ranks(self, gpu_rank_pool):
        return gpu_rank_pool(2)

    def test_two_buffers_of_one_group_do_not_mix(self, ranks):
        ranks.run(run_check, pp_messages.check_two_buffers_of_one_group, "device", "cuda")

    def test_a_tensor_that_needs_a_gradient_is_sent_and_received_into(self, ranks):
        ranks.run(run_check, pp_messages.check_tensor_with_gradient_is_sent_and_received_into, "device", "cuda")

    def test_autograd_knows_that_a_tensor_was_received_into(self, ranks):
        ranks.run(run_check, pp_device.check_autograd_knows, "device", "cuda")

    def test_tensors_of_host_and_device_are_one_to_messages(self, ranks):
        ranks.run(run_check, pp_device.check_tensors_of_host_and_device_are_one_to_messages, "device", "cuda")

    @pytest.mark.parametrize("on_default_stream", [False, True])
    @pytest.mark.parametrize("size", [4096, 64 << 20])
    def test_no_kernel_runs(self, ranks, size, on_default_stream):
        kernels = ranks.run(run_check, pp_device.names_of_kernels, "device", "cuda", size, on_default_stream)
        assert kernels == [[], []]

    def test_memory_of_slots_grows_where_it_must_and_stays(self, ranks):
        for first, second, third, fourth in ranks.run(
            run_check, pp_device.slot_bytes_by_configuration, "device", "cuda"
        ):
            assert first < second == third == fourth

    def test_a_graph_capture_is_refused_and_nothing_is_sent(self, ranks):
        ranks.run(run_check, pp_device.check_capture_is_refused, "device", "cuda")

    def test_other_sizes_are_told_at_once_where_the_host_waits(self, ranks):
        told = ranks.run(run_check, pp_device.check_other_sizes_on_the_host, "device", "cpu")[1]
        assert "the message's sizes, [9] bytes (got [8], on rank 1)" in told

    def test_a_late_receiver_is_named_to_a_sender_beyond_the_window(self, ranks):
        told = ranks.run(run_check, pp_failures.wait_for_a_late_receiver, "device", "cuda", 2.0)[0]
        assert told["peers"] == [1]
        assert told["phase"] == "pp_send #2 to rank 1"

    def test_leaving_a_block_by_an_error_waits_for_nobody(self, ranks):
        assert ranks.run(run_check, pp_failures.leave_a_block_by_an_error, "device", "cuda", 60.0)[0] < 20

    def test_ranks_that_wait_for_each_other_are_told_so(self, ranks):
        for rank, told in enumerate(ranks.run(run_check, pp_failures.wait_for_each_other, "device", "cuda", 3.0)):
            assert told["peers"] == [1 - rank]
            assert f"rank {1 - rank} in pp_recv #1 from rank {rank}, waiting for rank {rank}" in told["message"]

    def test_a_failed_buffer_says_so_at_once_and_can_be_closed(self, ranks):
        told = ranks.run(run_check, pp_failures.use_after_failure, "device", "cuda", 2.0)[0]
        assert len(told) == 3
        for message in told:
            assert message.startswith(
                "TransportError: PipelineBuffer cannot be used on rank 0 after a failed operation"
            )


class TestTwoRanksOfOneNodeOrTwo:
    @pytest.fixture(params=[1, 2], scope="module")
    def num_nodes(self, request):
        return request.param

    @pytest.fixture
    def ranks(self, gpu_rank_pool, num_nodes):
        return gpu_rank_pool(2, num_nodes)

    def test_other_sizes_are_told_by_a_later_call_and_what_follows_is_right(self, ranks):
        told = ranks.run(run_check, pp_device.check_other_sizes, "device", "cuda")[1]
        assert "pp_recv #1 from rank 0 must be given tensors of the message's sizes, [9, 0] bytes (got [9]," in told[0]
        assert "the message is lost" in told[0]
        assert "pp_recv #3 from rank 0 must be given tensors of the message's sizes, [33] bytes (got [33, 1]" in told[1]

    def test_a_late_receiver_is_named_to_a_sender_that_closes(self, ranks):
        told = ranks.run(run_check, pp_failures.close_before_anybody_receives, "device", "cuda", 2.0)[0]
        assert told["peers"] == [1]
        assert "flush of messages to rank 1" in told["phase"]


def test_the_demo_runs_on_gpus_and_agrees(gpu_rank_pool, capfd):
    # A pool may hold a server on the GPU that serves no other ranks.
    gpu_rank_pool.close()
    assert demo_main(["--ranks", "4", "--steps", "2", "--device", "cuda"]) == 0
    said = capfd.readouterr().out
    assert "messages by the device backend" in said
    assert "AGREE" in said
