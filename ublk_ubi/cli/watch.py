"""`ublk-ubi watch`: brings back disks whose daemons die."""

from __future__ import annotations

import click

from ublk_ubi.cli.common import UbiCommand, notice
from ublk_ubi.errors import Exit, UbiError

EXAMPLES = """
  ublk-ubi watch
"""


@click.command(cls=UbiCommand, examples=EXAMPLES)
def command() -> int:
    """Bring back disks whose daemons die, until interrupted.

    `add` starts one in the background where systemd is not in charge; run it yourself under
    another service manager. There is one at a time on a host. A daemon that dies five times in a
    minute is not started again: see `ublk-ubi status`.
    """
    from ublk_ubi import hygiene, runtime
    from ublk_ubi.watch import Watch, lock

    runtime.tables_dir()  # makes the folder where the lock lies
    if lock() is None:
        raise UbiError("another watch runs already: nothing to do", Exit.BUSY)
    hygiene.settle(notice)
    Watch(notice).run(linger_s=None)
    return Exit.OK
