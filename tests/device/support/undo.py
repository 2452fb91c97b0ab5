"""The one stack that takes away what a test has made, last made first."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Undo(contextlib.ExitStack):
    """An ExitStack that knows how to make faulty disks whole.

    A device is taken away while the disks below it still are as the test has left them: slow,
    suspended, failing. Whoever makes such a disk adds to `healers` what makes it work again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.healers: list[Callable[[], object]] = []

    def heal(self) -> None:
        """Let every disk answer again."""
        for healer in self.healers:
            healer()
