"""Which tests go to which guest: the longest first; a file that takes long is split among some.

Those of a file that ask for other numbers of processors (`cpus`) go to guests of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SHARD_S = 60.0  # a guest's start takes some three seconds
# For a test that has never been run: two seconds, or a part of the limit that it asks for.
GUESS_S = 2.0
GUESS_OF_LIMIT = 0.2


CPUS = 1
"""Where a test asks for no more. In user-mode Linux a second one costs more than it gives."""


@dataclass(frozen=True)
class Shard:
    """Tests of one file, for one guest."""

    number: int
    path: str  # of the file, as node ids name it
    items: tuple[pytest.Item, ...]
    known: frozenset[str] | None  # all that the file has; None: this session has not seen them all
    arguments: tuple[str, ...]  # what the guest's pytest is to collect
    cpus: int


def make_shards(
    config: pytest.Config,
    items: list[pytest.Item],
    known: dict[Path, list[str]],
    seconds: dict[str, float],
) -> list[Shard]:
    """Divide the tests; `seconds` says what each has taken before."""
    alike: dict[tuple[Path, int], list[pytest.Item]] = {}
    for item in items:
        alike.setdefault((item.path, cpus_for(item)), []).append(item)
    parts = [part for group in alike.values() for part in _split(group, seconds)]
    parts.sort(key=lambda part: sum(_cost(item, seconds) for item in part), reverse=True)
    whole = not config.getoption("lf", default=False)
    return [
        Shard(
            number=number,
            path=part[0].nodeid.partition("::")[0],
            items=tuple(part),
            known=frozenset(known[part[0].path]) if whole else None,
            arguments=_arguments(config, part[0].path),
            cpus=cpus_for(part[0]),
        )
        for number, part in enumerate(parts)
    ]


def cpus_for(item: pytest.Item) -> int:
    """How many processors a test's guest has."""
    marker = item.get_closest_marker("cpus")
    return int(marker.args[0]) if marker else CPUS


def _cost(item: pytest.Item, seconds: dict[str, float]) -> float:
    limit = item.get_closest_marker("limit")
    guess = max(GUESS_S, limit.args[0] * GUESS_OF_LIMIT) if limit and limit.args else GUESS_S
    return seconds.get(item.nodeid, guess)


def _split(items: list[pytest.Item], seconds: dict[str, float]) -> list[list[pytest.Item]]:
    """Cut a file into parts of some SHARD_S each, in order."""
    parts: list[list[pytest.Item]] = [[]]
    cost = 0.0
    for item in items:
        more = _cost(item, seconds)
        if parts[-1] and cost + more > SHARD_S:
            parts.append([])
            cost = 0.0
        parts[-1].append(item)
        cost += more
    return parts


def _arguments(config: pytest.Config, path: Path) -> tuple[str, ...]:
    """What this session's arguments say of the file: tests in it, or all of it."""
    narrow = []
    for argument in config.args:
        name, _, rest = argument.partition("::")
        place = (config.invocation_params.dir / name).resolve()
        if place == path and rest:
            narrow.append(argument)
        elif path.is_relative_to(place):
            return (str(path),)
    return tuple(narrow) or (str(path),)
