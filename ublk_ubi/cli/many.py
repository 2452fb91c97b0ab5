"""What commands on one disk or on all have in common: which disks, and how it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ublk_ubi.cli.common import one_line, print_json, say
from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi.runtime import Device


def chosen(
    target: str | None, *, everything: bool, which: Callable[[Device], bool],
) -> list[Device]:
    """Return the disk that was named, or with `everything` all that `which` is true of.

    Raises UsageError when it is neither or both, UbiError when there is no such disk.
    """
    from ublk_ubi.links import resolve
    from ublk_ubi.runtime import all_devices

    if everything == (target is not None):
        raise click.UsageError("give a NAME, or -a for all")
    if target is not None:
        return [resolve(target)]
    return [device for device in all_devices() if which(device)]


def do_each(
    devices: list[Device],
    work: Callable[[Device], tuple[dict[str, Any], str]],
    *,
    done: str,
    as_json: bool,
) -> int:
    """Do `work` to each disk; it gives what --json lists under `done`, and the line to print.

    One that fails holds up no other. Raises the first error when all is done.
    """
    rows: list[dict[str, Any]] = []
    errors: list[UbiError] = []
    for device in devices:
        try:
            row, line = work(device)
        except UbiError as error:
            errors.append(error)
            continue
        rows.append(row)
        if not as_json:
            say(line)
    return tell_end({done: rows}, errors, as_json=as_json)


def tell_end(answer: dict[str, Any], errors: list[UbiError], *, as_json: bool) -> int:
    """Print the answer as JSON, and every error but the first, which is raised."""
    if as_json:
        print_json({"schema": 1, **answer})
    for other in errors[1:]:
        click.echo(f"ublk-ubi: {one_line(other.message)}", err=True)
    if errors:
        raise errors[0]
    return Exit.OK
