"""Fixtures of the device tests: `ubi` makes devices, `make_image` and `stores` what they stand on.

Everything that a test makes through these is taken away in reverse order, also when it fails. After
each test nothing of it may be left, and the kernel must have nothing to complain about.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Found the same way whatever pytest's import mode is.
sys.path.insert(0, str(Path(__file__).resolve().parent))
pytest.register_assert_rewrite("support")

from support import slots, watch  # noqa: E402
from support.device import RUN_ROOT, Ubi  # noqa: E402
from support.images import Image, random_content, write_block, write_file  # noqa: E402
from support.mapper import Mapper  # noqa: E402
from support.mortal import Mortal  # noqa: E402
from support.mortal import build as build_mortal  # noqa: E402
from support.stores import FOLDERS, Disks, Stores  # noqa: E402
from support.undo import Undo  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT_S = 90.0
PREFIX = f"test{os.getpid()}"
METADATA_SIZE = 8 << 20
# "fallback": zero copy whose requests all go through a buffer, as the kernel registers no pages.
DATA_PATHS = ("zero-copy", "copy", "fallback")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"data_paths(*names): run a device test on each of {', '.join(DATA_PATHS)}",
    )
    config.addinivalue_line(
        "markers", f"limit(seconds): how long a device test may take, if not {LIMIT_S:g} s",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("data_paths")
    if marker and "data_path" in metafunc.fixturenames:
        assert set(marker.args) <= set(DATA_PATHS), marker.args
        metafunc.parametrize("data_path", marker.args)


def pytest_itemcollected(item: pytest.Item) -> None:
    """A device has no more queues than there are processors."""
    queues = getattr(item, "callspec", None) and item.callspec.params.get("queues")
    if isinstance(queues, int):
        item.add_marker(pytest.mark.cpus(queues))


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    """The disks of the whole run."""
    with contextlib.ExitStack() as stack:
        yield Disks(tmp_path_factory.mktemp("disks"), stack)


@pytest.fixture(autouse=True)
def nothing_left(disks: Disks) -> Iterator[None]:
    """Fail a test that leaves something behind or upsets the kernel."""
    log = watch.KernelLog()
    before = watch.inventory()
    yield
    left = watch.leaks(before, disks.made)
    complaints = watch.alarms(log.read())
    log.close()
    assert not left, f"left behind: {sorted(left)}"
    assert not complaints, "the kernel says:\n" + "\n".join(complaints)


@pytest.fixture
def undo() -> Iterator[Undo]:
    """What takes away all that the test makes."""
    with Undo() as stack:
        yield stack


@pytest.fixture
def mapper(undo: Undo) -> Mapper:
    """Makes device-mapper disks that a test can make slow or faulty."""
    return Mapper(undo, PREFIX)


@pytest.fixture
def stores(disks: Disks, mapper: Mapper, undo: Undo) -> Stores:
    """Gives folders on filesystems, and block devices."""
    return Stores(disks, mapper, undo, PREFIX)


@pytest.fixture
def data_path() -> str:
    """The data path of the test's devices; the marker data_paths gives others."""
    return "auto"


@pytest.fixture(scope="session")
def few_slots(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """Give the environment in which a queue has slots for that many requests' pages only."""
    library = slots.build(tmp_path_factory.mktemp("slots"))
    return functools.partial(slots.environment, library)


@pytest.fixture
def ubi(undo: Undo, data_path: str, request: pytest.FixtureRequest) -> Iterator[Ubi]:
    """Makes devices."""
    if os.geteuid() != 0 or not os.path.exists("/dev/ublk-control"):
        pytest.skip("needs root and a kernel with ublk: run it in tools/lab")
    marker = request.node.get_closest_marker("limit")
    limit_s = float(marker.args[0]) if marker else LIMIT_S
    environment: dict[str, str] = {}
    if data_path == "fallback":
        environment = request.getfixturevalue("few_slots")(0)
    made = Ubi(
        undo, PREFIX, limit_s, environment=environment,
        data_path="zero-copy" if data_path == "fallback" else data_path,
    )
    yield made
    assert not made.rescued, f"not done within {limit_s:g} s; its devices were killed"


@pytest.fixture
def no_watch() -> Iterator[None]:
    """Bring back what died by hand: the place of the one that does it unasked is taken."""
    RUN_ROOT.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(RUN_ROOT / ".watch.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
    os.close(fd)


@pytest.fixture(scope="session")
def mortal_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mortal(tmp_path_factory.mktemp("mortal"))


@pytest.fixture
def mortal(mortal_library: Path, tmp_path: Path, undo: Undo) -> Mortal:
    """What daemons of one device do, and when they die."""
    return Mortal(mortal_library, tmp_path, undo)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's seed: of its name and UBLK_UBI_SEED; printed, so that a failure shows it."""
    start = os.environ.get("UBLK_UBI_SEED", "1")
    value = zlib.crc32(f"{start} {request.node.name}".encode())
    print(f"UBLK_UBI_SEED={start}: seed {value}")
    return value


@pytest.fixture
def make_image(stores: Stores, seed: int) -> Callable[..., Image]:
    """Give a function that makes an image of `size` bytes on a filesystem or block device.

    `holes` is the share of it that is zeros (of a file: real holes).
    """
    def make(size: int, *, on: str = "ext4", holes: float = 0.0) -> Image:
        content = random_content(size, seed, holes=holes)
        if on in FOLDERS:
            return write_file(stores.folder(on) / "image", content)
        return write_block(stores.block(on, size), content)

    return make


@pytest.fixture
def make_base(stores: Stores) -> Callable[..., str]:
    """Give a function that finds a place for the base of a disk of `size` bytes.

    A path where no file is yet (`add` makes it: give it `size`), or a zeroed block device.
    """
    def make(size: int, *, on: str = "ext4") -> str:
        if on in FOLDERS:
            return str(stores.folder(on) / "base")
        return stores.block(on, METADATA_SIZE + size)

    return make
