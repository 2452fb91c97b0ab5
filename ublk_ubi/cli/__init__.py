"""The command `ublk-ubi`: finds the subcommand's module, runs it, turns errors into one line.

Start-up is what an operator feels: a subcommand's module is imported when it is run and not
before, and imports in turn what it needs when it needs it.
"""

from __future__ import annotations

import ublk_ubi.late  # noqa: F401 - before what it puts off

# isort: split

import contextlib
import importlib
import io
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ublk_ubi import __version__
from ublk_ubi.cli.common import UbiCommand, one_line
from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "ublk-ubi"

# name: module under ublk_ubi.cli, and what the list of commands says
COMMANDS = {
    "add": ("add", "Make a disk of an image and a base; prints its path."),
    "del": ("delete", "Take disks away; what was written stays on their bases."),
    "list": ("listing", "List the disks of this machine."),
    "status": ("status", "Show how disks are doing; exit code 3 if one is degraded."),
    "hydrate": ("hydrate", "Copy the rest of a disk's image in the background, or pause that."),
    "wait": ("wait", "Wait until a disk is independent of its image."),
    "recover": ("recover", "Bring back disks whose daemons died; their requests wait for it."),
    "watch": ("watch", "Bring back disks whose daemons die, where systemd does not."),
    "upgrade": ("upgrade", "Move disks, in use or not, to the installed version."),
    "resize": ("resize", "Let a disk grow, while it is in use, after its base did."),
    "check": ("check", "Check a base: its metadata, and what it has against the image."),
    "spdk": ("spdk", "Put disks under SPDK: bdevs and vhost-user-blk controllers."),
    "serve": ("serve", "Serve SPDK's JSON-RPC with bdev_ubi's calls."),
    "systemd": ("systemd", "Let systemd and udev know of disks: units, rules; or no more."),
    "inspect": ("inspect", "Say what a base holds, without a daemon."),
    "doctor": ("doctor", "Check whether this machine can run disks, and what to do if not."),
    "completion": ("completion", "Print the completion script of a shell."),
}

EPILOG = """\
  ublk-ubi add --image jammy.raw --base vm1.base     a disk, ready at once
  ublk-ubi status ubi0                               how it is doing
  ublk-ubi del ubi0                                  and away; vm1.base keeps it
"""


class LazyGroup(click.Group):
    """The command itself: knows its subcommands by name and loads the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Name the subcommands, in the order in which one meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Load one subcommand; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ublk_ubi.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; click itself would make two lines of an interrupt."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise UbiError("interrupted") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of subcommands without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the examples."""
        UbiCommand.write_examples(formatter, EPILOG)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Disks that are ready at once, whatever the image's size.

    Blocks come from a read-only image until they are first needed, then live on a writable base.
    Sizes are binary: 5G is 5 GiB. A disk is named by NAME, /dev/ublkbN or /dev/ublk-ubi/NAME.

    Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 degraded, 4 no such device, 5 busy, 6 timed out.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; errors are one line on standard error.

    The interpreter is not taken apart: that is a tenth of a command's time, and frees memory alone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # there are locales without an arrow
    code = run(list(sys.argv[1:] if arguments is None else arguments))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it may be closed
            stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    try:
        result = cli.main(arguments or ["--help"], prog_name=PROGRAM, standalone_mode=False)
        if sys.stdout is not None:  # it may have been closed
            sys.stdout.flush()
    except UbiError as error:
        return complain(error.message, error.code)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else PROGRAM
        message = error.format_message().rstrip(".")
        return complain(f"{message[:1].lower()}{message[1:]}; see `{where} --help`", Exit.USAGE)
    except click.ClickException as error:
        return complain(error.format_message(), Exit.FAILED)
    except (click.Abort, KeyboardInterrupt):
        return complain("interrupted", Exit.FAILED)
    except BrokenPipeError:
        # The reader left (`| head`): nothing to say, and nowhere for the exit to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return complain(f"{name}{error.strerror or error}", Exit.FAILED)
    except Exception as error:
        if os.environ.get("UBLK_UBI_DEBUG"):
            raise
        kind = type(error).__name__
        return complain(
            f"internal error, please report it: {kind}: {error} (UBLK_UBI_DEBUG=1 shows more)",
            Exit.FAILED,
        )
    return _code(result)


def complain(message: str, code: int) -> int:
    """Write an error; returns its exit code."""
    click.echo(f"{PROGRAM}: {one_line(message)}", err=True)
    return int(code)


def _code(result: Any) -> int:
    return int(result) if isinstance(result, int) else Exit.OK
