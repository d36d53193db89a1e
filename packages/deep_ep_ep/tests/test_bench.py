from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deep_ep_core.errors import ConfigError, DeepEPError
from deep_ep_ep import ElasticBuffer
from deep_ep_ep.bench import __main__ as bench_main
from deep_ep_ep.bench.baseline import make_plan
from deep_ep_ep.bench.cases import (
    DTYPES,
    LAYOUTS,
    OPS,
    Case,
    Sweep,
    busiest_device_bytes,
    bytes_moved_by_rank,
    make_topk_idx,
    window_result_bytes,
)
from deep_ep_ep.bench.expected import ExpectedRows, Rows, expected_rows, source_rows
from deep_ep_ep.bench.measure import (
    CaseRunner,
    Measurement,
    Session,
    slowest_rank_ms,
    time_host_calls,
    time_rounds,
)
from deep_ep_ep.bench.suites import SUITES
from deep_ep_ep.bench.tasks import check_results, make_task

# The fields that the design gives a record, in its order.
FIELDS = [
    *("op", "backend", "device", "driver", "nccl", "torch", "commit", "command", "num_ranks", "num_nodes"),
    *("num_tokens", "hidden", "num_topk", "num_experts", "dtype", "layout", "num_sms"),
    *("median_ms", "min_ms", "max_ms", "bytes_moved", "copy_gbs", "floor_ms", "ratio_to_floor", "baseline_ms"),
    # What a device run needs beside them.
    *("case", "mode", "recv_memory", "expert_alignment", "num_bytes", "window_bytes"),
]
SMALL = Case(
    op="dispatch", layout="token", dtype="bf16", num_ranks=2, num_tokens=33, hidden=256, num_topk=4, num_experts=8
)


def total_bytes(case: Case) -> int:
    return busiest_device_bytes(bytes_moved_by_rank(case, make_topk_idx(case)), ["one device"] * case.num_ranks)


@pytest.mark.parametrize("op", OPS)
def test_bytes_moved_is_the_measured_least_traffic_of_the_reference_problem(op):
    case = replace(SMALL, op=op, num_ranks=8, num_tokens=4096, hidden=7168, num_topk=8, num_experts=256)
    # The payload alone is 8 ranks * 4096 tokens * 5.29 distinct ranks * 14336 bytes; each token's row comes on top.
    assert total_bytes(case) == pytest.approx(2.96e9, rel=0.01)


# Two ranks with experts {0, 1} and {2, 3}. Rank 0 holds one token for both experts of rank 0 and one for both ranks;
# rank 1 holds one token for rank 1 and one that goes nowhere.
HAND_MADE_ROUTING = torch.tensor([[[0, 1], [0, 2]], [[3, 2], [-1, -1]]])


@pytest.mark.parametrize(
    ("op", "layout", "num_rows"),
    [
        # Read 2 and 1 tokens; write 2 (token, rank) pairs at each rank.
        ("dispatch", "token", [2 + 2, 1 + 2]),
        # Write 3 (token, expert) pairs at each rank.
        ("dispatch", "expert", [2 + 3, 1 + 3]),
        ("cached-dispatch", "expert", [2 + 3, 1 + 3]),
        # Read the same rows, write 2 tokens at each rank, the one without an expert too.
        ("combine", "token", [2 + 2, 2 + 2]),
        ("combine", "expert", [3 + 2, 3 + 2]),
    ],
)
def test_each_row_counts_once_where_it_is_read_and_once_where_it_is_written(op, layout, num_rows):
    case = replace(SMALL, op=op, layout=layout, num_tokens=2, num_topk=2, num_experts=4)
    assert bytes_moved_by_rank(case, HAND_MADE_ROUTING) == [num * 512 for num in num_rows]


def test_scales_belong_to_an_fp8_row():
    assert replace(SMALL, dtype="fp8", hidden=7168).row_bytes == 7168 + 56 * 4
    assert replace(SMALL, dtype="fp8", hidden=144).row_bytes == 144 + 2 * 4


def test_ranks_of_one_device_share_its_memory():
    bytes_by_rank = [1, 20, 300, 4000]
    assert busiest_device_bytes(bytes_by_rank, ["a"] * 4) == 4321
    assert busiest_device_bytes(bytes_by_rank, ["a", "b", "b", "a"]) == 4001
    assert busiest_device_bytes(bytes_by_rank, ["a", "b", "c", "d"]) == 4000


@pytest.mark.parametrize("imbalance", [1.0, 1.6, 4.0])
def test_imbalance_is_the_load_of_the_hottest_rank_over_the_mean(imbalance):
    case = replace(SMALL, num_ranks=8, num_tokens=512, num_topk=6, num_experts=64, imbalance=imbalance)
    topk_idx = make_topk_idx(case)
    ordered = topk_idx.sort(dim=2).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all(), "an expert comes twice in a row"
    assert ordered.min() >= 0
    assert ordered.max() < 64
    load = torch.bincount(topk_idx.flatten() // case.num_local_experts, minlength=8).double()
    # 4096 tokens: six standard deviations of a rank's uniform load are 7 % of it.
    assert float(load.max() / load.mean()) == pytest.approx(imbalance, rel=0.07)
    assert float(load[1:].max() / load[1:].min()) == pytest.approx(1, abs=0.2)


def test_routing_is_that_of_the_seed_and_differs_between_ranks():
    topk_idx = make_topk_idx(SMALL)
    assert torch.equal(topk_idx, make_topk_idx(SMALL))
    assert not torch.equal(topk_idx, make_topk_idx(replace(SMALL, seed=1)))
    assert not torch.equal(topk_idx[0], topk_idx[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 9}, "9 experts must be a multiple of the 2 ranks"),
        ({"num_topk": 9}, "top-9 needs at least as many experts"),
        ({"num_topk": 34, "num_experts": 64}, "at most 32 experts"),
        ({"hidden": 100}, "multiple of 16 bytes"),
        ({"imbalance": 0.5}, "at least 1"),
        ({"num_topk": 8, "imbalance": 1.5}, "lower it to 1$"),
        ({"op": "combine", "dtype": "fp8"}, "combine moves bf16"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **changes)


def test_sweep_takes_every_combination_and_a_combine_once_for_all_dtypes():
    sweep = Sweep(
        ops=OPS,
        layouts=LAYOUTS,
        dtypes=DTYPES,
        num_ranks=2,
        num_tokens=[1, 32],
        hidden=[256],
        num_topk=[2],
        num_experts=[4, 8],
    )
    cases = sweep.cases()
    assert len(cases) == len(set(cases)) == 4 * 2 * (2 + 2 + 1)
    assert {case.dtype for case in cases if case.op == "combine"} == {"bf16"}


def run_both_sides(case: Case) -> tuple[int, int]:
    """On one rank: check a task as the benchmark does; how many rows of the library's result are real, of how many."""
    rank = dist.get_rank()
    with ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=case.num_tokens, hidden=case.hidden, num_topk=case.num_topk
    ) as buffer:
        task = make_task(case, make_topk_idx(case), buffer, device=torch.device("cpu"))
        rows = task.run()
        check_results(case, rows, task.expected, rank=rank, whose="the library")
        check_results(case, task.run_baseline(), task.expected, rank=rank, whose="the baseline")
        return len(task.expected.source), len(rows if isinstance(rows, torch.Tensor) else rows[0])


@pytest.mark.parametrize("mode", ["stream", "host"])
@pytest.mark.parametrize(
    ("op", "layout", "dtype"), [each for each in product(OPS, LAYOUTS, DTYPES) if each[::2] != ("combine", "fp8")]
)
def test_library_and_baseline_give_the_rows_that_routing_and_values_imply(rank_pool, op, layout, dtype, mode):
    case = replace(SMALL, op=op, layout=layout, dtype=dtype, mode=mode, expert_alignment=8, imbalance=1.25)
    is_sent = torch.stack([(make_topk_idx(case) // 4 == rank).any(2) for rank in range(2)])
    for rank, (num_real, num_rows) in enumerate(rank_pool(2).run(run_both_sides, case)):
        if op == "combine":
            assert num_real == num_rows == 33
        elif layout == "token":
            assert num_real == int(is_sent[rank].sum())
            # Without a CPU sync a dispatch returns what may come at most.
            assert num_rows == (num_real if mode == "stream" else 2 * 33)
        else:
            assert num_real == int((make_topk_idx(case) // 4 == rank).sum())
            assert num_rows % 8 == 0


def right_rows(case: Case) -> tuple[ExpectedRows, Rows]:
    """What a case must return on rank 0, and a result that is right; bf16 or FP8, token-major."""
    plan = make_plan(case, make_topk_idx(case), rank=0, device=torch.device("cpu"))
    expected = expected_rows(case, plan, rank=0)
    return expected, source_rows(expected.source, case)


def test_row_in_a_wrong_place_is_seen():
    expected, rows = right_rows(SMALL)
    assert isinstance(rows, torch.Tensor)
    assert expected.is_met_by(rows)
    swapped = rows.clone()
    swapped[[7, 8]] = rows[[8, 7]]
    assert not expected.is_met_by(swapped)
    assert not expected.is_met_by(rows[:-1])
    assert not expected.is_met_by(torch.cat([rows, rows[:1]])), "with a CPU sync the size is exact"
    with pytest.raises(DeepEPError, match=r"the library must bring each row to its place .* on rank 3"):
        check_results(SMALL, swapped, expected, rank=3, whose="the library")


def test_wrong_scale_is_seen():
    expected, rows = right_rows(replace(SMALL, dtype="fp8"))
    assert isinstance(rows, tuple)
    payload, scales = rows
    assert expected.is_met_by((payload, scales))
    wrong = scales.clone()
    wrong[3, 1] *= 2
    assert not expected.is_met_by((payload, wrong))


def test_no_two_tokens_have_the_same_row():
    case = replace(SMALL, num_tokens=4096, num_ranks=8, num_experts=16, hidden=64)
    rows = source_rows(torch.arange(8 * 4096), case)
    assert isinstance(rows, torch.Tensor)
    assert len(rows.float().unique(dim=0)) == 8 * 4096


def test_missing_summand_is_seen():
    case = replace(SMALL, op="combine")
    plan = make_plan(case, make_topk_idx(case), rank=1, device=torch.device("cpu"))
    expected = expected_rows(case, plan, rank=1)
    rows = source_rows(torch.arange(33, 66), case)
    assert isinstance(rows, torch.Tensor)
    assert expected.is_met_by(rows * plan.num_summands[:, None])
    assert int(plan.num_summands.max()) == 2
    assert not expected.is_met_by(rows * plan.num_summands.clamp(max=1)[:, None])


def results_of_one_dispatch(case: Case) -> int:
    """On one rank: bytes of what a dispatch returns row by row, as a window has to hold them."""
    with ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=case.num_tokens, hidden=case.hidden, num_topk=case.num_topk
    ) as buffer:
        rows = make_task(case, make_topk_idx(case), buffer, device=torch.device("cpu")).run()
        payload = rows if isinstance(rows, torch.Tensor) else rows[0]
        return payload.nbytes


@pytest.mark.parametrize(("layout", "dtype", "mode"), list(product(LAYOUTS, DTYPES, ["stream", "host"])))
def test_window_has_room_for_the_results_of_the_fullest_rank_and_little_more(rank_pool, layout, dtype, mode):
    case = replace(SMALL, layout=layout, dtype=dtype, mode=mode, expert_alignment=16, imbalance=1.5, hidden=1024)
    fullest = max(rank_pool(2).run(results_of_one_dispatch, case))
    # Beside the rows: at most 64 bytes a token for ids and weights, 32 for scales, and alignment.
    assert fullest < window_result_bytes(case, make_topk_idx(case)) <= fullest + 66 * 96 + 2 * 256


def test_suite_has_a_name_for_each_case_and_patterns_select():
    suite = SUITES["h100x1"]
    cases = suite.select([], num_ranks=4)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.num_ranks for case in cases} == {4}
    assert {case.num_tokens for case in cases} == {4096, 128}
    assert [case.name for case in suite.select(["decode-*-graph"], num_ranks=8)] == [
        "decode-dispatch-graph",
        "decode-combine-graph",
    ]
    with pytest.raises(ConfigError, match=r"called so \(got 'combin' of dispatch,"):
        suite.select(["dispatch", "combin"], num_ranks=8)


def test_nvlink_suite_has_every_work_at_every_number_of_sms_and_any_number_of_ranks():
    suite = SUITES["nvlink"]
    cases = suite.select([], num_ranks=2)
    assert len({case.name for case in cases}) == len(cases) == 36
    works = dict.fromkeys((case.op, case.dtype, case.num_tokens, case.mode) for case in cases)
    assert list(works) == [
        ("dispatch", "bf16", 4096, "stream"),
        ("combine", "bf16", 4096, "stream"),
        ("dispatch", "bf16", 128, "graph"),
        ("combine", "bf16", 128, "graph"),
        ("dispatch", "fp8", 8192, "stream"),
        ("combine", "bf16", 8192, "stream"),
    ]
    assert [case.num_sms for case in suite.select(["large-combine-*"], num_ranks=4)] == [4, 8, 16, 24, 32, 64]


def run_cases(cases: list[Case], *, has_baseline: bool) -> list[tuple[Measurement, int]]:
    """On one rank: measure cases; each measurement, with the number of the buffer that it came from."""
    group = dist.group.WORLD
    assert group is not None
    session = Session(
        group=group,
        host_group=group,
        device=torch.device("cpu"),
        device_of_rank=["cpu"] * dist.get_world_size(),
        backend="auto",
        num_rounds=2,
        num_warmup=1,
        has_baseline=has_baseline,
    )
    runner = CaseRunner(session)
    results = []
    for case in cases:
        measurement = runner.run(case)
        assert runner._buffer is not None
        results.append((measurement, runner._buffer.id))
    runner.close()
    return results


def test_cases_of_one_shape_share_a_buffer_and_a_baseline(rank_pool):
    large = replace(SMALL, layout="expert", expert_alignment=4096)
    cases = [SMALL, replace(SMALL, num_sms=8, name="b"), replace(SMALL, op="combine"), large]
    (first, second, combine, by_expert), _ = rank_pool(2).run(run_cases, cases, has_baseline=True)
    assert first[1] == second[1] == combine[1] != by_expert[1]
    assert first[0].baseline == second[0].baseline
    assert first[0].baseline != combine[0].baseline
    assert first[0].num_bytes == 2 << 20
    assert by_expert[0].num_bytes >= 4 * 4096 * 512, "the rows of 4 local experts"
    assert first[0].window_bytes is None


def test_host_mode_has_no_baseline_and_none_is_run_where_it_is_not_wanted(rank_pool):
    host = replace(SMALL, mode="host")
    assert rank_pool(2).run(run_cases, [host], has_baseline=True)[0][0][0].baseline is None
    assert rank_pool(2).run(run_cases, [SMALL], has_baseline=False)[0][0][0].baseline is None


def test_graph_needs_a_gpu(rank_pool):
    for outcome in rank_pool(2).run_catching(run_cases, [replace(SMALL, mode="graph")], has_baseline=False):
        assert outcome.error_type_name == ConfigError.__name__
        assert "use --device cuda, or --mode stream" in outcome.error_message


def slowest_of_made_up_times() -> list[float]:
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    return slowest_rank_ms([1.5 + rank, 3.0 - rank, 0.25], dist.group.WORLD)


def test_time_of_a_round_is_that_of_its_slowest_rank(rank_pool):
    assert rank_pool(2).run(slowest_of_made_up_times) == [[2.5, 3.0, 0.25]] * 2


def test_barrier_comes_before_each_round_and_warmup_does_not_count():
    events = []
    times_ms = time_rounds(
        lambda: events.append("call"),
        device=torch.device("cpu"),
        barrier=lambda: events.append("barrier"),
        num_rounds=3,
        num_warmup=2,
    )
    assert events == ["barrier", "call"] * 5
    assert len(times_ms) == 3
    assert min(times_ms) >= 0


def test_host_time_is_that_of_each_call_after_the_warmup():
    events = []
    times_ms = time_host_calls(lambda: events.append("call"), device=torch.device("cpu"), num_calls=5, num_warmup=2)
    assert len(times_ms) == 5
    assert events == ["call"] * 7
    assert min(times_ms) >= 0


ARGUMENTS = ["--tokens", "16", "--hidden", "256", "--topk", "4", "--experts", "8", "--device", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experts", "7"], "7 experts must be a multiple of the 2 ranks"),
        (["--tokens", "16,0"], "must be an integer of at least 1 (got '0')"),
        (["--dtype", "fp4"], "must be of bf16, fp8 (got 'fp4')"),
        (["--layout", "row"], "must be of token, expert (got 'row')"),
        (["--mode", "gpu"], "must be of stream, graph, host (got 'gpu')"),
        (["--recv-memory", "heap"], "must be of auto, window, torch (got 'heap')"),
        (["--only", "dispatch"], "pass --suite too"),
        (["--suite", "h100x1"], "--suite has values of its own; leave out --tokens"),
    ],
)
def test_wrong_arguments_are_told_before_any_rank_starts(capsys, monkeypatch, arguments, words):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        bench_main.main([*ARGUMENTS, *arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_ranks_of_a_gpu_are_started_for_it_and_a_suite_knows_their_number(monkeypatch):
    started = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(bench_main, "launch_main", lambda arguments: started.append(arguments) or 7)
    arguments = ["--suite", "h100x1", "--device", "cuda", "--only", "decode-*"]
    assert bench_main.main(arguments) == 7
    assert bench_main.main(["--ranks", "4", "--nodes", "2", "--device", "cpu"]) == 7
    assert started[0] == ["--ranks", "8", "--device", "cuda", "--no-prefix", "-m", "deep_ep_ep.bench", *arguments]
    assert started[1][:6] == ["--ranks", "4", "--nodes", "2", "--device", "cpu"]


def clean_environment() -> dict[str, str]:
    """The environment without what a launcher of the tests themselves would set."""
    return {name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "NCCL_LSA_TEAM_SIZE")}


def run_module(arguments: list[str], *, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean_environment(),
        timeout=240,
        check=False,
    )


def check_record(record: dict, arguments: list[str]) -> None:
    assert list(record) == FIELDS
    assert record["backend"] == "collective"
    assert record["torch"] == torch.__version__
    assert record["command"] == f"python -m deep_ep_ep.bench {' '.join(arguments)}"
    assert (record["num_ranks"], record["num_tokens"], record["hidden"]) == (2, 16, 256)
    assert (record["num_topk"], record["num_experts"]) == (4, 8)
    # None of them is known on a CPU; and the collective backend has no SMs.
    assert (record["driver"], record["nccl"], record["num_sms"]) == (None, None, None)
    assert 0 < record["min_ms"] <= record["median_ms"] <= record["max_ms"]
    assert record["copy_gbs"] > 0
    assert (record["case"], record["recv_memory"], record["window_bytes"]) == (None, None, None)
    assert record["num_bytes"] % (2 << 20) == 0
    if record["mode"] == "host":
        assert (record["floor_ms"], record["ratio_to_floor"], record["baseline_ms"]) == (None, None, None)
        return
    assert record["baseline_ms"] > 0
    assert record["floor_ms"] == pytest.approx(record["bytes_moved"] / record["copy_gbs"] / 1e6)
    assert record["ratio_to_floor"] == pytest.approx(record["median_ms"] / record["floor_ms"])
    case = Case(
        op=record["op"],
        layout=record["layout"],
        dtype=record["dtype"],
        num_ranks=2,
        num_tokens=16,
        hidden=256,
        num_topk=4,
        num_experts=8,
    )
    assert record["bytes_moved"] == total_bytes(case)


def test_ranks_start_by_themselves_and_standard_output_holds_one_json_line_a_case(tmp_path):
    arguments = [*ARGUMENTS, "--ranks", "2", "--nodes", "2", "--layout", "both", "--dtype", "bf16,fp8"]
    arguments += [
        "--ops",
        "dispatch,combine,cached-dispatch",
        "--mode",
        "stream,host",
        "--rounds",
        "3",
        "--warmup",
        "1",
        "--json",
        "-",
    ]
    done = run_module(["deep_ep_ep.bench", *arguments], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    for record in records:
        check_record(record, arguments)
        assert record["num_nodes"] == 2
    measured = {(record["op"], record["layout"], record["dtype"], record["mode"]) for record in records}
    wanted = {
        each for each in product(OPS, LAYOUTS, DTYPES, ["stream", "host"]) if (each[0], each[2]) != ("combine", "fp8")
    }
    assert measured == wanted
    assert len(records) == len(wanted)
    assert max(map(len, done.stderr.splitlines())) <= 120
    rows = [line for line in done.stderr.splitlines() if re.match(r"(cached-)?dispatch |combine ", line)]
    assert len(rows) == len(records)


def test_ranks_of_torchrun_are_joined(tmp_path):
    arguments = [*ARGUMENTS, "--ops", "dispatch", "--rounds", "2", "--warmup", "0", "--json", "records.jsonl"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_module([*torchrun, "-m", "deep_ep_ep.bench", *arguments], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "records.jsonl").read_text().splitlines()
    check_record(json.loads(line), arguments)
    assert sum(row.startswith("dispatch ") for row in done.stdout.splitlines()) == 1


def test_case_that_the_library_refuses_is_told_in_one_sentence(capsys, monkeypatch):
    def refuse(*_: object) -> None:
        raise ConfigError("num_sms must lie in [0, 132] (got 200)")

    monkeypatch.setattr(bench_main, "_run_rank", refuse)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench_main.main(ARGUMENTS) == 1
    assert capsys.readouterr().err == "rank 1: num_sms must lie in [0, 132] (got 200)\n"


def test_number_of_ranks_must_be_that_of_the_launcher(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        bench_main.main([*ARGUMENTS, "--ranks", "4"])
    assert "--ranks must be the number of ranks that the launcher started, 2 (got 4)" in capsys.readouterr().err
