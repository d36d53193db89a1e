"""Owns the command line `python -m deep_ep_core.doctor`: what this machine can do, what is missing, what to install."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deep_ep_core.doctor.examine import DEFAULT_TIMEOUT_S, examine

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at this machine and print a report.

    Args:
        arguments: The command line, without the program's name; None takes that of the process.

    Returns:
        The exit status: 0 if the device backend can run here or there is no GPU, 1 if something that it needs is
        missing or unknown though there is a GPU; with --require-device 1 unless it can run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m deep_ep_core.doctor",
        description="What this machine can do for the deep-ep packages, what is missing, and what to install.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-gpu", action="store_true", help="do not touch the driver or CUDA")
    parser.add_argument("--require-device", action="store_true", help="exit 1 unless the device backend can run")
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds that looking at the GPUs may take (default: %(default)g)",
    )
    parsed = parser.parse_args(arguments)
    report = examine(is_gpu_allowed=not parsed.no_gpu, timeout_s=parsed.timeout)
    if parsed.json:
        print(report.json_text(is_device_required=parsed.require_device))
    else:
        print(report.text(), end="")
    return report.exit_status(is_device_required=parsed.require_device)


if __name__ == "__main__":
    sys.exit(main())
