"""`ublk-ubi recover`: brings back disks whose daemons died."""

from __future__ import annotations

import click

from ublk_ubi.cli.common import UbiCommand, complete_name, json_option, one_line, print_json, say
from ublk_ubi.errors import Exit, UbiError

EXAMPLES = """
  ublk-ubi recover vm1
  ublk-ubi recover -a
"""


@click.command(cls=UbiCommand, examples=EXAMPLES)
@click.argument("target", metavar="[NAME]", required=False, shell_complete=complete_name)
@click.option("-a", "--all", "everything", is_flag=True, help="All disks whose daemons died.")
@json_option
def command(*, target: str | None, everything: bool, as_json: bool) -> int:
    """Bring back disks whose daemons died or left; no request fails, no completed write is lost.

    Waits until the last writes of the dead daemon have landed, at most as long as the disk's
    --fence-timeout says.
    """
    from ublk_ubi.links import resolve
    from ublk_ubi.recovery import recover
    from ublk_ubi.runtime import all_devices

    if everything == (target is not None):
        raise click.UsageError("give a NAME, or -a for all")
    devices = [resolve(target)] if target is not None else [
        device for device in all_devices()
        if not device.alive and device.state is not None and device.state.recoverable
    ]
    errors: list[UbiError] = []
    done = []
    for device in devices:
        try:
            ready = recover(device)
        except UbiError as error:
            errors.append(error)
            continue
        done.append({"name": ready.name, "link": ready.link, "pid": ready.pid})
        if not as_json:
            say(ready.link)
    if as_json:
        print_json({"schema": 1, "recovered": done})
    for other in errors[1:]:
        click.echo(f"ublk-ubi: {one_line(other.message)}", err=True)
    if errors:
        raise errors[0]
    return Exit.OK
