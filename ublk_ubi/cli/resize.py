"""`ublk-ubi resize`: lets a disk grow."""

from __future__ import annotations

import click

from ublk_ubi.cli.common import (
    Seconds,
    UbiCommand,
    complete_name,
    json_option,
    print_json,
    say,
    size,
    warn,
)
from ublk_ubi.errors import Exit, UbiError

EXAMPLES = """
  ublk-ubi resize vm1 40G
  ublk-ubi resize vm1                   after `lvextend -L +10G vg/vm1`
"""


@click.command(cls=UbiCommand, examples=EXAMPLES)
@click.argument("target", metavar="NAME", shell_complete=complete_name)
@click.argument("new_size", metavar="[SIZE]", required=False, type=size)
@click.option(
    "--keep-old-data", is_flag=True,
    help="Let the disk show what the new part of its base holds, instead of zeroing it.",
)
@click.option(
    "--timeout", "timeout_s", type=Seconds(0.1, 86400), default=3600.0, metavar="SECONDS",
    help="How long zeroing may take. [default: 3600]",
)
@json_option
def command(
    *, target: str, new_size: int | None, keep_old_data: bool, timeout_s: float, as_json: bool,
) -> int:
    """Let a disk grow while it is in use.

    Without SIZE it takes all that its base has, a volume that was extended too; with SIZE a base
    that is a file is grown first. The new part reads zero. A guest sees the new size after a
    rescan; SPDK, where the disk is attached, is told, and tells its guest. A disk does not shrink.
    """
    from ublk_ubi import rpc, spdk
    from ublk_ubi.links import resolve
    from ublk_ubi.sizes import human_size

    device = resolve(target)
    params = {"size": new_size, "keep_old_data": keep_old_data}
    answer = rpc.call(device.socket, "resize", params, timeout_s)
    try:
        spdk.rescan(device)
    except UbiError as error:
        warn(f"{device.name} has grown, and SPDK does not know: {error.message}")
    if as_json:
        print_json({"schema": 1, "name": device.name, "size": answer["size"]})
    else:
        say(f"{device.name} has {answer['size']} bytes ({human_size(answer['size'])})")
    return Exit.OK
