"""Which lines of the engines ran: gcov's counts in a build of its own.

A worker of that build writes its counts when it ends. gcov tells them by lines of C; which line of
an engine each belongs to is said by the comment that Cython puts before every statement.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sim.builder import ENGINE_SOURCES, ENGINES, Build, Variant, build

if TYPE_CHECKING:
    from collections.abc import Iterator


MARKER = re.compile(r'\s*/\* "(.+)":(\d+)$')


@dataclass
class Lines:
    """Lines that can run, by engine, and how often each did."""

    counts: dict[str, dict[int, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Lines that can run."""
        return sum(len(counts) for counts in self.counts.values())

    @property
    def covered(self) -> int:
        """Lines that did."""
        return sum(sum(map(bool, counts.values())) for counts in self.counts.values())

    @property
    def percent(self) -> float:
        """Of the lines that can run."""
        return 100 * self.covered / self.total if self.total else 0.0

    def missing(self) -> Iterator[tuple[str, int, str]]:
        """Lines that did not: file, number, text."""
        for name, counts in sorted(self.counts.items()):
            text = (ENGINE_SOURCES / name).read_text().splitlines()
            for number, count in sorted(counts.items()):
                if not count:
                    yield name, number, text[number - 1].strip()


class Counter:
    """A build whose workers count lines, and the folder that they write to."""

    def __init__(self, folder: Path) -> None:
        self.build: Build = build(Variant(lines=True))
        self._folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """What a worker must be started with."""
        return {"GCOV_PREFIX": str(self._folder)}

    def lines(self) -> Lines:
        """Count what all workers that have ended ran."""
        lines = Lines()
        for engine in ENGINES:
            data = list(self._folder.rglob(f"{engine}.gcda"))
            if data:
                self._read(lines, engine, data[0])
        return lines

    def _read(self, lines: Lines, engine: str, data: Path) -> None:
        """One module's counts; the lines of its own .pyx alone."""
        module = self.build.modules[f"ublk_ubi/{engine}"] / "ublk_ubi"
        shutil.copy(module / f"{engine}.gcno", data.with_suffix(".gcno"))
        belongs = _lines_of_c((module / f"{engine}.c").read_text(), f"ublk_ubi/{engine}.pyx")
        done = subprocess.run(["gcov", "--json-format", "--stdout", data.name], cwd=data.parent,
                              capture_output=True, check=True)
        text = done.stdout if done.stdout[:2] != b"\x1f\x8b" else gzip.decompress(done.stdout)
        counts = lines.counts.setdefault(f"{engine}.pyx", {})
        for file in json.loads(text)["files"]:
            if not file["file"].endswith(f"{engine}.c"):
                continue
            for line in file["lines"]:
                number = belongs.get(line["line_number"])
                if number:
                    counts[number] = max(counts.get(number, 0), line["count"])


def _lines_of_c(text: str, source: str) -> dict[int, int]:
    """By line of C: the line of `source` whose statement it is a part of."""
    belongs = {}
    current = 0
    for number, line in enumerate(text.splitlines(), 1):
        if marker := MARKER.match(line):
            current = int(marker[2]) if marker[1] == source else 0
        elif line.startswith("}"):
            current = 0
        elif current:
            belongs[number] = current
    return belongs


@contextmanager
def counting() -> Iterator[Counter]:
    """Build, and make room for the counts."""
    with tempfile.TemporaryDirectory(prefix="simulate-") as folder:
        yield Counter(Path(folder))
