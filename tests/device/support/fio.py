"""fio, which writes a part of a disk once, with flushes in between, and verifies all of it."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from support.device import Device
    from support.undo import Undo

DEPTH = 32
_JOB = (
    "--name=job", "--direct=1", "--ioengine=libaio", f"--iodepth={DEPTH}", "--rw=randwrite",
    "--bssplit=512/10:4k/40:16k/30:60k/10:64k/10", "--bs_unaligned=1", "--fsync=24",
    "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--group_reporting",
    "--output-format=json",
)


class Fio:
    """A run that is under way, `jobs` of them side by side; `part` is each one's bytes."""

    def __init__(
        self, device: Device, undo: Undo, folder: Path, *, start: int, part: int, jobs: int,
        seed: int,
    ) -> None:
        self._folder = folder
        self._words = [
            "fio", f"--filename={device.node}", f"--offset={start}", f"--size={part}",
            f"--offset_increment={part}", f"--numjobs={jobs}", f"--randseed={seed}", *_JOB,
        ]
        self._process = self._run("--do_verify=1")
        undo.callback(self._end)

    def _run(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._words, *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=self._folder,
        )

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    @property
    def done(self) -> bool:
        return self._process.poll() is not None

    def result(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait for its end, which must be a success; fio's own figures."""
        output, _ = self._process.communicate(timeout=timeout_s)
        assert self._process.returncode == 0, output[-3000:]
        result: dict[str, Any] = json.loads(output[output.index("{"):])["jobs"][0]
        assert result["error"] == 0
        return result

    def verify(self, timeout_s: float = 60.0) -> None:
        """Once more: all that was written is there."""
        self._process = self._run("--verify_only")
        self.result(timeout_s)
