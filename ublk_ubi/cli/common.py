"""What the subcommands share: help with examples, argument types, and output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

import click

from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.shell_completion import CompletionItem


class UbiCommand(click.Command):
    """A command whose help ends with examples, kept line by line."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; click's parser forgets whose option lacks its value."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """Write the examples."""
        self.write_examples(formatter, self.examples)

    @staticmethod
    def write_examples(formatter: click.HelpFormatter, examples: str) -> None:
        """Write a section of lines as they are."""
        with formatter.section("Examples"):
            for line in examples.strip("\n").splitlines():
                formatter.write(f"  {line.strip()}\n")


class UbiGroup(click.Group):
    """A group of commands whose help ends with examples."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """Write the examples."""
        UbiCommand.write_examples(formatter, self.examples)


class Seconds(click.types.FloatParamType):
    """A length of time, `least` to `most`; not "nan", of which nothing is true."""

    name = "seconds"

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None,
    ) -> float:
        """Read it."""
        try:
            seconds = float(value)
        except ValueError:
            self.fail(f"{value!r} is no number of seconds: write it like 30 or 0.5", param, ctx)
        if not self.least <= seconds <= self.most:
            self.fail(
                f"{value} is out of range: {self.least:g} to {self.most:.0f} seconds", param, ctx,
            )
        return seconds


def size(text: str) -> int:
    """Read a size in bytes: 512, 64K, 5G (5 GiB); a type for click."""
    from ublk_ubi.sizes import parse_size

    try:
        return parse_size(text)
    except UbiError as error:
        raise click.BadParameter(error.message) from None


def mode(text: str) -> int:
    """Read permission bits in octal; a type for click."""
    from ublk_ubi.config import parse_mode

    try:
        return parse_mode(text)
    except UbiError as error:
        raise click.BadParameter(error.message) from None


def rate(text: str) -> int | Literal["max"]:
    """Read a rate in bytes a second, or `max`; a type for click."""
    from ublk_ubi.config import parse_rate

    try:
        return parse_rate(text) or "max"
    except UbiError as error:
        raise click.BadParameter(error.message) from None


def min_free(text: str) -> str:
    """Take a share or size as it is, but for bytes that were meant to be percent; for click."""
    if text.isdecimal() and 0 < int(text) <= 100:
        raise click.BadParameter(
            f"{text} would be bytes: write {text}% for a share of the filesystem, or {text}G",
        )
    return text


def complete_name(
    ctx: click.Context, param: click.Parameter, incomplete: str,  # noqa: ARG001 - click's signature
) -> list[str | CompletionItem]:
    """Offer the names of devices that exist."""
    from ublk_ubi.runtime import all_devices

    try:
        names = [device.name for device in all_devices()]
    except UbiError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json."""
    option = click.option("--json", "as_json", is_flag=True, help="Print JSON, with its `schema`.")
    return option(function)


def print_json(value: object) -> None:
    """Print a value as JSON, indented for those who look."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def print_table(rows: list[list[str]], *, right: frozenset[int] = frozenset()) -> None:
    """Print aligned columns, the first row as their heads; columns in `right` end aligned.

    Cells may carry colours; widths count what is seen.
    """
    widths = [max(len(click.unstyle(row[n])) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - len(click.unstyle(cell)))
            cells.append(space + cell if number in right else cell + space)
        say("  ".join(cells).rstrip())


def say(text: str) -> None:
    """Print a line; its colours only on a terminal, and not where NO_COLOR is set."""
    import os

    plain = bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()
    click.echo(text, color=not plain)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    click.echo(f"ublk-ubi: warning: {one_line(message)}", err=True)


def notice(message: str) -> None:
    """Print on standard error what is going on."""
    click.echo(f"ublk-ubi: {one_line(message)}", err=True)


def one_line(text: str) -> str:
    """Make what others wrote (paths, messages) fit for one line of a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
