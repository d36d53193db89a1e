"""Owns what the multi-GPU run says: how the output of its parts reads, rates against the peer-copy ceiling, the table.

It runs nothing. Whatever a part did not tell is left blank; nothing is made up.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_parts import Part
from one_rank_a_gpu import OTHER_NUMBER

from deep_ep_ep.bench.cases import Case, make_topk_idx
from deep_ep_ep.traffic import combine_traffic, dispatch_traffic

Record = dict[str, Any]

_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9
_BYTES_PER_MIB = 1 << 20
_NUM_TAIL_LINES = 15
# Of a test that failed; all of it is in the JSON.
_MAX_REASON_CHARS = 250


@dataclass(slots=True, kw_only=True)
class PartResult:
    """What came of a part.

    Attributes:
        part: The part.
        status: `ok`, `failed`, `too long`, `not there`, or `left out`.
        seconds: How long it ran.
        reason: More of it, if it is not `ok`.
        records: Its JSON lines.
        tail: The end of its output, if it went wrong.
    """

    part: Part
    status: str
    seconds: float = 0.0
    reason: str = ""
    records: list[Record] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def parse_lines(text: str) -> list[Record]:
    """The JSON objects among the lines of a text; the last line of a program that was ended may be torn."""
    records = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            records.append(record)
    return records


def tail_of(*texts: str) -> list[str]:
    """The last lines of each text."""
    return [line for text in texts for line in text.rstrip().splitlines()[-_NUM_TAIL_LINES:]]


def ceiling_gbs(copies: Iterable[Record]) -> float | None:
    """The fastest rate at which all GPUs of a pattern send and receive at once; None without a measurement."""
    rates = [float(copy["each_way_gbs"]) for copy in copies if copy["pattern"] != "one-way"]
    return max(rates, default=None)


def add_link_rates(record: Record, ceiling: float | None) -> Record:
    """An EP record with what crossed the links of the busiest GPU: rows between ranks, each with a GPU of its own.

    Bytes are those of rows, scales included, and not of ids, weights and counts. `share_of_copy` holds the busier
    direction against the ceiling.
    """
    num_out, num_in = _busiest_rows(
        record["op"] == "combine",
        record["num_ranks"],
        record["num_tokens"],
        record["num_topk"],
        record["num_experts"],
    )
    row_bytes = _case_of(record).row_bytes
    gbs = [num * row_bytes / record["median_ms"] * _MS_PER_S / _BYTES_PER_GB for num in (num_out, num_in)]
    baseline_ms = record["baseline_ms"]
    return {
        **record,
        "link_bytes_out": num_out * row_bytes,
        "link_bytes_in": num_in * row_bytes,
        "link_gbs_out": gbs[0],
        "link_gbs_in": gbs[1],
        "share_of_copy": max(gbs) / ceiling if ceiling else None,
        "speedup_over_all_to_all": baseline_ms / record["median_ms"] if baseline_ms else None,
    }


def add_bench_rates(record: Record, ceiling: float | None) -> Record:
    """A record of CP or PP with what crossed the links of a GPU each way, against the ceiling."""
    num_bytes, median_ms, baseline_ms = (
        _link_bytes_each_way(record),
        record.get("median_ms"),
        record.get("baseline_ms"),
    )
    gbs = num_bytes / median_ms * _MS_PER_S / _BYTES_PER_GB if num_bytes is not None and median_ms else None
    return {
        **record,
        "link_bytes": num_bytes,
        "link_gbs": gbs,
        "share_of_copy": gbs / ceiling if gbs is not None and ceiling else None,
        "speedup_over_torch": baseline_ms / median_ms if baseline_ms and median_ms else None,
    }


def outcome_counts(outcomes: Iterable[Record]) -> dict[str, int]:
    """Tests by outcome; those for another number of ranks are counted by themselves."""
    counts: Counter[str] = Counter()
    for line in outcomes:
        is_other = line["outcome"] == "skipped" and line["reason"].startswith(OTHER_NUMBER)
        counts["other number" if is_other else line["outcome"]] += 1
    return {name: counts[name] for name in ("passed", "failed", "skipped", "other number")}


def render(results: Sequence[PartResult], *, head: str) -> str:
    """The table of a run."""
    ceiling = ceiling_gbs(_records_of(results, "peer-copy"))
    lines = [head, ""]
    for kind, table in (("peer-copy", _copy_table), ("ep", _ep_table), ("bench", _bench_table), ("tests", _test_table)):
        found = [result for result in results if result.part.kind == kind and result.records]
        if found:
            lines += [*table(found, ceiling), ""]
    wrong = [result for result in results if result.status != "ok"]
    lines += [f"{result.part.name}: {result.status}{': ' * bool(result.reason)}{result.reason}" for result in wrong]
    for result in wrong:
        lines += [f"--- end of {result.part.name}", *result.tail] if result.tail else []
    if not wrong:
        lines.append("every part ran and was ok")
    return "\n".join(lines)


def to_json(results: Sequence[PartResult], facts: Mapping[str, Any]) -> str:
    """All of a run."""
    ceiling = ceiling_gbs(_records_of(results, "peer-copy"))
    parts = [
        {
            "name": result.part.name,
            "status": result.status,
            "seconds": round(result.seconds, 1),
            "reason": result.reason,
            "command": list(result.part.command),
            "records": _told(result, ceiling),
            "tail": result.tail,
        }
        for result in results
    ]
    return json.dumps({**facts, "ceiling_gbs": ceiling, "parts": parts}, indent=1)


def _told(result: PartResult, ceiling: float | None) -> list[Record]:
    if result.part.kind == "ep":
        return [add_link_rates(record, ceiling) for record in result.records]
    if result.part.kind == "bench":
        return [add_bench_rates(record, ceiling) for record in result.records]
    return result.records


def _records_of(results: Iterable[PartResult], kind: str) -> list[Record]:
    return [record for result in results if result.part.kind == kind for record in result.records]


def _case_of(record: Record) -> Case:
    return Case(
        op=record["op"],
        layout=record["layout"],
        dtype=record["dtype"],
        num_ranks=record["num_ranks"],
        num_tokens=record["num_tokens"],
        hidden=record["hidden"],
        num_topk=record["num_topk"],
        num_experts=record["num_experts"],
    )


@functools.cache
def _busiest_rows(
    is_combine: bool, num_ranks: int, num_tokens: int, num_topk: int, num_experts: int
) -> tuple[int, int]:
    """Most rows that leave a rank, and most that come to one."""
    case = Case(
        op="dispatch",
        layout="token",
        dtype="bf16",
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        hidden=8,
        num_topk=num_topk,
        num_experts=num_experts,
    )
    traffic_of = combine_traffic if is_combine else dispatch_traffic
    traffic = traffic_of(make_topk_idx(case), num_experts=num_experts, num_scaleup_ranks=num_ranks, is_hybrid=False)
    return int(traffic.nvlink.num_sent().max()), int(traffic.nvlink.num_received().max())


def _copy_table(results: Sequence[PartResult], _: float | None) -> list[str]:
    copies = [record for result in results for record in result.records]
    rates = ", ".join(f"{copy['pattern']} {copy['each_way_gbs']:g}" for copy in copies)
    access = {copy.get("has_peer_access") for copy in copies}
    note = " (no peer access: through the host)" if access == {False} else ""
    return [f"peer copies, GB/s each way: {rates}{note}"]


def _ep_table(results: Sequence[PartResult], ceiling: float | None) -> list[str]:
    records = [add_link_rates(record, ceiling) for result in results for record in result.records]
    rows = [
        (
            record["case"] or f"{record['op']}-{record['num_tokens']}-{record['dtype']}",
            _shown(record["num_sms"]),
            _shown(record["median_ms"]),
            _shown(record["link_gbs_out"]),
            _shown(record["link_gbs_in"]),
            _percent(record["share_of_copy"]),
            _shown(record["baseline_ms"]),
            _shown(record["speedup_over_all_to_all"]),
        )
        for record in records
    ]
    backends = ", ".join(sorted({record["backend"] for record in records}))
    title = f"dispatch and combine, backend {backends}; % of the peer copies; torch: all_to_all_single in the same run"
    head = ("case", "SMs", "ms", "GB/s out", "GB/s in", "% copy", "torch ms", "x torch")
    return [title, *_aligned([head, *rows])]


def _bench_table(results: Sequence[PartResult], ceiling: float | None) -> list[str]:
    rows = [("bench", "backend", "ms", "GB/s", "% copy", "torch ms", "x torch")]
    for result in results:
        for record in (add_bench_rates(record, ceiling) for record in result.records):
            rows.append(
                (
                    f"{result.part.name.removesuffix(' bench')} {_name_of(record)}",
                    record.get("backend") or "",
                    _shown(record.get("median_ms")),
                    _shown(record["link_gbs"]),
                    _percent(record["share_of_copy"]),
                    _shown(record.get("baseline_ms")),
                    _shown(record["speedup_over_torch"]),
                )
            )
    return _aligned(rows)


def _test_table(results: Sequence[PartResult], _: float | None) -> list[str]:
    rows = [("GPU tests", "passed", "failed", "skipped", "other number of ranks", "s")]
    failures = []
    for result in results:
        counts = outcome_counts(result.records)
        package = result.part.name.removeprefix("tests of ")
        rows.append((package, *map(str, counts.values()), f"{result.seconds:.0f}"))
        failures += [
            f"failed: {line['test']}: {line['reason'][:_MAX_REASON_CHARS]}"
            for line in result.records
            if line["outcome"] == "failed"
        ]
    return [*_aligned(rows), *failures]


def _name_of(record: Record) -> str:
    """What a record of CP or PP is of: the operation, and the size that it is measured by."""
    num_bytes = record.get("slot_bytes", record.get("message_bytes"))
    size = "" if num_bytes is None else f" {num_bytes / _BYTES_PER_MIB:g} MiB"
    return f"{record.get('op', '?')}{size}"


def _link_bytes_each_way(record: Record) -> int | None:
    """What a call of CP or PP sends from each GPU, which is what comes to it too; None for what is not known here."""
    op = record.get("op")
    if op in ("all_gather", "all_gather_in_place", "reduce_scatter"):
        # A slot for each other rank.
        return int(record["slot_bytes"] * (record["num_ranks"] - 1))
    if op in ("ring", "both") and record.get("mode") != "host":
        return int(record["message_bytes"] * (1 if op == "ring" else 2))
    return None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def _shown(value: float | None) -> str:
    """Three digits, or all before the point where there are more."""
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with columns of one width: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
