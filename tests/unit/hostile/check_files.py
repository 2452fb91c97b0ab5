"""The opener as the daemon has it: on a ring, with real files for base and tables.

It opens a base exactly when the rules allow it, explains why not in one line, and leaves the base
that it refuses as it was, and the table that it refuses.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from unit.hostile import layout, mutate, report, rules, tables
from unit.hostile.rules import Table

from ublk_ubi._opener import REFUSALS, Opener, Refused
from ublk_ubi.errors import UbiError
from ublk_ubi.options import DeviceOptions
from ublk_ubi.refusals import explain
from ublk_ubi.table import TableHost, boot_id

last = report.Last()
FOLDER = sys.argv[2]
BASE = os.path.join(FOLDER, "base")
HERE = boot_id()
EXAMPLES = {
    "closed": 5, "open here": 9, "open elsewhere": 3, "bdev_ubi": 4, "cut short": 1, "noise": 1,
}


class Host(TableHost):
    """The tables, and nothing of a device."""

    def before_write(self, opener: Opener) -> None:
        assert opener.image_stripes > 0

    def zero_tail(self, opener: Opener) -> None:
        assert opener.creating

    def created(self) -> None:
        pass


class Scene:
    """A case as files. The rules' "here" and "elsewhere" become this boot and another."""

    def __init__(self, case: mutate.Case, changes: list[tuple[str, int, bytes]]) -> None:
        self.case = case
        self.undo = contextlib.ExitStack()
        asked = case.asked
        self.fd = os.open(BASE, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self.undo.callback(os.close, self.fd)
        os.truncate(self.fd, asked.base_bytes)
        for number, block in case.disk.blocks.items():
            os.pwrite(self.fd, block, number * layout.BLOCK)
        self.sync_fd = os.open(BASE, os.O_RDWR)
        self.undo.callback(os.close, self.sync_fd)
        # Where an opener will look depends on the base alone; nowhere when it makes a new disk.
        slot = rules.judge(case.disk, asked, Table(), Table()).slot
        self.path = os.path.join(FOLDER, slot.uuid.hex()) if slot else os.devnull
        self.table = self.put(self.path, case.table, changes) if slot else Table()
        self.temporary = self.put(self.path + ".new", case.temporary, []) if slot else Table()

    def put(self, path: str, table: Table, changes: list[tuple[str, int, bytes]]) -> Table:
        """Make a table's file; what it is to an opener."""
        if table.state == "none":
            return table
        data = tables.apply(tables.pack(table, HERE), changes)
        with open(path, "wb") as file:
            file.write(data)
        self.undo.callback(self.remove, path)
        if table.state != "live" and ("live", 0, b"") not in changes:
            return tables.unpack(data, HERE)
        holder = os.open(path, os.O_RDONLY)
        self.undo.callback(os.close, holder)
        fcntl.flock(holder, fcntl.LOCK_EX)
        return Table("live")

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def opener(self) -> Opener:
        asked = self.case.asked
        return Opener(
            base_fd=self.fd, sync_fd=self.sync_fd, base_bytes=asked.base_bytes,
            image_bytes=asked.image_bytes, identity=(asked.device, asked.inode),
            fingerprint=asked.fingerprint, new_uuid=asked.new_uuid, boot_id=asked.boot_id,
            stripe_bytes=asked.stripe_bytes, default_stripe_bytes=asked.default_stripe_bytes,
            block_bytes=asked.block_bytes, device_bytes=asked.device_bytes,
            format=asked.format, adopt=asked.adopt, force=asked.force,
            force_stale=asked.force_stale, no_image=asked.no_image,
        )

    def holds(self) -> bytes:
        """The tables' files, whole."""
        found = []
        for path in (self.path, self.path + ".new"):
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                found.append(file.read())
        return b"|".join(found)

    def disk(self) -> layout.Disk:
        """The base as it is now."""
        disk = layout.Disk()
        at = 0
        while at < layout.METADATA:
            try:
                at = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:
                break
            if at < layout.METADATA:
                end = min(os.lseek(self.fd, at, os.SEEK_HOLE), layout.METADATA)
                disk.write(at, os.pread(self.fd, end - at, at))
                at = end
        return disk


def judged_by_the_rules(case: mutate.Case, changes: list[tuple[str, int, bytes]]) -> None:
    last.note((case, changes))
    scene = Scene(case, changes)
    with scene.undo:
        verdict = rules.judge(case.disk, case.asked, scene.table, scene.temporary)
        before = scene.holds()
        host, opener = Host(FOLDER), scene.opener()
        try:
            opener.open(host)
        except Refused as refused:
            is_refused_well(scene, verdict, refused)
            assert scene.holds() == before or scene.table.state == "none"
            return
        scene.undo.callback(host.table.close)
        without = " without an image" if case.asked.no_image else ""
        report.counts[f"opened: {verdict.way}{without}"] += 1
        assert not verdict.refused, f"opened in spite of {verdict.reasons}"
        is_opened_as_the_rules_say(scene, verdict, host, opener)


def is_refused_well(scene: Scene, verdict: rules.Judgement, refused: Refused) -> None:
    """For a reason that is one, in words, and nothing was written."""
    report.counts[f"refused: {refused.reason}"] += 1
    assert refused.reason in verdict.reasons, f"{refused.reason}, not {verdict}"
    assert scene.disk() == scene.case.disk
    options = DeviceOptions(
        image="image", base=BASE, stripe_size=scene.case.asked.stripe_bytes or None,
    )
    asked = scene.case.asked
    image = None if asked.no_image else SimpleNamespace(path="image", size=asked.image_bytes)
    base = SimpleNamespace(path=BASE, size=scene.case.asked.base_bytes)
    error = explain(refused.reason, refused.opener, options, image, base)
    assert isinstance(error, UbiError)
    assert BASE in error.message
    assert error.message.isprintable(), error.message


def is_opened_as_the_rules_say(
    scene: Scene, verdict: rules.Judgement, host: Host, opener: Opener,
) -> None:
    """Its table is there and is the base's; a clean stop takes it away."""
    asked = verdict.asked
    slot = rules.newest(scene.disk())
    stripes = rules.stripes_of(asked.image_bytes, verdict.stripe)
    assert slot is not None
    assert opener.going_on == (verdict.way == "go on")
    assert (opener.stripe_bytes, opener.image_stripes) == (verdict.stripe, stripes)
    assert slot.flags & layout.OPEN
    with open(os.path.join(FOLDER, slot.uuid.hex()), "rb") as file:
        table = tables.unpack(file.read(), HERE)
    assert table.identity == rules.identity(slot, asked)
    assert not table.latch
    headers = rules.headers(scene.disk(), stripes)
    if verdict.way == "go on":
        assert scene.disk() == scene.case.disk
        assert table.rows == scene.table.rows
    else:
        assert table.rows == bytes(map(bool, headers))
    opener.close(host)
    assert not os.path.exists(host.path)
    again = rules.newest(scene.disk())
    assert again is not None
    assert not again.flags & layout.OPEN
    assert again.sequence > slot.sequence


if __name__ == "__main__":
    rare = {"nothing", "io", "too_many_stripes", "too_small", "stripe_range", "newer",
            "fingerprint", "stripe_size", "image_size", "adopt", "foreign_writer", "needs_image"}
    for number in report.rounds({f"refused: {reason}" for reason in set(REFUSALS) - rare} | {
            f"opened: {way}" for way in ("adopt", "open", "go on", "go on without an image")}):
        for kind, first, examples in mutate.plan(EXAMPLES):
            given_them = given(mutate.hostile(kind, first), st.just([]))
            report.profile(examples, number)(given_them(judged_by_the_rules))()
        with_table = given(mutate.hostile("open here", "nothing"), tables.happenings())
        report.profile(100, number)(with_table(judged_by_the_rules))()
    report.finish()
