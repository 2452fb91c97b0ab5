"""What a report of the plugin's own has for its traceback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Crash:
    """Where, and what in a line: what pytest's summary shows."""

    path: str
    lineno: int
    message: str


class Failure:
    """Words; their first line is for the summary."""

    def __init__(self, path: str, line: int, words: str) -> None:
        self.words = words
        self.reprcrash = Crash(path, line, words.partition("\n")[0])

    def __str__(self) -> str:
        return self.words

    def toterminal(self, terminal: Any) -> None:
        """Write the words as pytest writes a traceback."""
        for line in self.words.splitlines():
            terminal.line(line, red=True)
