"""`ublk-ubi hydrate`: copies the rest of a disk's image in the background."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from ublk_ubi.cli.common import UbiCommand, complete_name, json_option, print_json, rate, say
from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from ublk_ubi.status import Status

EXAMPLES = """
  ublk-ubi hydrate vm1
  ublk-ubi hydrate vm1 --rate 200M
  ublk-ubi hydrate vm1 --rate max --wait && rm jammy.raw
  ublk-ubi hydrate vm1 --pause
"""
KEYS = ("name", "state", "degraded", "independent", "stripes", "space", "hydration")


@click.command("hydrate", cls=UbiCommand, examples=EXAMPLES)
@click.argument("target", metavar="NAME", shell_complete=complete_name)
@click.option("--pause", is_flag=True, help="Copy no more; what is under way ends.")
@click.option(
    "--rate", type=rate, metavar="RATE",
    help="At most so many bytes a second: 64K to 16G, or max. [default: as it was]",
)
@click.option("--wait", is_flag=True, help="Wait until the disk is independent of its image.")
@json_option
def command(
    *, target: str, pause: bool, rate: int | Literal["max"] | None, wait: bool, as_json: bool,
) -> int:
    """Copy all of a disk's image to its base in the background, or go on with that.

    Requests come first. Stripes that failed are tried again at once. When all is copied the disk
    is independent of its image, which may then be deleted.
    """
    from ublk_ubi.background import steer
    from ublk_ubi.links import resolve

    if pause and wait:
        raise click.UsageError("--pause and --wait exclude one another: give one of them")
    device = resolve(target)
    status = steer(device, run=not pause, rate=rate)
    if wait:
        from ublk_ubi.cli.wait import run_wait

        return run_wait(device, timeout_s=None, as_json=as_json)
    show(status, as_json=as_json)
    if status.degraded and not pause:
        raise UbiError(f"device {status.name}: {status.degraded}", Exit.DEGRADED)
    return Exit.OK


def show(status: Status, *, as_json: bool) -> None:
    """Print how it stands."""
    from ublk_ubi.cli.render import background

    if as_json:
        print_json(summary(status))
    elif status.independent:
        say(f"{status.name} is independent of its image")
    else:
        say(f"{status.name}: background hydration: {background(status)}")


def summary(status: Status) -> dict[str, Any]:
    """Give what `hydrate` and `wait` print as JSON."""
    return {"schema": 1, **{key: getattr(status, key) for key in KEYS}}
