"""Makes what msgspec knows of our types ready, before there are threads.

It does so when a type is first decoded into, with Python code in the middle; a second thread that
needs the type meanwhile is given what is not whole, and the process crashes (msgspec 0.22).
"""

from __future__ import annotations

import msgspec


def make_ready() -> None:
    """Have every type ready whose module has been imported."""
    classes: list[type[msgspec.Struct]] = [msgspec.Struct]
    for one in classes:
        classes += one.__subclasses__()
    for one in classes[1:]:
        if one.__module__.startswith("ublk_ubi."):
            msgspec.json.Decoder(one)
