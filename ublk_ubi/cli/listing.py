"""`ublk-ubi list`: one line a disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ublk_ubi.cli.common import UbiCommand, json_option, one_line, print_json, print_table, say
from ublk_ubi.errors import Exit

if TYPE_CHECKING:
    from ublk_ubi.status import Status

EXAMPLES = """
  ublk-ubi list
  ublk-ubi list --json | jq -r '.devices[] | select(.state == "dead") | .name'
"""
KEYS = (
    "name", "device", "link", "id", "pid", "state", "degraded", "size", "image", "base", "stripes",
    "space", "independent", "hydration",
)


@click.command("list", cls=UbiCommand, examples=EXAMPLES)
@json_option
def command(*, as_json: bool) -> int:
    """List the disks of this machine, those whose daemon died included.

    ALLOCATED is the storage that a base takes, HYDRATED what it has of its image, NEEDED what may
    still come, with what is free where that is less.
    """
    from ublk_ubi.runtime import all_devices
    from ublk_ubi.status import status_of_all

    found = status_of_all(all_devices())
    if as_json:
        print_json({"schema": 1, "devices": [_entry(status) for status in found]})
    elif found:
        head = ["NAME", "DEVICE", "STATE", "SIZE", "ALLOCATED", "HYDRATED", "", "NEEDED", "IMAGE",
                "BASE"]
        print_table([head, *(_row(status) for status in found)], right=frozenset(range(3, 8)))
    else:
        say("no disks; `ublk-ubi add` makes one")
    return Exit.OK


def _entry(status: Status) -> dict[str, Any]:
    return {key: getattr(status, key) for key in KEYS}


def _row(status: Status) -> list[str]:
    from ublk_ubi.cli.render import hydrated, needed, state_word
    from ublk_ubi.sizes import human_size

    space = status.space
    allocated = space.allocated if space is not None else None
    return [
        status.name,
        status.device or "-",
        state_word(status),
        human_size(status.size) if status.size is not None else "-",
        human_size(allocated) if allocated is not None else "-",
        human_size(space.hydrated) if space is not None else "-",
        hydrated(status),
        needed(status),
        one_line(status.image or "-"),
        one_line(status.base or "-"),
    ]
