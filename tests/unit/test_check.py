"""`check`: what is wrong with a base, and what it has against its image. Disks are made by hand."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from cli.kit import Result, inline, is_one_line
from handmade import HERE, MIB, SLOT_0, SLOT_1, UUID, disk, slot

from ublk_ubi.check import check_base

if TYPE_CHECKING:
    from pathlib import Path

STRIPE = 64 << 10
STRIPES = 11
SIZE = 10 * STRIPE + 512           # the last stripe is a sector
BASE_SIZE = 8 * MIB + STRIPES * STRIPE
SOUND, PROBLEMS, FAILED = 0, 4, 8


def content(stripe: int) -> bytes:
    """What the image has there: no two stripes alike, none of zeros but number 3."""
    length = min(STRIPE, SIZE - stripe * STRIPE)
    return bytes(length) if stripe == 3 else bytes([stripe + 1]) * length


def fingerprint(data: bytes) -> bytes:
    """As docs/on-disk-format.md has it."""
    digest = hashlib.blake2b(digest_size=32, person=b"ublk-ubi image 1")
    digest.update(len(data).to_bytes(8, "little"))
    blocks = len(data) // 4096
    starts = [(0, MIB), (max(0, len(data) - MIB), MIB)]
    starts += [(4096 * (blocks * i // 65), 4096) for i in range(1, 65)]
    for start, length in starts:
        digest.update(data[start : start + length])
    return digest.digest()


class Disk:
    """An image, and a base that says that it has some stripes of it."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "image"
        self.base = folder / "base"
        self.run = folder / "run"
        self.content = b"".join(content(stripe) for stripe in range(STRIPES))
        self.image.write_bytes(self.content)

    def make(self, *hydrated: int, bdev_ubi: bool = False, size: int = BASE_SIZE,
             **fields: Any) -> None:
        """A disk whose stripes are as they should be; `fields` are the slots'."""
        values = {
            "stripe_size": STRIPE, "image_size": SIZE, "fingerprint": fingerprint(self.content),
        } | fields
        slots = () if bdev_ubi else (slot(sequence=7, **values), slot(sequence=8, **values))
        is_open = bool(fields.get("flags"))
        data = disk(*slots, minor=2 if is_open else 1, stripe_byte=STRIPE >> 10, hydrated=hydrated)
        self.base.write_bytes(data)
        os.truncate(self.base, size)
        for stripe in hydrated:
            if stripe < STRIPES:
                self.put(stripe, content(stripe))

    def put(self, stripe: int, data: bytes, at: int = 0) -> None:
        with self.base.open("r+b") as file:
            file.seek(8 * MIB + stripe * STRIPE + at)
            file.write(data)

    def write(self, offset: int, data: bytes) -> None:
        with self.base.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def table(self, *rows: int, latch: int = 0, locked: bool = False) -> int | None:
        """The record of writes of a daemon of this boot (`table.py` says what is where)."""
        from ublk_ubi import table

        folder = self.run / ".tables"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / UUID.hex
        identity = table.Identity(
            UUID.bytes, fingerprint(self.content), 3, 0, 0, SIZE, STRIPE, STRIPES,
        )
        head = bytearray(4096)
        sealed = table._pack(identity, HERE.bytes)
        head[: len(sealed)] = sealed
        struct.pack_into("<I", head, 256, latch)
        path.write_bytes(bytes(head) + bytes(int(n in rows) for n in range(STRIPES)))
        if not locked:
            return None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    def check(self, *words: object) -> Result:
        """Run the command; nothing may have changed."""
        before = self.base.read_bytes(), self.image.read_bytes()
        result = inline("check", str(self.base), *(str(word) for word in words))
        assert (self.base.read_bytes(), self.image.read_bytes()) == before
        return result

    def json(self, *words: object) -> tuple[int, dict[str, Any]]:
        result = self.check(*words, "--json")
        assert result.err == ""
        found: dict[str, Any] = json.loads(result.out)
        assert found["schema"] == 1
        return result.code, found


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(tmp_path)
    monkeypatch.setenv("UBLK_UBI_RUN", str(made.run))
    return made


def counts(found: dict[str, Any]) -> tuple[int, int, int, int]:
    compared = found["against_image"]
    return tuple(compared[key] for key in ("equal", "differ", "zeros", "errors"))  # type: ignore[return-value]


# -- against the image ------------------------------------------------------------------------

def test_a_sound_disk(made: Disk) -> None:
    made.make(0, 3, 10)
    code, found = made.json("--image", made.image)
    assert (code, found["problems"], counts(found)) == (SOUND, [], (3, 0, 0, 0))
    assert (found["hydrated"], found["image_stripes"], found["stripe_size"]) == (3, 11, STRIPE)
    shown = made.check("--image", made.image)
    assert (shown.code, shown.err) == (SOUND, "")
    assert "3 equal, 0 differ, 0 zero where it is not, 0 not readable" in shown.out
    assert shown.out.rstrip().endswith("sound")


def test_what_guests_wrote_differs_and_is_no_problem(made: Disk) -> None:
    made.make(0, 1, 2, 10)
    made.put(1, b"written", at=STRIPE - 7)
    made.put(2, bytes(STRIPE))
    made.put(10, b"behind the image's end", at=4096)
    code, found = made.json("--image", made.image)
    assert (code, found["problems"], counts(found)) == (SOUND, [], (1, 2, 1, 0))


def test_wrong_claims_of_bdev_ubi(made: Disk) -> None:
    """Stripes that it marked and never fetched: the base has holes there."""
    made.make(0, 1, 2, 3, bdev_ubi=True)
    for stripe in (1, 2):
        made.put(stripe, bytes(STRIPE))
    code, found = made.json("--image", made.image)
    assert (code, counts(found), found["kind"]) == (PROBLEMS, (2, 0, 2, 0), "bdev_ubi")
    [problem] = found["problems"]
    assert problem.startswith("2 stripes are marked hydrated and hold zeros")
    # Without the image nobody can tell.
    assert made.json()[0] == SOUND


def test_a_disk_of_bdev_ubis_may_not_record_its_stripes(made: Disk) -> None:
    made.make(0, bdev_ubi=True)
    made.write(13, b"\0")
    refused = made.check("--image", made.image)
    assert (refused.code, is_one_line(refused.err)) == (FAILED, True)
    assert "--stripe-size" in refused.err
    code, found = made.json("--image", made.image, "--stripe-size", "1M")
    assert found["stripe_size"] == MIB
    assert code == SOUND
    assert sum(counts(found)) == 1


def test_another_image(made: Disk) -> None:
    made.make(0, 1)
    made.image.write_bytes(b"y" + made.content[1:])
    code, found = made.json("--image", made.image)
    assert (code, counts(found)) == (PROBLEMS, (1, 1, 0, 0))
    [problem] = found["problems"]
    assert "is not the one it was made from" in problem


@pytest.mark.parametrize("size", [SIZE - 512, SIZE + 512])
def test_an_image_of_another_size_is_not_compared(made: Disk, size: int) -> None:
    made.make(0)
    os.truncate(made.image, size)
    refused = made.check("--image", made.image)
    assert (refused.code, is_one_line(refused.err)) == (FAILED, True)
    assert str(size) in refused.err
    assert str(SIZE) in refused.err


# -- the base alone ------------------------------------------------------------------------------

def test_a_slot_that_is_torn(made: Disk) -> None:
    made.make(0)
    made.write(SLOT_0 + 40, b"torn")
    code, found = made.json()
    assert (code, len(found["problems"])) == (PROBLEMS, 1)
    assert found["problems"][0].startswith("extension 0 is ")
    made.write(SLOT_1 + 40, b"torn")
    code, found = made.json()
    assert (code, found["kind"]) == (PROBLEMS, "damaged")


def test_one_slot_that_was_never_written_is_sound(made: Disk) -> None:
    """A disk that was made and not opened since."""
    made.make(0)
    made.write(SLOT_0, bytes(512))
    assert made.json()[0] == SOUND


def test_a_stripe_past_the_image(made: Disk) -> None:
    made.make(0, STRIPES, STRIPES + 5)
    code, found = made.json()
    assert code == PROBLEMS
    assert found["problems"] == ["2 stripes past the image are marked hydrated"]


def test_a_base_that_was_cut_off(made: Disk) -> None:
    made.make(0, size=BASE_SIZE - 512)
    code, found = made.json()
    assert code == PROBLEMS
    [problem] = found["problems"]
    assert str(BASE_SIZE) in problem
    assert "cut off" in problem


@pytest.mark.parametrize(
    ("data", "kind"),
    [(bytes(9 * MIB), "empty"), (os.urandom(9 * MIB), "foreign"), (b"short", "damaged")],
)
def test_what_is_no_disk(made: Disk, data: bytes, kind: str) -> None:
    made.base.write_bytes(data)
    code, found = made.json()
    assert (code, len(found["problems"])) == (PROBLEMS, 1), found
    assert found["kind"] in (kind, "foreign", "empty", "damaged")
    assert found["hydrated"] is None
    assert made.check().code == PROBLEMS


@pytest.mark.parametrize("what", ["none", "folder", "fifo"])
@pytest.mark.parametrize("role", ["base", "image"])
def test_what_cannot_be_looked_at(made: Disk, what: str, role: str) -> None:
    """Nothing there, or nothing that could be it: one line, and the code for "not checked"."""
    made.make(0)
    path = made.base if role == "base" else made.image
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    result = inline("check", str(made.base), "--image", str(made.image))
    assert (result.code, result.out, is_one_line(result.err)) == (FAILED, "", True), result
    assert str(path) in result.err


def test_a_base_that_cannot_be_read(made: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata: nothing can be said then."""
    made.make(0)
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if offset == 0 and length > MIB:
            raise OSError(5, "Input/output error")
        return real(fd, length, offset)

    monkeypatch.setattr("ublk_ubi.check.os.pread", pread)
    result = inline("check", str(made.base))
    assert (result.code, is_one_line(result.err)) == (FAILED, True), result
    assert "Input/output error" in result.err


def test_wrong_usage(made: Disk) -> None:
    made.make(0)
    assert inline("check").code == 2
    assert made.check("--stripe-size", "5GB").code == 2


# -- its record of writes --------------------------------------------------------------------------

OPEN = {"flags": 1, "boot_id": HERE.bytes}


def test_a_record_that_fits(made: Disk) -> None:
    made.make(0, 1, **OPEN)
    made.table(0, 1, 2)
    code, found = made.json()
    assert (code, found["problems"]) == (SOUND, [])
    assert found["notes"] == ["it was not closed: in use, or its daemon died"]


def test_a_device_that_uses_it_is_told(made: Disk) -> None:
    made.make(0, 1, **OPEN)
    fd = made.table(0, 1, locked=True)
    assert fd is not None
    code, found = made.json("--image", made.image)
    os.close(fd)
    assert (code, found["problems"]) == (SOUND, [])
    assert "a device uses it now: this is a moment's view" in found["notes"]


def test_a_record_that_is_gone(made: Disk) -> None:
    made.make(0, **OPEN)
    code, found = made.json()
    assert code == PROBLEMS
    assert "acknowledged writes may be lost" in found["problems"][0]


def test_a_record_of_a_failed_fdatasync(made: Disk) -> None:
    made.make(0, **OPEN)
    made.table(0, latch=5)
    code, found = made.json()
    assert (code, found["problems"]) == (
        PROBLEMS, ["an fdatasync of it failed (Input/output error): writes may be lost"],
    )


def test_a_record_that_is_damaged(made: Disk) -> None:
    made.make(0, **OPEN)
    made.table(0)
    path = made.run / ".tables" / UUID.hex
    path.write_bytes(b"x" * path.stat().st_size)
    code, found = made.json()
    assert (code, "is damaged" in found["problems"][0]) == (PROBLEMS, True)


def test_a_foreign_writer(made: Disk) -> None:
    """Header bits that the daemon knows nothing of."""
    made.make(0, 4, 7, **OPEN)
    made.table(0, 1)
    code, found = made.json()
    assert code == PROBLEMS
    [problem] = found["problems"]
    assert problem.startswith("2 stripes are marked hydrated that its daemon did not hydrate (4, 7")


def test_power_was_lost(made: Disk) -> None:
    """Its record went with the machine, as it must."""
    made.make(0, flags=1, boot_id=uuid.uuid4().bytes)
    code, found = made.json()
    assert (code, found["problems"]) == (SOUND, [])
    assert found["notes"] == ["it was open when its machine went down: what was flushed is there"]


def test_progress_is_told(made: Disk) -> None:
    made.make(0, 1, 2)
    told: list[tuple[int, int]] = []
    check_base(
        str(made.base), image=str(made.image), progress=lambda *words: told.append(words),
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
