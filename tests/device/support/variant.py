"""The product with a part taken out: a test that does not notice it is not worth having."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

import pytest

from support import device

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = "ublk_ubi"


class Variant:
    """A private copy of the product's package in `folder`, which commands can be run from."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(device.CHECKOUT / PACKAGE, folder / PACKAGE, ignore=unwanted)

    def replace(self, file: str, text: str, by: str, *, times: int = 1) -> None:
        """Change the source of a module; what is replaced must be there so many times."""
        path = self.root / PACKAGE / file
        source = path.read_text()
        assert source.count(text) == times, f"{file}: {source.count(text)} × {text!r}"
        path.write_text(source.replace(text, by))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the tests' commands run this one."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "CHECKOUT", self.root)
            # `python -m` would look into the current folder first.
            patch.setenv("PYTHONSAFEPATH", "1")
            yield
