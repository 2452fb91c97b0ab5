"""`ublk-ubi upgrade`: moves disks to the installed version."""

from __future__ import annotations

import click

from ublk_ubi.cli.common import UbiCommand, complete_name, json_option, one_line, print_json, say
from ublk_ubi.errors import Exit, UbiError

EXAMPLES = """
  ublk-ubi upgrade vm1
  ublk-ubi upgrade -a
"""


@click.command(cls=UbiCommand, examples=EXAMPLES)
@click.argument("target", metavar="[NAME]", required=False, shell_complete=complete_name)
@click.option("-a", "--all", "everything", is_flag=True, help="All disks that are served.")
@json_option
def command(*, target: str | None, everything: bool, as_json: bool) -> int:
    """Move disks to the version of ublk-ubi that is installed, while they are in use.

    The new daemon is loaded before the old one leaves, and requests wait in between, for some
    hundredths of a second. If it does not come up, the old daemon goes on.
    """
    from ublk_ubi.links import resolve
    from ublk_ubi.recovery import upgrade
    from ublk_ubi.runtime import all_devices

    if everything == (target is not None):
        raise click.UsageError("give a NAME, or -a for all")
    devices = [resolve(target)] if target is not None else [
        device for device in all_devices() if device.alive and not device.starting
    ]
    errors: list[UbiError] = []
    done = []
    for device in devices:
        try:
            ready, pause_s = upgrade(device)
        except UbiError as error:
            errors.append(error)
            continue
        rounded = round(pause_s, 3) if pause_s is not None else None
        done.append({"name": ready.name, "pid": ready.pid, "pause_s": rounded})
        if not as_json:
            how = f"requests waited {pause_s:.2f} s" if pause_s is not None else "by its unit"
            say(f"{ready.name} upgraded: process {ready.pid}, {how}")
    if as_json:
        print_json({"schema": 1, "upgraded": done})
    for other in errors[1:]:
        click.echo(f"ublk-ubi: {one_line(other.message)}", err=True)
    if errors:
        raise errors[0]
    return Exit.OK
