"""Owns the named suites of cases: those that are measured again and again, so that results can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from deep_ep_core.errors import ConfigError
from deep_ep_ep.bench.cases import Case

__all__ = ["SUITES", "Suite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Cases with names.

    Attributes:
        num_ranks: Ranks that it is made for; it can run on others.
        cases: The cases, for that many ranks.
    """

    num_ranks: int
    cases: Sequence[Case]

    def select(self, patterns: Sequence[str], *, num_ranks: int) -> list[Case]:
        """The cases whose names match some pattern (`*` for anything), in the order of the suite; all without patterns.

        Raises:
            ConfigError: A pattern matches none, or the cases do not fit the number of ranks.
        """
        names = [case.name for case in self.cases]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"the suite must have a case that is called so (got {pattern!r} of {', '.join(names)})"
                )
        return [
            replace(case, num_ranks=num_ranks)
            for case in self.cases
            if not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns)
        ]


def _h100x1() -> Suite:
    prefill = Case(
        op="dispatch",
        layout="token",
        dtype="bf16",
        num_ranks=8,
        num_tokens=4096,
        hidden=7168,
        num_topk=8,
        num_experts=256,
        num_sms=16,
        recv_memory="window",
        name="dispatch",
    )
    combine = replace(prefill, op="combine", name="combine")
    decode = replace(prefill, num_tokens=128, name="decode-dispatch")
    decode_combine = replace(decode, op="combine", name="decode-combine")
    # Neighbours share a buffer where they can.
    return Suite(
        num_ranks=8,
        cases=(
            prefill,
            replace(prefill, num_sms=8, name="dispatch-8sms"),
            combine,
            replace(combine, num_sms=8, name="combine-8sms"),
            replace(prefill, dtype="fp8", name="dispatch-fp8"),
            replace(prefill, layout="expert", expert_alignment=128, name="dispatch-expert"),
            replace(combine, layout="expert", expert_alignment=128, name="combine-expert"),
            replace(prefill, recv_memory="torch", name="dispatch-torch"),
            replace(combine, recv_memory="torch", name="combine-torch"),
            decode,
            decode_combine,
            replace(decode, mode="host", name="decode-dispatch-host"),
            replace(decode_combine, mode="host", name="decode-combine-host"),
            replace(decode, mode="graph", name="decode-dispatch-graph"),
            replace(decode_combine, mode="graph", name="decode-combine-graph"),
        ),
    )


# From where a few SMs still leave links idle to where more of them gain nothing.
_NVLINK_NUM_SMS = (4, 8, 16, 24, 32, 64)


def _nvlink() -> Suite:
    """Three amounts of tokens, each at every number of SMs. Neighbours share a buffer, and a baseline."""
    dispatch = Case(
        op="dispatch",
        layout="token",
        dtype="bf16",
        num_ranks=8,
        num_tokens=4096,
        hidden=7168,
        num_topk=8,
        num_experts=256,
        recv_memory="window",
        name="dispatch",
    )
    combine = replace(dispatch, op="combine", name="combine")
    decode = replace(dispatch, num_tokens=128, mode="graph", name="decode-dispatch")
    decode_combine = replace(decode, op="combine", name="decode-combine")
    large = replace(dispatch, num_tokens=8192, dtype="fp8", name="large-dispatch-fp8")
    large_combine = replace(combine, num_tokens=8192, name="large-combine")
    kinds = (dispatch, combine, decode, decode_combine, large, large_combine)
    return Suite(
        num_ranks=8,
        cases=[
            replace(kind, num_sms=num_sms, name=f"{kind.name}-{num_sms}sms")
            for kind in kinds
            for num_sms in _NVLINK_NUM_SMS
        ],
    )


SUITES = {"h100x1": _h100x1(), "nvlink": _nvlink()}
"""By name.

`h100x1`: 8 ranks that share one 80 GB GPU of 132 SMs, prefill (4096 tokens a rank) and decode (128).
`nvlink`: one rank a GPU; 4096 tokens, 128 tokens in a CUDA graph, and 8192 tokens whose dispatch is in FP8 and whose
combine in bfloat16; each at 4, 8, 16, 24, 32 and 64 SMs.
"""
