"""`ublk-ubi add`: options and config file in, a live disk out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ublk_ubi.cli.common import (
    UbiCommand,
    json_option,
    min_free,
    mode,
    notice,
    print_json,
    rate,
    say,
    size,
    warn,
)
from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from ublk_ubi.options import DeviceOptions

EXAMPLES = """
  ublk-ubi add --image jammy.raw --base vm1.base
  ublk-ubi add --image jammy.raw --base vm1.base --size 20G --name vm1 --owner libvirt-qemu
  ublk-ubi add --image /dev/vg/golden --base /dev/vg/vm1 --format --yes
  ublk-ubi add --image jammy.raw --base vm1.base --cache writethrough --hydrate --rate 200M
  ublk-ubi add --config /etc/ublk-ubi/vm1.json --json
"""


# Every default is None, so that what was said can be told from what was not: a config file gives
# the rest, and DeviceOptions the defaults.
@click.command(cls=UbiCommand, examples=EXAMPLES)
@click.option(
    "--image", metavar="PATH",
    help="The read-only image: a raw file or block device; a base that has all of it needs none.",
)
@click.option(
    "--base", metavar="PATH",
    help="The writable base: a block device, or a file, which is made if it is not there.",
)
@click.option(
    "--size", type=size, metavar="SIZE",
    help="Size of the disk; a new base is 8 MiB larger. [default: the image's, in whole stripes]",
)
@click.option(
    "--stripe-size", type=size, metavar="SIZE",
    help="Unit that is copied at a first touch: 64K to 1M, a power of two. [default: 1M]",
)
@click.option("--name", metavar="NAME", help="Name of the disk. [default: the lowest free ubiN]")
@click.option(
    "-f", "--image-format", type=click.Choice(["raw"]),
    help="Take the image for raw, whatever it looks like.",
)
@click.option(
    "-q", "--queues", type=int, help="Queues, a thread each; no more than CPUs. [default: 1]",
)
@click.option(
    "-d", "--depth", type=int,
    help="Requests in flight a queue. [default: 128; without zero copy as many as 32 MiB of "
    "stripes hold, 32 of 1M]",
)
@click.option("-n", "--id", "id", type=int, help="N of /dev/ublkbN. [default: a free one]")
@click.option(
    "--copy-on-read/--no-copy-on-read", default=None,
    help="Whether a read brings its stripe to the base. [default: yes]",
)
@click.option(
    "--hydrate", is_flag=True, default=None,
    help="Copy all of the image in the background, so that it is not needed any more.",
)
@click.option(
    "--rate", type=rate, metavar="RATE",
    help="For that, at most so many bytes a second: 64K to 16G, or max. [default: max]",
)
@click.option(
    "--min-free", type=min_free, metavar="SHARE|SIZE",
    help="What that leaves free of the base's filesystem: 10%, 20G. [default: 5%]",
)
@click.option(
    "--cache", type=click.Choice(["writeback", "writethrough", "unsafe"]),
    help="When a write is durable: once flushed; once complete (SPDK's uring bdev sends no flush); "
    "never for certain. [default: writeback]",
)
@click.option(
    "--data-path", type=click.Choice(["auto", "zero-copy", "copy"]),
    help="Read into the guest's own pages, or through buffers. [default: what the kernel can do]",
)
@click.option(
    "--cpus", metavar="LIST", help="CPUs of the queues, such as 0-3,8: one each, in turn.",
)
@click.option("--hydrator-cpus", metavar="LIST", help="CPUs of the thread that copies the image.")
@click.option(
    "--image-cache", type=click.Choice(["none", "page"]),
    help="Read the image directly, or through the page cache (many disks of one image). "
    "[default: none]",
)
@click.option(
    "--block-size", type=click.Choice(["512", "4096"]),
    help="Logical block size of the disk. [default: what image and base can do]",
)
@click.option(
    "--format", "format", is_flag=True, default=None,
    help="Make a new disk on a base that holds something else; asks first.",
)
@click.option("--adopt", is_flag=True, default=None, help="Take over a disk that bdev_ubi made.")
@click.option(
    "--force", is_flag=True, default=None,
    help="Accept an image with other content, if its size is the recorded one.",
)
@click.option(
    "--force-stale", is_flag=True, default=None,
    help="Go on with what the base alone proves, as after a power loss.",
)
@click.option(
    "--zero", is_flag=True, default=None,
    help="Zero a new block device base past the image's end.",
)
@click.option(
    "--keep-old-data", is_flag=True, default=None,
    help="Let the disk show what a new block device base holds past the image's end.",
)
@click.option(
    "--partscan", is_flag=True, default=None, help="Let this host look for partitions on the disk.",
)
@click.option(
    "--recovery/--no-recovery", default=None,
    help="Whether the disk stays when its daemon dies, and its requests wait. [default: yes]",
)
@click.option("--owner", metavar="U[:G]", help="Owner of the device node.")
@click.option("--mode", type=mode, metavar="MODE", help="Its permissions. [default: 0660]")
@click.option(
    "--fence-timeout", "fence_timeout_s", type=float, metavar="SECONDS",
    help="How long to wait for a dead daemon's writes to land. [default: 30]",
)
@click.option(
    "--config", "config_path", metavar="FILE",
    help='JSON with these options ("stripe_size": "64K", "fence_timeout_s": 5); the command line '
    "wins.",
)
@click.option("--foreground", is_flag=True, help="Run the daemon in this process.")
@click.option("--yes", is_flag=True, help="Do not ask before --format.")
@json_option
def command(
    *, config_path: str | None, foreground: bool, yes: bool, as_json: bool, **given: Any,
) -> int:
    """Make a disk of an image and a base, and print its path.

    The disk is ready at once: what is read comes from the image, what is written goes to the base.
    A base that was used before, with the same image, continues where it was; one that has all of
    its image needs it no more.
    """
    from ublk_ubi.config import build_options

    options = build_options(_merge(config_path, given))
    if options.format and not yes:
        _ask(options)
    if foreground:
        return _run_here(options, as_json=as_json)
    from ublk_ubi.launch import start_daemon

    # For people only: a script's log needs no news of a wait that ends well.
    ready = start_daemon(options, notice if sys.stderr.isatty() else None)
    _show(ready, as_json=as_json)
    from ublk_ubi.watch import start_in_background

    start_in_background(ready.name)
    return Exit.OK


def _merge(config_path: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Lay the command line over the config file."""
    import os

    values: dict[str, Any] = {}
    if config_path is not None:
        from ublk_ubi.config import load_config

        values = load_config(config_path)
    said = {key: value for key, value in given.items() if value is not None}
    if "block_size" in said:
        said["block_size"] = int(said["block_size"])
    if said.get("rate") == "max":
        said["rate"] = None
    for key in ("image", "base"):
        if said.get(key):
            said[key] = os.path.abspath(said[key])  # the daemon runs in /
    return values | said


def _ask(options: DeviceOptions) -> None:
    """Have --format confirmed, with what would be lost. Raises UbiError where nobody can answer."""
    import os

    if not os.path.exists(options.base):
        return
    from ublk_ubi.inspect import inspect_base

    found = inspect_base(options.base)
    if found.kind == "empty":
        return
    if not sys.stdin.isatty():
        raise UbiError(
            f"--format would destroy what is on {options.base} ({found.description}): say --yes "
            "to allow it without a question",
            Exit.USAGE,
        )
    question = f"{options.base} holds {found.description}. Destroy it?"
    if not click.confirm(question, default=False, err=True):
        raise UbiError(f"{options.base} was left alone")


def _show(ready: Any, *, as_json: bool) -> None:
    """Print a live device: its link, or all that the daemon said."""
    for warning in ready.warnings:
        warn(warning)
    if not as_json:
        say(ready.link)
        return
    keys = ("name", "device", "link", "id", "pid", "size", "warnings")
    print_json({"schema": 1, **{key: getattr(ready, key) for key in keys}})


def _run_here(options: DeviceOptions, *, as_json: bool) -> int:
    """Be the daemon; its own errors come as they are."""
    import msgspec

    from ublk_ubi import daemon, hygiene
    from ublk_ubi.launch import Ready

    hygiene.close_inherited()
    hygiene.settle()
    failed: list[Ready] = []

    def ready(answer: dict[str, Any]) -> None:
        outcome = msgspec.convert(answer, Ready)
        if outcome.ok:
            _show(outcome, as_json=as_json)
            sys.stdout.flush()
        else:
            failed.append(outcome)

    code = daemon.run(options, ready)
    if failed:
        known = failed[0].exit in {int(exit_code) for exit_code in Exit}
        raise UbiError(failed[0].error, Exit(failed[0].exit) if known else Exit.FAILED)
    return code
