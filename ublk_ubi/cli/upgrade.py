"""`ublk-ubi upgrade`: moves disks to the installed version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ublk_ubi.cli.common import UbiCommand, complete_name, json_option

if TYPE_CHECKING:
    from ublk_ubi.runtime import Device

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
    from ublk_ubi.cli.many import chosen, do_each
    from ublk_ubi.recovery import upgrade

    def work(device: Device) -> tuple[dict[str, Any], str]:
        ready, pause_s = upgrade(device)
        rounded = round(pause_s, 3) if pause_s is not None else None
        how = f"requests waited {pause_s:.2f} s" if pause_s is not None else "by its unit"
        row = {"name": ready.name, "pid": ready.pid, "pause_s": rounded}
        return row, f"{ready.name} upgraded: process {ready.pid}, {how}"

    devices = chosen(target, everything=everything, which=_is_served)
    return do_each(devices, work, done="upgraded", as_json=as_json)


def _is_served(device: Device) -> bool:
    return device.alive and not device.starting
