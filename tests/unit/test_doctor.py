"""What `doctor` makes of machines that we do not have."""

from __future__ import annotations

import resource

import pytest

from ublk_ubi import doctor
from ublk_ubi.abi import Feature
from ublk_ubi.errors import UbiError

ALL_CAPABILITIES = (1 << 41) - 1
DEBIAN = "Linux version 6.12.95 (debian-kernel@lists.debian.org)"
UBUNTU = "Linux version 6.17.0-1015-azure (buildd@lcy02-amd64-033) (gcc (Ubuntu 13.3.0))"
FEATURES_OF_6_12 = Feature(0x1FE)
FEATURES_OF_7_3 = Feature(0x1EFFFF)


def by_name(checks):
    return {check.name: check for check in checks}


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.12.95+deb13-amd64", (6, 12, 95)),
        ("6.17.0-1015-azure", (6, 17, 0)),
        ("7.3.4", (7, 3, 4)),
        ("7.1-rc2", (7, 1, 0)),
        ("gibberish", (0, 0, 0)),
    ],
)
def test_versions(release, version):
    assert doctor.kernel_version(release) == version


@pytest.mark.parametrize(
    ("release", "status"),
    [("6.1.0-38-amd64", "fail"), ("6.4.9", "fail"), ("6.5.0", "ok"), ("7.3.4", "ok")],
)
def test_kernel_age(release, status):
    check = doctor.check_kernel(release)
    assert (check.status, bool(check.advice)) == (status, status == "fail")


def test_a_kernel_without_zero_copy_says_so():
    assert "zero copy" in doctor.check_kernel("6.12.95+deb13-amd64").found
    assert "zero copy" not in doctor.check_kernel("6.16.0").found


@pytest.mark.parametrize(
    ("release", "proc_version", "status"),
    [
        ("6.12.95+deb13-amd64", DEBIAN, "ok"),
        ("6.17.0-1015-azure", UBUNTU, "fail"),
        ("6.17.9-arch1-1", "Linux version 6.17.9-arch1-1 (linux@archlinux)", "ok"),
        ("6.18.3", "", "warn"),
        ("6.18.4-arch1-1", "", "fail"),
        ("6.18.5", "", "fail"),
        ("6.18.6", "", "warn"),
        ("7.0.2", "", "warn"),
        ("7.3.4", "", "ok"),
    ],
)
def test_known_trouble(release, proc_version, status):
    checks = doctor.check_known_trouble(release, proc_version)
    assert all(check.advice for check in checks if check.status != "ok")
    assert max((check.status for check in checks), key=["ok", "warn", "fail"].index) == status


def test_capabilities():
    assert doctor.check_capabilities(ALL_CAPABILITIES).status == "ok"
    assert doctor.check_capabilities(ALL_CAPABILITIES & ~(1 << 24)).status == "warn"
    check = doctor.check_capabilities(0)
    assert check.status == "fail"
    assert "sudo" in check.advice


def test_features_of_a_new_kernel_are_all_there():
    checks = doctor.check_features(FEATURES_OF_7_3)
    assert {check.status for check in checks} == {"ok"}
    assert len(checks) == len({check.name for check in checks}) == 9


def test_features_that_6_12_lacks_are_named_with_their_price():
    checks = by_name(doctor.check_features(FEATURES_OF_6_12))
    assert checks["feature USER_RECOVERY"].status == "ok"
    missing = {name for name, check in checks.items() if check.status == "warn"}
    assert missing == {
        "feature SUPPORT_ZERO_COPY", "feature AUTO_BUF_REG", "feature UPDATE_SIZE",
        "feature SAFE_STOP_DEV", "feature NO_AUTO_PART_SCAN",
    }
    assert all("Linux" in checks[name].advice for name in missing)


def test_the_data_path_and_why():
    check = doctor.check_data_path(FEATURES_OF_7_3)
    assert (check.status, check.found.partition(":")[0]) == ("ok", "zero copy")
    check = doctor.check_data_path(FEATURES_OF_6_12)
    assert check.status == "warn"
    assert check.found == (
        "plain copy, through buffers: the driver has no SUPPORT_ZERO_COPY, AUTO_BUF_REG"
    )
    assert "Linux 6.16" in check.advice
    one_less = doctor.check_data_path(FEATURES_OF_7_3 & ~Feature.USER_COPY)
    assert one_less.found.endswith("the driver has no USER_COPY")


def test_a_driver_without_ioctl_encoding_is_useless():
    checks = by_name(doctor.check_features(Feature(0)))
    assert checks["feature CMD_IOCTL_ENCODE"].status == "fail"


# ---- the driver, in a made-up root folder -----------------------------------------------------

def test_driver_loaded(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/ublk-control").touch()
    assert doctor.check_driver(tmp_path, "7.3.4").status == "ok"


def test_driver_in_a_container(tmp_path):
    (tmp_path / "sys/class/misc/ublk-control").mkdir(parents=True)
    check = doctor.check_driver(tmp_path, "7.3.4")
    assert (check.status, "container" in check.advice) == ("fail", True)


def test_driver_as_a_module(tmp_path):
    folder = tmp_path / "lib/modules/6.12.95"
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text("kernel/drivers/block/ublk_drv.ko.xz:\n")
    check = doctor.check_driver(tmp_path, "6.12.95")
    assert (check.status, "modprobe ublk_drv" in check.advice) == ("warn", True)


def test_no_driver(tmp_path):
    check = doctor.check_driver(tmp_path, "6.1.0-38-amd64")
    assert check.status == "fail"
    assert "CONFIG_BLK_DEV_UBLK" in check.advice


# ---- limits ------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("release", "ublks_max", "devices", "status"),
    [
        ("6.12.95", None, 0, "ok"),
        ("6.12.95", "64", 3, "ok"),
        ("6.12.95", "64", 60, "warn"),
        ("6.12.95", "64", 64, "fail"),
        ("6.12.95", "1024", 64, "ok"),
        ("6.15.0", "64", 100, "ok"),
    ],
)
def test_device_limit(release, ublks_max, devices, status):
    check = doctor.check_device_limit(release, ublks_max, devices)
    assert check.status == status
    assert ("1024" in check.advice) == (status != "ok")


@pytest.mark.parametrize(
    ("disabled", "error", "status"),
    [
        (None, None, "ok"),
        ("0", None, "ok"),
        ("1", None, "ok"),
        ("2", "cannot make an io_uring (EPERM)", "fail"),
        ("0", "no io_uring: seccomp", "fail"),
    ],
)
def test_io_uring(disabled, error, status):
    check = doctor.check_io_uring(disabled, error)
    assert (check.status, bool(check.advice)) == (status, status == "fail")


ROOT_MOUNT = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw"


@pytest.mark.parametrize(
    ("actions", "mountinfo", "namespaces", "missing"),
    [
        ("kill_process trap errno log allow", ROOT_MOUNT, True, None),
        (None, ROOT_MOUNT, True, "seccomp"),
        ("errno allow", ROOT_MOUNT, False, "pivot_root"),
        ("errno allow", "1 1 0:2 / / rw - rootfs rootfs rw", True, "pivot_root"),
        ("errno allow", "27 1 254:0 / /proc rw - proc proc rw", True, "pivot_root"),
    ],
    ids=["all", "no seccomp", "no namespaces", "initramfs", "chroot"],
)
def test_what_daemons_can_shut_themselves_in_with(actions, mountinfo, namespaces, missing):
    check = doctor.check_sandbox(actions, mountinfo, namespaces=namespaces)
    assert check.status == ("ok" if missing is None else "warn")
    assert (missing or "seccomp") in check.found
    assert bool(check.advice) == (missing is not None)



def test_limits():
    few = doctor.check_limits(8 << 20, 256, 0)
    assert [check.status for check in few] == ["warn", "warn"]
    assert all(check.advice for check in few)
    many = doctor.check_limits(64 << 20, 1024, 0)
    assert [check.status for check in many] == ["ok", "ok"]
    root = doctor.check_limits(8 << 20, 1024, ALL_CAPABILITIES)
    assert root[0].status == "ok"
    none = doctor.check_limits(resource.RLIM_INFINITY, resource.RLIM_INFINITY, 0)
    assert [(check.status, check.found) for check in none] == [("ok", "unlimited")] * 2


MOUNTS = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
25 22 0:23 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=1g
26 25 0:24 / /run/lock rw shared:6 - tmpfs tmpfs rw
27 22 0:25 / /run\040not rw - ext4 /dev/sdb rw
garbage
""".strip()


def test_the_file_system_of_a_path():
    assert doctor.mount_type(MOUNTS, "/run/ublk-ubi") == "tmpfs"
    assert doctor.mount_type(MOUNTS, "/runaway") == "ext4"
    assert doctor.mount_type(MOUNTS, "/run not/x") == "ext4"
    assert doctor.mount_type("", "/run") is None
    hidden = MOUNTS + "\n28 22 0:26 / /run rw - xfs /dev/sdc rw"
    assert doctor.mount_type(hidden, "/run/ublk-ubi") == "xfs"


def test_run():
    assert doctor.check_run(MOUNTS, 1 << 30).status == "ok"
    assert doctor.check_run(MOUNTS, 1 << 20).status == "warn"
    check = doctor.check_run("22 1 8:1 / / rw - ext4 /dev/sda1 rw", 1 << 30)
    assert (check.status, check.found) == ("warn", "on ext4")
    assert "tmpfs" in check.advice


def test_liburing_missing_names_the_package(monkeypatch):
    monkeypatch.setattr(doctor.liburing, "LIBRARY", "liburing.so.99")
    check = doctor.check_liburing()
    assert (check.status, "package liburing2" in check.advice) == ("fail", True)
    with pytest.raises(UbiError, match="liburing2"):
        doctor.liburing.CommandRing()


def test_liburing_too_old(monkeypatch):
    monkeypatch.setattr(doctor.liburing, "LIBRARY", "libc.so.6")
    assert "older than 2.3" in doctor.check_liburing().advice


# ---- all of it ----------------------------------------------------------------------------------

def test_this_machine_is_judged_without_an_exception():
    checks = doctor.run_checks()
    names = [check.name for check in checks]
    assert {"root", "kernel", "ublk driver", "liburing", "io_uring", "/run/ublk-ubi"} <= set(names)
    assert by_name(checks)["liburing"].status == "ok"
    for check in checks:
        assert check.status in {"ok", "warn", "fail"}
        assert "\n" not in check.found + check.advice
        assert check.advice or check.status == "ok", check


def test_an_empty_machine_is_judged_without_an_exception(tmp_path):
    checks = by_name(doctor.run_checks(tmp_path))
    assert checks["root"].status == "fail"
    assert checks["ublk driver"].status == "fail"
    assert checks["features"].status == "warn"
    assert checks["/run/ublk-ubi"].status == "warn"


def test_a_driver_that_does_not_answer_is_a_check_not_an_exception(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/absent").touch()
    checks = by_name(doctor.run_checks(tmp_path, "/dev/absent"))
    assert checks["features"].status == "fail"
    assert checks["features"].advice == "/dev/absent: No such file or directory"
