"""`ublk-ubi spdk`: disks under SPDK, as its bdevs and vhost-user-blk controllers."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import click

from ublk_ubi.cli.common import (
    Seconds,
    UbiCommand,
    UbiGroup,
    complete_name,
    json_option,
    one_line,
    print_json,
    print_table,
    say,
)
from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi.runtime import Device
    from ublk_ubi.spdk import Attachment, There

EXAMPLES = """
  ublk-ubi spdk config vm1 --vhost vhost.0 > spdk.json && vhost --json spdk.json -S /var/tmp
  ublk-ubi spdk attach vm1 --socket /var/tmp/spdk.sock --vhost vhost.0
  ublk-ubi spdk status
  ublk-ubi spdk detach vm1
"""
CONFIG_EXAMPLES = """
  ublk-ubi spdk config vm1 --vhost vhost.0 --cpumask 0x1
  ublk-ubi spdk config vm1 vm2 --vhost vhost.0 --vhost vhost.1
  ublk-ubi spdk config vm3 --bdev aio --fallocate
"""
ATTACH_EXAMPLES = """
  ublk-ubi spdk attach vm1 --vhost vhost.0
  ublk-ubi spdk attach vm1 --socket /run/spdk.sock --vhost vhost.0 --cpumask 0x1
  ublk-ubi spdk attach vm1                    after SPDK restarted, as it was before
"""
DETACH_EXAMPLES = """
  ublk-ubi spdk detach vm1
  ublk-ubi spdk detach vm1 --force
"""
STATUS_EXAMPLES = """
  ublk-ubi spdk status
  ublk-ubi spdk status vm1 --json | jq -r .vhost_socket
"""
_CPUMASK = re.compile(r"(0x)?[0-9A-Fa-f]{1,256}|\[[0-9,-]{1,256}\]")


def _bdev_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what says which bdev and controller."""
    options = (
        click.option(
            "--bdev", "kind", type=click.Choice(["uring", "aio"]),
            help="SPDK's bdev: uring passes no flush, and is for disks that need none; aio does. "
            "[default: uring]",
        ),
        click.option(
            "--fallocate", is_flag=True,
            help="With aio: pass UNMAP and WRITE ZEROES on, each by a call that holds SPDK up.",
        ),
        click.option("--cpumask", metavar="MASK", help="Cores of the controller: 0x1, [0,2]."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _socket_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--socket", metavar="PATH",
        help="SPDK's RPC socket, its -r. [default: that of before, else /var/tmp/spdk.sock]",
    )(function)


_timeout_option = click.option(
    "--timeout", "timeout_s", type=Seconds(0.1, 3600), default=30.0, metavar="SECONDS",
    help="How long SPDK may take to answer. [default: 30]",
)


@click.group("spdk", cls=UbiGroup, examples=EXAMPLES)
def command() -> None:
    """Put disks under SPDK: a bdev, and a vhost-user-blk controller for a VM.

    SPDK opens /dev/ublk-ubi/NAME. Its uring bdev passes no flush: such disks are writethrough.
    """


@command.command(
    "config", cls=UbiCommand, examples=CONFIG_EXAMPLES,
    short_help="Print a configuration of disks for SPDK's --json.",
)
@click.argument("targets", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_name)
@click.option(
    "--vhost", "vhosts", metavar="CTRLR", multiple=True,
    help="A vhost-user-blk controller, one for each NAME in turn: the name of its socket.",
)
@_bdev_options
def config(
    *, targets: tuple[str, ...], vhosts: tuple[str, ...], kind: str | None, fallocate: bool,
    cpumask: str | None,
) -> int:
    """Print a configuration of disks for SPDK's --json.

    It is read by SPDK when that starts, after the disks are there. It names the stable links.
    """
    from ublk_ubi.links import resolve
    from ublk_ubi.spdk import configuration

    if vhosts and len(vhosts) != len(targets):
        raise click.UsageError(
            f"{len(vhosts)} --vhost for {len(targets)} disks: give one for each, or none",
        )
    if len(set(vhosts)) != len(vhosts):
        raise click.UsageError("the same --vhost twice: give each disk a controller of its own")
    controllers: list[str | None] = list(vhosts) or [None] * len(targets)
    wanted = [
        (device, _attachment(device, "", kind, vhost, cpumask, fallocate=fallocate))
        for device, vhost in zip(map(resolve, targets), controllers, strict=True)
    ]
    print_json(configuration(wanted))
    return Exit.OK


@command.command(
    "attach", cls=UbiCommand, examples=ATTACH_EXAMPLES,
    short_help="Have a running SPDK serve a disk.",
)
@click.argument("target", metavar="NAME", shell_complete=complete_name)
@_socket_option
@click.option("--vhost", metavar="CTRLR", help="Make a vhost-user-blk controller of this name.")
@_bdev_options
@_timeout_option
@json_option
def attach(
    *, target: str, socket: str | None, vhost: str | None, kind: str | None, fallocate: bool,
    cpumask: str | None, timeout_s: float, as_json: bool,
) -> int:
    """Have a running SPDK serve a disk, and print the socket of its controller.

    What SPDK has already is left as it is. SPDK forgets all when it ends: said again, with no
    options, this makes what was there before.
    """
    from ublk_ubi import spdk
    from ublk_ubi.links import resolve

    device = resolve(target)
    wanted = _wanted(device, socket, kind, vhost, cpumask, fallocate=fallocate)
    done = spdk.attach(device, wanted, timeout_s)
    if as_json:
        print_json({
            "schema": 1, "name": device.name, "socket": wanted.socket, "bdev": done.bdev,
            "kind": wanted.kind, "vhost": wanted.vhost, "vhost_socket": done.vhost_socket,
            "made": done.made,
        })
    else:
        say(done.vhost_socket or done.bdev)
    return Exit.OK


@command.command(
    "detach", cls=UbiCommand, examples=DETACH_EXAMPLES,
    short_help="Take a disk away from SPDK; the disk stays.",
)
@click.argument("target", metavar="NAME", shell_complete=complete_name)
@click.option("--force", is_flag=True, help="Also while a VM is connected: its disk fails.")
@_timeout_option
@json_option
def detach(*, target: str, force: bool, timeout_s: float, as_json: bool) -> int:
    """Take a disk's controller and bdev away from SPDK; the disk stays.

    While a VM is connected it is refused. That SPDK does not run any more is no error.
    """
    from ublk_ubi import spdk
    from ublk_ubi.links import resolve

    device = resolve(target)
    spdk.detach(device, force=force, timeout_s=timeout_s)
    if as_json:
        print_json({"schema": 1, "detached": device.name})
    else:
        say(f"{device.name} detached")
    return Exit.OK


@command.command(
    "status", cls=UbiCommand, examples=STATUS_EXAMPLES,
    short_help="Show which disks are attached; exit code 3 if SPDK lacks one.",
)
@click.argument("target", metavar="[NAME]", required=False, shell_complete=complete_name)
@json_option
def status(*, target: str | None, as_json: bool) -> int:
    """Show which disks are attached to SPDK; exit code 3 if it does not have one that should be.

    --json prints one object for a NAME, and {"schema": 1, "attached": […]} for all.
    """
    from ublk_ubi import spdk
    from ublk_ubi.links import resolve
    from ublk_ubi.runtime import all_devices

    devices = [resolve(target)] if target is not None else all_devices()
    found = [there for device in devices if (there := spdk.look(device)) is not None]
    if target is not None and not found:
        raise UbiError(f"{devices[0].name} is not attached: `ublk-ubi spdk attach` does it")
    if as_json and target is not None:
        print_json({"schema": 1, **_as_dict(found[0])})
    elif as_json:
        print_json({"schema": 1, "attached": [_as_dict(there) for there in found]})
    elif not found:
        say("no disk is attached; `ublk-ubi spdk attach` does it")
    else:
        print_table([
            ["name", "bdev", "controller", "socket", "VMs", "SPDK"],
            *(_row(there) for there in found),
        ])
    for there in found if not as_json else ():
        if there.problem is not None:
            click.echo(f"ublk-ubi: {there.name}: {one_line(there.problem)}", err=True)
    return Exit.DEGRADED if any(there.problem for there in found) else Exit.OK


def _wanted(
    device: Device, socket: str | None, kind: str | None, vhost: str | None, cpumask: str | None, *,
    fallocate: bool,
) -> Attachment:
    """Lay what was said over what was attached before."""
    from ublk_ubi import spdk

    before = spdk.attachment_of(device)
    if socket is not None:
        socket = os.path.abspath(socket)
    if before is not None and not any((kind, vhost, cpumask, fallocate)) and (
        socket in (None, before.socket)
    ):
        return before
    where = socket or (before.socket if before is not None else spdk.DEFAULT_SOCKET)
    wanted = _attachment(device, where, kind, vhost, cpumask, fallocate=fallocate)
    if before is not None and wanted != before:
        there = spdk.look(device)
        if there is not None and there.problem is None:
            raise UbiError(
                f"{device.name} is attached otherwise ({_words(before)}): "
                f"`ublk-ubi spdk detach {device.name}` first",
                Exit.BUSY,
            )
    return wanted


def _attachment(
    device: Device, socket: str, kind: str | None, vhost: str | None, cpumask: str | None, *,
    fallocate: bool,
) -> Attachment:
    """Make an attachment of what was said. Raises click.UsageError."""
    from ublk_ubi import spdk

    chosen: spdk.Kind = "aio" if kind == "aio" else "uring"
    if fallocate and chosen != "aio":
        raise click.UsageError("--fallocate is of SPDK's aio bdev: give --bdev aio")
    if cpumask is not None and vhost is None:
        raise click.UsageError("--cpumask is of a controller: give --vhost as well")
    if cpumask is not None and not _CPUMASK.fullmatch(cpumask):
        raise click.UsageError(f"--cpumask {cpumask[:40]!r}: write it like 0x3 or [0,1]")
    if vhost is not None and ("/" in vhost or not vhost or len(vhost) > 100):
        raise click.UsageError(
            f"--vhost {vhost[:40]!r} is not a name: it becomes a socket in SPDK's -S folder",
        )
    return spdk.Attachment(
        socket=socket, bdev=device.name, kind=chosen, fallocate=fallocate, vhost=vhost,
        cpumask=cpumask,
    )


def _words(attachment: Attachment) -> str:
    parts = [f"{attachment.kind} bdev {attachment.bdev} of {attachment.socket}"]
    if attachment.vhost is not None:
        parts.append(f"controller {attachment.vhost}")
    return ", ".join(parts)


def _row(there: There) -> list[str]:
    return [
        there.name, f"{there.kind} {there.bdev}", there.vhost or "-", there.vhost_socket or "-",
        "-" if there.sessions is None else str(there.sessions),
        click.style("missing", fg="red") if there.problem else "ok",
    ]


def _as_dict(there: There) -> dict[str, Any]:
    import msgspec

    return msgspec.structs.asdict(there)
