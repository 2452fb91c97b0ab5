"""`ublk-ubi doctor`: can this machine run disks, and what to do if not."""

from __future__ import annotations

import click

from ublk_ubi.cli.common import UbiCommand, json_option, one_line, print_json, say
from ublk_ubi.errors import Exit

EXAMPLES = """
  ublk-ubi doctor
  ublk-ubi doctor --json | jq -r '.checks[] | select(.status == "fail") | .advice'
"""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_INDENT = 6  # columns: the width of a status and two spaces


@click.command(cls=UbiCommand, examples=EXAMPLES)
@json_option
def command(*, as_json: bool) -> int:
    """Check kernel, driver, libraries and limits, and say what to do about what is wrong.

    Changes nothing. Exit code 1 when disks cannot run here; what only costs speed or comfort is
    a warning.
    """
    from ublk_ubi.doctor import run_checks

    checks = run_checks()
    failed = sum(check.status == "fail" for check in checks)
    if as_json:
        print_json({"schema": 1, "ok": not failed, "checks": checks})
        return Exit.FAILED if failed else Exit.OK
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = click.style(f"{check.status:<4}", fg=_COLOURS[check.status])
        say(f"{mark}  {check.name:<{width}}  {one_line(check.found)}")
        if check.advice:
            say(f"{'':<{_INDENT}}{'':<{width}}  → {one_line(check.advice)}")
    say("")
    say(f"{failed} of {len(checks)} checks failed" if failed else "disks can run here")
    return Exit.FAILED if failed else Exit.OK
