"""`ublk-ubi check`: whether a base is sound."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from ublk_ubi.cli.common import UbiCommand, json_option, one_line, print_json, say, size
from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from ublk_ubi.check import Checked

EXAMPLES = """
  ublk-ubi check vm1.base
  ublk-ubi check /dev/vg/vm1 --image jammy.raw
  ublk-ubi check old.base --image jammy.raw --stripe-size 1M       a disk of bdev_ubi's
"""
# As fsck(8) has them.
SOUND, PROBLEMS, FAILED = 0, 4, 8


@click.command(cls=UbiCommand, examples=EXAMPLES)
@click.argument("base", metavar="BASE")
@click.option("--image", metavar="PATH", help="Compare what is marked hydrated with this image.")
@click.option(
    "--stripe-size", type=size, metavar="SIZE",
    help="Of a disk of bdev_ubi's that does not record it.",
)
@json_option
def command(*, base: str, image: str | None, stripe_size: int | None, as_json: bool) -> int:
    """Check a base: its metadata, its record of writes, and its stripes against the image.

    Stripes that differ from the image are what guests wrote. Changes nothing. Exit codes are
    fsck's: 0 sound, 4 problems were found, 8 it could not be checked, 2 wrong usage.
    """
    from ublk_ubi.check import check_base

    bar = _Progress(shown=image is not None and not as_json and sys.stderr.isatty())
    try:
        found = check_base(base, image=image, stripe_size=stripe_size, progress=bar.show)
    except UbiError as error:
        click.echo(f"ublk-ubi: {one_line(error.message)}", err=True)
        return FAILED
    finally:
        bar.end()
    if as_json:
        print_json(found.as_dict())
    else:
        _render(found)
    return PROBLEMS if found.problems else SOUND


class _Progress:
    """A line on a terminal that says how far it is."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._last = -1

    def show(self, done: int, total: int) -> None:
        """Draw it anew when it has moved."""
        percent = 100 * done // total if total else 100
        if self._shown and percent != self._last:
            self._last = percent
            click.echo(f"\rcomparing: {percent} % of {total:,} stripes", err=True, nl=False)

    def end(self) -> None:
        """Leave the line."""
        if self._last >= 0:
            click.echo(err=True)


def _render(found: Checked) -> None:
    hydrated = f"{found.hydrated:,}" if found.hydrated is not None else "0"
    total = f" of {found.image_stripes:,}" if found.image_stripes is not None else ""
    say(f"{click.style(one_line(found.path), bold=True)}: {hydrated}{total} stripes hydrated")
    counts = found.against_image
    if counts is not None:
        say(f"  against the image: {counts.equal:,} equal, {counts.differ:,} differ, "
            f"{counts.zeros:,} zero where it is not, {counts.errors:,} not readable")
    for note in found.notes:
        say(f"  note: {one_line(note)}")
    for problem in found.problems:
        say("  " + click.style(one_line(problem), fg="red"))
    if not found.problems:
        say("  sound")
