"""What a daemon says of its device: the answer of `status` (status.py has the schema)."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from ublk_ubi.files import uuid_text
from ublk_ubi.memory import own_bytes
from ublk_ubi.sizes import human_size
from ublk_ubi.table import VERSION as TABLE_VERSION

if TYPE_CHECKING:
    from ublk_ubi.session import Session


def summary(session: Session, state: str) -> str:
    """Say in a line what `status` says at length, for the service manager."""
    stripes = session.plane.stripes()
    total, there = stripes["total"], stripes["hydrated"]
    if session.independent:
        share = "independent of its image"
    else:
        share = f"{there} of {total} stripes hydrated"
    degraded = session.degraded()
    word = state if degraded is None else f"degraded: {degraded};"
    return f"{word} {session.link} → {session.info.disk_path}, {human_size(session.size)}, {share}"


def describe(session: Session, state: str) -> dict[str, Any]:
    """Return the status as JSON has it (docs: README, `status --json`)."""
    options, info, plane = session.options, session.info, session.plane
    stripes = plane.stripes()
    counters = plane.counters()
    counters["hydration"] = session.hydration.describe(counters["hydration"])
    stripe_size = session.opener.stripe_bytes
    return {
        "schema": 1,
        "name": session.claim.name,
        "device": info.disk_path,
        "link": session.link,
        "id": info.id,
        "pid": os.getpid(),
        "state": state,
        "degraded": session.degraded(),
        "image": session.image_path,
        "image_size": session.opener.recorded_image_bytes,
        "independent": session.independent,
        "base": session.places["base"],
        "size": session.size,
        "stripe_size": stripe_size,
        "block_size": session.block_size,
        "queues": info.queues,
        "depth": info.depth,
        "copy_on_read": options.copy_on_read,
        "image_cache": options.image_cache,
        "image_direct": session.image.direct if session.image is not None else None,
        "base_direct": session.base.direct,
        "data_path": "zero-copy" if session.device.zero_copy else "copy",
        "recoverable": session.device.recoverable,
        "table_version": TABLE_VERSION,
        "cache": options.cache,
        "uuid": uuid_text(session.opener.uuid),
        "generation": session.opener.generation,
        "stripes": stripes,
        "space": {
            "allocated": session.upkeep.allocated,
            "free": session.upkeep.free,
            "hydrated": stripes["hydrated"] * stripe_size,
            "needed": (stripes["total"] - stripes["hydrated"]) * stripe_size,
        },
        "memory": own_bytes(),
        "sandbox": session.sandbox.state,
        "io": plane.io(),
        **counters,
        "uptime_s": round(time.monotonic() - session.started_at, 3),
    }
