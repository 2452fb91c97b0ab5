"""`ublk-ubi recover`: brings back disks whose daemons died."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ublk_ubi.cli.common import UbiCommand, complete_name, json_option

if TYPE_CHECKING:
    from ublk_ubi.runtime import Device

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
    from ublk_ubi.cli.many import chosen, do_each
    from ublk_ubi.recovery import recover

    def work(device: Device) -> tuple[dict[str, Any], str]:
        ready = recover(device)
        return {"name": ready.name, "link": ready.link, "pid": ready.pid}, ready.link

    devices = chosen(target, everything=everything, which=_waits)
    return do_each(devices, work, done="recovered", as_json=as_json)


def _waits(device: Device) -> bool:
    return not device.alive and device.state is not None and device.state.recoverable
