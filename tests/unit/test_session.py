"""A device's way up, in parts: what a signal may interrupt."""

from __future__ import annotations

import contextlib
import os
import signal
from types import SimpleNamespace

import pytest

from ublk_ubi.abi import Feature
from ublk_ubi.kernel_device import KernelDevice
from ublk_ubi.options import DeviceOptions, places_of
from ublk_ubi.session import Session


class Ended(BaseException):
    pass


def test_an_id_that_the_kernel_gave_out_is_taken_back() -> None:
    """The signal comes while ADD_DEV runs: only its answer tells the id."""
    deleted: list[int] = []

    def add_dev(_params: object) -> SimpleNamespace:
        os.kill(os.getpid(), signal.SIGTERM)
        return SimpleNamespace(id=5, flags=Feature.CMD_IOCTL_ENCODE)

    def end(*_: object) -> None:
        raise Ended

    session = Session.__new__(Session)
    session.options = DeviceOptions(image="/i", base="/b")
    session.places = places_of(session.options)
    session.block_size, session.size = 512, 1 << 20
    session.warnings = []
    session.base = SimpleNamespace(identity=(False, 1, 2), is_block=False, path="/b")
    session.claim = SimpleNamespace(write_state=lambda _state: None)
    session._undo = contextlib.ExitStack()
    session.device = KernelDevice(
        SimpleNamespace(
            add_dev=add_dev, del_dev=deleted.append,
            get_features=lambda: Feature.CMD_IOCTL_ENCODE,
        ),
        session.options,
    )
    opener = SimpleNamespace(creating=False, stripe_bytes=1 << 20, block_bytes=0,
                             recorded_device_bytes=0, set_device_bytes=lambda _size: None)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended):
            session.before_write(opener)
    finally:
        signal.signal(signal.SIGTERM, before)
    session._undo.close()
    assert deleted == [5]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
