"""`ublk-ubi wait`: until a disk needs its image no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ublk_ubi.cli.common import Seconds, UbiCommand, complete_name, json_option, print_json
from ublk_ubi.errors import Exit

if TYPE_CHECKING:
    from ublk_ubi.runtime import Device

EXAMPLES = """
  ublk-ubi wait vm1
  ublk-ubi wait vm1 --timeout 600 || ublk-ubi status vm1
  ublk-ubi wait vm1 --json | jq .space.allocated
"""


@click.command("wait", cls=UbiCommand, examples=EXAMPLES)
@click.argument("target", metavar="NAME", shell_complete=complete_name)
@click.option(
    "--timeout", "timeout_s", type=Seconds(0, 1e9), metavar="SECONDS",
    help="How long to wait. [default: as long as it takes]",
)
@json_option
def command(*, target: str, timeout_s: float | None, as_json: bool) -> int:
    """Wait until all of a disk's image is on its base, durably: it is then independent of it.

    Shows how far it is, how fast, and how long it will take. Exit code 6 when that takes too long,
    3 when the disk is degraded, 1 when background hydration is off or paused. A Ctrl-C ends the
    waiting, not the hydration.
    """
    from ublk_ubi.links import resolve

    return run_wait(resolve(target), timeout_s=timeout_s, as_json=as_json)


def run_wait(device: Device, *, timeout_s: float | None, as_json: bool) -> int:
    """Wait, and print how that ended. Raises UbiError when the disk still needs its image."""
    from ublk_ubi.cli.hydrate import show, summary
    from ublk_ubi.cli.progress import follow

    status, problem = follow(device, timeout_s=timeout_s, as_json=as_json)
    if problem is not None:
        if as_json and status is not None:
            print_json(summary(status))
        raise problem
    assert status is not None
    show(status, as_json=as_json)
    return Exit.OK
