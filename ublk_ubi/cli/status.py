"""`ublk-ubi status`: how disks are doing."""

from __future__ import annotations

import click

from ublk_ubi.cli.common import (
    Seconds,
    UbiCommand,
    complete_name,
    json_option,
    print_json,
    say,
)
from ublk_ubi.errors import Exit

EXAMPLES = """
  ublk-ubi status ubi0
  ublk-ubi status -a || echo "a disk is degraded"
  ublk-ubi status vm1 --json | jq .io.read.latency_us
"""


@click.command(cls=UbiCommand, examples=EXAMPLES)
@click.argument("target", metavar="[NAME]", required=False, shell_complete=complete_name)
@click.option("-a", "--all", "everything", is_flag=True, help="All disks, as without a NAME.")
@click.option(
    "--timeout", "timeout_s", type=Seconds(0.1, 3600), default=5.0, metavar="SECONDS",
    help="How long to wait for answers. [default: 5]",
)
@json_option
def command(*, target: str | None, everything: bool, timeout_s: float, as_json: bool) -> int:
    """Show how disks are doing: hydration, requests, latencies, errors.

    Exit code 3 when one is degraded: its daemon died or does not answer, its image changed, or
    its base failed to make writes durable. --json prints one object for a NAME, and
    {"schema": 1, "devices": […]} for all.
    """
    from ublk_ubi.cli.render import render_status
    from ublk_ubi.links import resolve
    from ublk_ubi.runtime import all_devices
    from ublk_ubi.status import status_of, status_of_all

    if target is not None and everything:
        raise click.UsageError("give a NAME, or -a for all")
    if target is not None:
        found = [status_of(resolve(target), timeout_s)]
    else:
        found = status_of_all(all_devices(), timeout_s)
    if as_json:
        print_json(found[0] if target is not None else {"schema": 1, "devices": found})
    elif not found:
        say("no disks; `ublk-ubi add` makes one")
    else:
        for number, status in enumerate(found):
            if number:
                say("")
            render_status(status)
    return Exit.DEGRADED if any(status.degraded for status in found) else Exit.OK
