"""Owns the catching of what a module logs: why a link rate is unknown is said there, and only there."""

from __future__ import annotations

import logging

__all__ = ["LoggedWarnings"]


class LoggedWarnings(logging.Handler):
    """Collects what a logger says within a `with` block, instead of letting it through.

    Args:
        logger_name: The logger.

    Attributes:
        messages: What was said.
    """

    def __init__(self, logger_name: str) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._logger = logging.getLogger(logger_name)
        self._did_propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message; called by `logging`."""
        self.messages.append(record.getMessage())

    def __enter__(self) -> LoggedWarnings:
        self._did_propagate, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._did_propagate
