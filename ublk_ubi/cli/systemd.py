"""`ublk-ubi systemd`: the files by which systemd and udev know of disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ublk_ubi.cli.common import UbiCommand, UbiGroup, json_option, print_json, say
from ublk_ubi.errors import Exit

if TYPE_CHECKING:
    from ublk_ubi.host_files import Change

EXAMPLES = """
  ublk-ubi systemd install                   then: systemctl enable --now ublk-ubi@vm1
  ublk-ubi systemd uninstall
"""
INSTALL_EXAMPLES = """
  ublk-ubi systemd install
  ublk-ubi systemd install --max-disks 1024
  ublk-ubi systemd install --root /srv/golden-host --json
"""
UNINSTALL_EXAMPLES = """
  ublk-ubi systemd uninstall
"""

root_option = click.option(
    "--root", metavar="DIR", default="/",
    help="Of a system that is not running, mounted there; nothing is reloaded.",
)


@click.group("systemd", cls=UbiGroup, examples=EXAMPLES)
def command() -> None:
    """Let systemd serve the disks of /etc/ublk-ubi, and udev leave guests' content alone.

    /etc/ublk-ubi/NAME.json holds what `add --config` takes; ublk-ubi@NAME.service serves that disk.
    Its daemon is started again when it dies, and its users notice nothing; `systemctl restart` and
    `reload` move it to the installed version; `systemctl stop` deletes a disk that nobody uses,
    and leaves one that is in use waiting for the next `start`.
    """


@command.command(cls=UbiCommand, examples=INSTALL_EXAMPLES)
@root_option
@click.option(
    "--max-disks", type=click.IntRange(1, 1 << 20), metavar="N",
    help="Let the driver have so many (ublks_max): kernels before 6.15 stop at 64.",
)
@json_option
def install(*, root: str, max_disks: int | None, as_json: bool) -> int:
    """Write the unit, the generator of its dependencies, udev's rules and modules-load.d.

    Again after an upgrade of Python, or when the package has moved: what is there is brought up to
    date. The files name this very installation.
    """
    from ublk_ubi import host_files

    return _show(host_files.install(root, max_disks=max_disks), as_json=as_json)


@command.command(cls=UbiCommand, examples=UNINSTALL_EXAMPLES)
@root_option
@json_option
def uninstall(*, root: str, as_json: bool) -> int:
    """Remove what `install` wrote, and the links by which disks start with the host.

    Refused (exit code 5) while there are disks. What is in /etc/ublk-ubi stays.
    """
    from ublk_ubi import host_files

    return _show(host_files.uninstall(root), as_json=as_json)


def _show(changes: list[Change], *, as_json: bool) -> int:
    if as_json:
        print_json({"schema": 1, "files": changes})
        return Exit.OK
    for change in changes:
        say(f"{change.action:<10}{change.path}")
    if not changes:
        say("nothing to remove")
    return Exit.OK
