"""Stand-ins for modules that others import, and that nothing of theirs which we use needs.

A quarter of a command's start would be such imports. The first look at what a stand-in does not
know loads the module itself, so nothing changes but the time. To be imported before the others.
"""

from __future__ import annotations

import gc
import os
import sys
from _thread import allocate_lock
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


_looking = allocate_lock()
MANY_OBJECTS = 30_000              # more than a command or daemon has once it has begun


class _Late(ModuleType):
    """Stands in for the module of its name."""

    def __getattr__(self, name: str) -> Any:
        """Ask the module itself."""
        return getattr(_load(self.__name__), name)


def _load(name: str) -> Any:
    from importlib import import_module

    with _looking:
        if isinstance(sys.modules.get(name), _Late):
            del sys.modules[name]
    return import_module(name)


def put_off(name: str, **known: object) -> None:
    """Have a module loaded once something is asked of it that is not `known`."""
    if name not in sys.modules:
        sys.modules[name] = _Late(name)
        vars(sys.modules[name]).update(known)


def _cleandoc(text: str) -> str:
    """Answer for one line, as each option's help is."""
    return _load("inspect").cleandoc(text) if "\n" in text or "\t" in text else text.lstrip()


gc.set_threshold(MANY_OBJECTS)  # what imports make is no garbage, and is not looked through for it
put_off("inspect", cleandoc=_cleandoc)                      # click: help
put_off("platform", system=lambda: os.uname().sysname)      # uuid: of which click and msgspec know
put_off("textwrap")                                         # msgspec: JSON schemas
