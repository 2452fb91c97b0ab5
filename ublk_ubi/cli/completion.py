"""`ublk-ubi completion`: the completion script of a shell."""

from __future__ import annotations

import click

from ublk_ubi.cli.common import UbiCommand, say
from ublk_ubi.errors import Exit, UbiError

EXAMPLES = """
  ublk-ubi completion bash > /etc/bash_completion.d/ublk-ubi
  ublk-ubi completion zsh > /usr/local/share/zsh/site-functions/_ublk-ubi
  ublk-ubi completion fish > ~/.config/fish/completions/ublk-ubi.fish
"""


@click.command(cls=UbiCommand, examples=EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(*, shell: str) -> int:
    """Print the completion script of a shell, for commands, options and names of disks."""
    from click.shell_completion import get_completion_class

    from ublk_ubi.cli import PROGRAM, cli

    found = get_completion_class(shell)
    if found is None:
        raise UbiError(f"this version of click knows no completion for {shell}: upgrade click")
    # The template itself: `source()` would run bash to look at its version first.
    script = found(cli, {}, PROGRAM, "_UBLK_UBI_COMPLETE")
    say((script.source_template % script.source_vars()).strip("\n"))
    return Exit.OK
