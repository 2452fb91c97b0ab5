"""What a daemon looks at once a second, on a thread of its own: each of these calls may block.

A filesystem that does not answer (NFS, FUSE) holds up this thread; the control socket goes on.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi._device import DataPlane
    from ublk_ubi.base import Base
    from ublk_ubi.hydration import Hydration
    from ublk_ubi.image import Image

PERIOD_S = 1.0


class Upkeep:
    """Watches a device's image and the room of its base.

    `image_problem` tells, once and for all, that the image is not what it was; `allocated` is how
    many bytes of storage the base takes, `free` how many its filesystem has left: None where
    nobody can tell, or there is none. `faults` tells what has failed (faults.py).
    """

    def __init__(
        self,
        plane: DataPlane,
        hydration: Hydration,
        image: Image | None,
        base: Base,
        report: Callable[[str], None],
        *,
        faults: Callable[[], None] = lambda: None,
    ) -> None:
        self.image_problem: str | None = None
        self.allocated: int | None = None
        self.free: int | None = None
        self._plane = plane
        self._hydration = hydration
        self._image = image
        self._base = base
        self._report = report
        self._look_at_faults = faults
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ubi-upkeep", daemon=True)

    def start(self) -> None:
        """Look now, then once a second."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. A look that does not come back is left behind."""
        self._end.set()
        self._thread.join(PERIOD_S)

    def forget_image(self) -> None:
        """Nobody needs the image any more: it may change, and go."""
        self._image = None

    def _run(self) -> None:
        while True:
            self.look_at_space()
            self.look_at_image()
            self._look_at_faults()
            if self._end.wait(PERIOD_S):
                return

    def look_at_space(self) -> None:
        """Learn what the base takes, and what its filesystem has left."""
        base = self._base
        if base.is_block:
            self.allocated = base.size
            return
        try:
            space = os.fstatvfs(base.fd)
            self.allocated = os.fstat(base.fd).st_blocks * 512
        except OSError:
            return  # it is being closed, or is stuck: no reason to stop copying
        self.free = space.f_bavail * space.f_frsize
        self._hydration.see_space(self.free, space.f_blocks * space.f_frsize)

    def look_at_image(self) -> None:
        """From the first change on nothing of the image is served or copied any more."""
        image = self._image
        if image is None or self.image_problem is not None:
            return
        try:
            change = image.changed()
        except OSError as error:
            change = error.strerror
        if change is not None and self._image is image and not self._end.is_set():
            self.lose_image(f"has changed since it was opened: {change}")
            self._report(f"image {image.path} {self.image_problem}")

    def lose_image(self, problem: str) -> None:
        """Have nothing of the image served or copied any more."""
        self._plane.lose_image()
        self._hydration.lose_image()
        self.image_problem = problem
        os.eventfd_write(self._plane.notify_fd, 1)  # so that the next daemon hears of it
