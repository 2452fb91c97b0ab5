"""fio's own verification: what it wrote at depth 32 is there, at once and after reopening."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

MIB = 1 << 20
pytestmark = pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")

# What a job does, and the size of its part of the disk, which it writes once.
JOBS = {
    "4k": (8 * MIB, ["--rw=randwrite", "--bs=4k"]),
    "mixed": (20 * MIB, [
        "--rw=randrw", "--rwmixread=30", "--bssplit=512/10:4k/30:16k/20:60k/20:256k/15:1m/5",
        "--bs_unaligned=1", "--fsync=50",
    ]),
}


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("job", JOBS)
def test_verify(ubi, make_image, make_base, tmp_path, seed, job, queues):
    verify(ubi, make_image, make_base, tmp_path, seed, job, queues)


@pytest.mark.cpus(2)
@pytest.mark.data_paths("fallback")
def test_verify_what_falls_back(ubi, make_image, make_base, tmp_path, seed):
    verify(ubi, make_image, make_base, tmp_path, seed, "mixed", 2)


def verify(ubi, make_image, make_base, tmp_path, seed, job, queues):
    part, how = JOBS[job]
    size = queues * part
    image = make_image(size - 777, holes=0.5)
    device = ubi.add(
        image, make_base(0), size=size, stripe_size=256 << 10, queues=queues, depth=64,
    )

    def fio(*more: str) -> dict:
        command = [
            "fio", "--name=job", f"--filename={device.node}", "--direct=1", "--ioengine=libaio",
            "--iodepth=32", f"--numjobs={queues}", f"--size={part}", f"--offset_increment={part}",
            *how, f"--randseed={seed}", "--verify=crc32c", "--verify_fatal=1",
            "--verify_state_save=0", "--group_reporting", "--output-format=json", *more,
        ]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=60,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr}"
        result = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
        assert result["error"] == 0
        return result

    written = fio("--do_verify=1")
    assert written["write"]["total_ios"] > 0
    assert written["read"]["io_bytes"] >= written["write"]["io_bytes"], "all of it was verified"
    device.reopen()
    read = fio("--verify_only")
    assert read["read"]["io_bytes"] >= written["write"]["io_bytes"]
    status = device.status()
    assert status["io"]["read"]["errors"] == status["io"]["write"]["errors"] == 0
    image.assert_untouched()
