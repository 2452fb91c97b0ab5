"""`ublk-ubi inspect`: what a base holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ublk_ubi.cli.common import UbiCommand, json_option, one_line, print_json, say
from ublk_ubi.errors import Exit

if TYPE_CHECKING:
    from ublk_ubi.inspect import Inspection

EXAMPLES = """
  ublk-ubi inspect vm1.base
  ublk-ubi inspect /dev/vg/vm1 --json | jq .hydrated
"""
_LABEL = 14  # columns


@click.command(cls=UbiCommand, examples=EXAMPLES)
@click.argument("base", metavar="BASE")
@json_option
def command(*, base: str, as_json: bool) -> int:
    """Say what a base holds: one of our disks, bdev_ubi's, a filesystem, nothing.

    Reads its metadata and changes nothing. Of a running disk it shows what is durable.
    """
    from ublk_ubi.inspect import inspect_base

    found = inspect_base(base)
    if as_json:
        print_json(found.as_dict())
    else:
        _render(found)
    return Exit.OK


def _render(found: Inspection) -> None:
    from ublk_ubi.sizes import format_size, human_size

    say(f"{click.style(one_line(found.path), bold=True)}  {human_size(found.size)}")
    say(f"  {one_line(found.description)}")
    if found.magic:
        say("")
        _line("on-disk version", found.version)
        if found.stripe_size is not None:
            _line("stripe size", format_size(found.stripe_size))
        if found.block_size is not None:
            _line("block size", str(found.block_size))
        if found.disk_size is not None:
            _line("disk size", f"{found.disk_size} bytes ({human_size(found.disk_size)})")
        _line("data", _data(found))
        for number, slot in enumerate(found.slots):
            words = f"valid, sequence {slot.sequence}" if slot.valid else slot.problem
            _line(f"extension {number}", f"{words} (at byte {slot.offset})")
    if found.image_size is not None:
        _line("image size", f"{found.image_size} bytes ({human_size(found.image_size)})")
        _line("image hash", found.image_fingerprint)
        _line("uuid", found.uuid)
        _line("generation", str(found.generation))
        when = "this boot" if found.this_boot else "another boot"
        _line("opened in", f"{when} ({found.boot_id})")
        _line("closed", "no" if found.open else "cleanly")
    if found.hydrated is not None:
        total = f" of {found.image_stripes:,}" if found.image_stripes is not None else ""
        _line("hydrated", f"{found.hydrated:,}{total} stripes, durably")
    if found.hydrated_past_image:
        _line("past the image", f"{found.hydrated_past_image:,} stripes are marked hydrated")
    say("")
    say(f"  {one_line(found.advice)}")


def _data(found: Inspection) -> str:
    text = f"from byte {found.data_offset} on"
    if found.first_hydrated_stripe is None:
        return text
    text += f"; the first hydrated stripe is {found.first_hydrated_stripe}"
    if found.first_hydrated_offset is not None:
        text += f", at byte {found.first_hydrated_offset}"
    return text


def _line(label: str, text: str | None) -> None:
    say(f"  {label:<{_LABEL}}  {text}")
