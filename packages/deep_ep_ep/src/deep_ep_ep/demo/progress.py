"""Owns how the training is shown while it runs: a bar, plain lines, or lines that another process draws a bar from.

The ranks that the demo starts have pipes for output, so a bar that one of them drew would arrive in pieces. Rank 0
writes one line a step instead, and the process that started it, which has the terminal, draws the bar.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from typing import Any, Protocol, TextIO

from deep_ep_ep.demo.train import StepReport

__all__ = ["BarProgress", "PlainProgress", "Progress", "RelayProgress", "RelayedOutput"]

_NUM_PLAIN_LINES = 15
# A control character (record separator) that no line of text starts with.
_RELAY_MARK = "\x1e"
# Room for the figures on a terminal of 80 columns.
_BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class Progress(Protocol):
    """Something that shows the training."""

    def __call__(self, report: StepReport) -> None:
        """Show a step that was done."""
        ...


class PlainProgress:
    """Prints a line every few steps; for logs."""

    def __call__(self, report: StepReport) -> None:
        """See `Progress`."""
        every = max(1, report.num_steps // _NUM_PLAIN_LINES)
        if report.step == 1 or report.step % every == 0 or report.step == report.num_steps:
            print(f"step {report.step:4d}/{report.num_steps}  {_describe(report)}", flush=True)


class BarProgress:
    """Draws a bar on a terminal, and closes it after the last step."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._bar: Any = None

    def __call__(self, report: StepReport) -> None:
        """See `Progress`."""
        if self._bar is None:
            from tqdm import tqdm

            # Not dynamic_ncols: a terminal that does not know its width would get an empty bar.
            num_columns = shutil.get_terminal_size().columns
            self._bar = tqdm(total=report.num_steps, file=self._terminal, ncols=num_columns, bar_format=_BAR_FORMAT)
        losses = f"loss {report.loss:.3f}, unsharded {report.unsharded_loss:.3f}"
        self._bar.set_postfix_str(f"{losses}, {report.tokens_per_s:,.0f} tokens/s", refresh=False)
        self._bar.update(report.step - self._bar.n)
        if report.step == report.num_steps:
            self._bar.close()


class RelayProgress:
    """Prints a line a step for `RelayedOutput`."""

    def __call__(self, report: StepReport) -> None:
        """See `Progress`."""
        print(_RELAY_MARK + json.dumps(dataclasses.asdict(report)), flush=True)


class RelayedOutput(io.TextIOBase):
    """Takes the output of the ranks: progress lines go to a bar, the others to the terminal."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._progress = BarProgress(terminal)
        self._rest = ""

    def writable(self) -> bool:
        """Always True."""
        return True

    def write(self, text: str) -> int:
        """Pass on the lines that are complete."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.startswith(_RELAY_MARK):
                self._progress(StepReport(**json.loads(line.removeprefix(_RELAY_MARK))))
            else:
                self._terminal.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        """Flush the terminal."""
        self._terminal.flush()


def _describe(report: StepReport) -> str:
    return (
        f"loss {report.loss:.4f} (unsharded {report.unsharded_loss:.4f})  "
        f"{report.tokens_per_s:,.0f} tokens/s (unsharded {report.unsharded_tokens_per_s:,.0f})  "
        f"busiest expert {report.max_load:.1f}x"
    )
