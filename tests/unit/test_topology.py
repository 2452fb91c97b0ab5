"""What lies on what, on machines made of plain files: sysfs and procfs as the kernel shows them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ublk_ubi.topology import Node, Topology, node_of


class Machine:
    """Builds /sys and /proc in a folder; devices are made in any order."""

    def __init__(self, root: Path) -> None:
        self.sys, self.proc, self.dev = root / "sys", root / "proc", root / "dev"
        for folder in (self.sys / "dev/block", self.sys / "block", self.proc / "self", self.dev):
            folder.mkdir(parents=True)
        self.mounts: list[str] = []
        self.partitions = 0
        self.topology = Topology(str(self.sys), str(self.proc), str(self.dev))

    def _device(self, folder: Path, major: int, minor: int) -> Node:
        folder.mkdir(parents=True)
        (folder / "holders").mkdir()
        (folder / "dev").write_text(f"{major}:{minor}\n")
        (self.sys / f"dev/block/{major}:{minor}").symlink_to(folder)
        return Node(is_device=True, device=os.makedev(major, minor), inode=0)

    def disk(self, name: str, major: int, minor: int = 0) -> Node:
        folder = self.sys / "devices/virtual/block" / name
        node = self._device(folder, major, minor)
        (folder / "slaves").mkdir()
        (folder / "queue").mkdir()
        (self.sys / "block" / name).symlink_to(folder)
        return node

    def partition(
        self, disk: Node, number: int, start: int, sectors: int, device: int | None = None,
    ) -> Node:
        parent = self.folder(disk)
        folder = parent / f"{parent.name}{number}"
        if device is None:
            self.partitions += 1
            device = os.makedev(259, self.partitions)
        node = self._device(folder, os.major(device), os.minor(device))
        (folder / "partition").write_text(f"{number}\n")
        (folder / "start").write_text(f"{start}\n")
        (folder / "size").write_text(f"{sectors}\n")
        return node

    def folder(self, node: Node) -> Path:
        found = self.topology.folder(node.device)
        assert found is not None
        return Path(found)

    def mapped(self, kind: str, name: str, minor: int, *slaves: Node) -> Node:
        node = self.disk(f"{kind}-{minor}" if kind == "dm" else f"md{minor}", 253, minor)
        if kind == "dm":
            (self.folder(node) / "dm").mkdir()
            (self.folder(node) / "dm/name").write_text(f"{name}\n")
        for slave in slaves:
            below, above = self.folder(slave), self.folder(node)
            (above / "slaves" / below.name).symlink_to(below)
            (below / "holders" / above.name).symlink_to(above)
        return node

    def loop(self, number: int, backing: Path, offset: int = 0, limit: int = 0) -> Node:
        node = self.disk(f"loop{number}", 7, number)
        folder = self.folder(node) / "loop"
        folder.mkdir()
        (folder / "backing_file").write_text(f"{backing}\n")
        (folder / "offset").write_text(f"{offset}\n")
        (folder / "sizelimit").write_text(f"{limit}\n")
        return node

    def mount(self, number: str, point: str, source: str, options: str = "rw") -> None:
        self.mounts.append(
            f"{len(self.mounts) + 20} 1 {number} / {point} {options},relatime shared:1 - ext4 "
            f"{source} {options}")
        (self.proc / "self/mountinfo").write_text("\n".join(self.mounts) + "\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x")
    return path


def file_node(path: Path) -> Node:
    return node_of(path.stat())


def apart(machine: Machine, a: Node, b: Node) -> bool:
    there, back = machine.topology.overlap(a, b), machine.topology.overlap(b, a)
    assert (there is None) == (back is None)
    return there is None


# storage that is shared ---------------------------------------------------------------------


def test_a_device_and_a_file_are_themselves(machine: Machine, file: Path):
    sda, sdb = machine.disk("sda", 8), machine.disk("sdb", 8, 16)
    assert machine.topology.overlap(sda, sda) == sda
    assert apart(machine, sda, sdb)
    other = file.with_name("other")
    other.touch()
    assert machine.topology.overlap(file_node(file), file_node(file)) == file_node(file)
    assert apart(machine, file_node(file), file_node(other))
    link = file.with_name("hard")
    os.link(file, link)
    assert not apart(machine, file_node(link), file_node(file))


def test_a_partition_and_its_disk(machine: Machine):
    sda = machine.disk("sda", 8)
    one, two = machine.partition(sda, 1, 2048, 4096), machine.partition(sda, 2, 6144, 4096)
    for part in (one, two):
        assert machine.topology.overlap(sda, part) == sda
        assert machine.topology.overlap(part, sda) == sda
    assert apart(machine, one, two)


def test_partitions_that_overlap(machine: Machine):
    sda = machine.disk("sda", 8)
    extended, logical = machine.partition(sda, 1, 2048, 9000), machine.partition(sda, 5, 4096, 10)
    assert machine.topology.overlap(extended, logical) == sda


def test_device_mapper_and_what_is_under_it(machine: Machine):
    sda, sdb = machine.disk("sda", 8), machine.disk("sdb", 8, 16)
    one, two = machine.partition(sda, 1, 2048, 4096), machine.partition(sda, 2, 6144, 4096)
    root = machine.mapped("dm", "vg-root", 0, one)
    home = machine.mapped("dm", "vg-home", 1, one)
    crypt = machine.mapped("dm", "crypt", 2, root)
    for upper in (root, home, crypt):
        assert not apart(machine, upper, one)
        assert not apart(machine, upper, sda)
        assert apart(machine, upper, two)
        assert apart(machine, upper, sdb)
    assert not apart(machine, crypt, root)
    assert apart(machine, root, home), "two volumes of one disk are two disks"
    assert apart(machine, crypt, home)


def test_md_over_two_disks(machine: Machine):
    sda, sdb, sdc = (machine.disk(f"sd{c}", 8, 16 * n) for n, c in enumerate("abc"))
    raid = machine.mapped("md", "", 9, sda, sdb)
    assert not apart(machine, raid, sda)
    assert not apart(machine, raid, sdb)
    assert apart(machine, raid, sdc)


def test_loop_devices(machine: Machine, file: Path):
    whole = machine.loop(0, file)
    head, tail = machine.loop(1, file, 0, 4096), machine.loop(2, file, 4096, 4096)
    part = machine.partition(whole, 1, 8, 8)  # bytes 4096 to 8192 of the file
    for upper in (whole, head, tail, part):
        assert machine.topology.overlap(upper, file_node(file)) == file_node(file)
    assert not apart(machine, whole, head)
    assert apart(machine, head, tail)
    assert apart(machine, head, part)
    assert not apart(machine, tail, part)
    assert apart(machine, machine.loop(3, file.with_name("gone")), file_node(file))


def test_a_file_and_the_device_of_its_filesystem(machine: Machine, file: Path):
    device = file.stat().st_dev
    own = machine.disk("sda", os.major(device), os.minor(device))
    other = file.with_name("other")
    other.touch()
    assert machine.topology.overlap(file_node(file), own) == own
    assert not apart(machine, machine.loop(0, file), own)
    assert apart(machine, file_node(file), file_node(other))
    assert apart(machine, file_node(file), machine.loop(1, other))


def test_a_file_on_a_partition_does_not_touch_another(machine: Machine, file: Path):
    device = file.stat().st_dev
    sda = machine.disk("sda", 8, 16)
    one = machine.partition(sda, 1, 2048, 4096, device)
    two = machine.partition(sda, 2, 6144, 4096)
    assert not apart(machine, file_node(file), one)
    assert not apart(machine, file_node(file), sda)
    assert apart(machine, file_node(file), two)


# who uses it --------------------------------------------------------------------------------


def test_nobody(machine: Machine, file: Path):
    sda = machine.disk("sda", 8)
    machine.partition(sda, 1, 2048, 4096)
    machine.mount("8:16", "/other", "/dev/sdb")
    assert machine.topology.user_of(sda) is None
    assert machine.topology.user_of(file_node(file)) is None


def test_a_mount(machine: Machine):
    sda = machine.disk("sda", 8)
    one, two = machine.partition(sda, 1, 2048, 4096), machine.partition(sda, 2, 6144, 4096)
    machine.mount("259:1", "/mnt/my\\040disk", "/dev/sda1")
    for node in (sda, one):
        user = machine.topology.user_of(node)
        assert user is not None
        assert user.what.endswith("/sda1 is mounted on /mnt/my disk")
        assert user.way_out == "`umount /mnt/my disk` first"
    assert machine.topology.user_of(two) is None
    assert machine.topology.user_of(sda, partitions=False) is None


def test_a_mount_far_above(machine: Machine, file: Path):
    loop = machine.loop(0, file)
    one = machine.partition(loop, 1, 8, 8)
    crypt = machine.mapped("dm", "crypt", 0, one)
    machine.mount("253:0", "/secret", "/dev/mapper/crypt")
    for node in (file_node(file), loop, one, crypt):
        user = machine.topology.user_of(node)
        assert user is not None
        assert user.what.endswith("/mapper/crypt is mounted on /secret")


def test_a_filesystem_without_a_number_of_its_own(machine: Machine, monkeypatch):
    sda = machine.disk("sda", 8)
    node = machine.dev / "sda"
    node.touch()
    machine.mount("0:37", "/data", str(node))
    assert machine.topology.user_of(sda) is None, "a plain file is no device"
    real = os.stat

    def as_device(path, **options):
        if str(path) != str(node):
            return real(path, **options)
        values = list(real(path)) + [0] * 20
        values[0] = stat.S_IFBLK | 0o600
        return os.stat_result(values[:10], {"st_rdev": sda.device})

    monkeypatch.setattr(os, "stat", as_device)
    user = machine.topology.user_of(sda)
    assert user is not None
    assert "/data" in user.what


def test_holders(machine: Machine):
    sda, sdb = machine.disk("sda", 8), machine.disk("sdb", 8, 16)
    one = machine.partition(sda, 1, 2048, 4096)
    machine.mapped("dm", "vg-root", 0, one)
    machine.mapped("md", "", 9, sdb)
    for node in (sda, one):
        user = machine.topology.user_of(node)
        assert user is not None
        assert "sda1 is part of" in user.what
        assert user.way_out.startswith("`dmsetup remove /")
        assert user.way_out.endswith("/mapper/vg-root` first")
    user = machine.topology.user_of(sdb)
    assert user is not None
    assert user.way_out.startswith("`mdadm --stop /")


def test_a_loop_device_on_a_file(machine: Machine, file: Path):
    machine.loop(3, file)
    user = machine.topology.user_of(file_node(file))
    assert user is not None
    assert user.what.endswith("/loop3 is attached to it")
    assert user.way_out.startswith("`losetup -d ")


def test_a_swap_file(machine: Machine, file: Path):
    header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    (machine.proc / "swaps").write_text(header)
    assert machine.topology.user_of(file_node(file)) is None
    (machine.proc / "swaps").write_text(f"{header}/gone file 4 0 -2\n{file} file 4 0 -2\n")
    user = machine.topology.user_of(file_node(file))
    assert user is not None
    assert "used as swap" in user.what
    assert "swapoff" in user.way_out


def test_mounted_for_writing(machine: Machine):
    sda = machine.disk("sda", 8)
    machine.mount("8:0", "/ro", "/dev/sda", "ro")
    assert machine.topology.mount_point(sda.device) == "/ro"
    assert machine.topology.mount_point(sda.device, writable_only=True) is None
    machine.mount("8:0", "/rw", "/dev/sda")
    assert machine.topology.mount_point(sda.device, writable_only=True) == "/rw"


def test_a_hostile_mount_point_stays_in_one_line(machine: Machine):
    sda = machine.disk("sda", 8)
    machine.mount("8:0", "/a\\012b", "/dev/sda")
    point = machine.topology.mount_point(sda.device)
    assert point == "'/a\\nb'"


# small questions ----------------------------------------------------------------------------


def test_names(machine: Machine):
    sda = machine.disk("cciss!c0d0", 104)
    assert machine.topology.name(sda.device) == f"{machine.dev}/cciss/c0d0"
    dm = machine.mapped("dm", "vg-root", 0, sda)
    assert machine.topology.name(dm.device) == f"{machine.dev}/mapper/vg-root"
    assert machine.topology.name(os.makedev(9, 9)) == "device 9:9"


def test_disks_and_their_queues(machine: Machine):
    sda = machine.disk("sda", 8)
    one = machine.partition(sda, 1, 2048, 4096)
    topology = machine.topology
    assert topology.disk_of(one.device) == topology.disk_of(sda.device) == sda.device
    assert topology.disk_of(os.makedev(9, 9)) == os.makedev(9, 9)
    assert not topology.is_host_managed(one.device)
    assert not topology.offloads_zeroes(one.device)
    queue = machine.folder(sda) / "queue"
    (queue / "zoned").write_text("host-managed\n")
    (queue / "write_zeroes_max_bytes").write_text("33553920\n")
    for node in (sda, one):
        assert topology.is_host_managed(node.device)
        assert topology.offloads_zeroes(node.device)
    (queue / "zoned").write_text("host-aware\n")
    (queue / "write_zeroes_max_bytes").write_text("0\n")
    assert not topology.is_host_managed(sda.device)
    assert not topology.offloads_zeroes(sda.device)


def test_who_locks_a_file(machine: Machine, file: Path):
    st = file.stat()
    key = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}:{st.st_ino}"
    (machine.proc / "77").mkdir()
    (machine.proc / "77/comm").write_text("ubi daemon\n")
    (machine.proc / "locks").write_text(
        f"1: FLOCK  ADVISORY  WRITE 77 {key} 0 EOF\n"
        f"1: -> FLOCK  ADVISORY  WRITE 78 {key} 0 EOF\n"
        f"2: FLOCK  ADVISORY  READ 79 {key} 0 EOF\n"
        f"3: FLOCK  ADVISORY  WRITE 80 {key}1 0 EOF\n"
        f"4: POSIX  ADVISORY  WRITE 81 {key} 0 EOF\n")
    assert machine.topology.lockers(st) == ["process 77 (ubi daemon)", "process 79 (gone)"]


def test_a_machine_without_procfs_and_sysfs(tmp_path: Path, file: Path):
    topology = Topology(*(str(tmp_path / name) for name in "spd"))
    assert topology.user_of(file_node(file)) is None
    assert topology.loops() == []
    assert topology.lockers(file.stat()) == []
    assert topology.mount_point(os.makedev(8, 0)) is None
