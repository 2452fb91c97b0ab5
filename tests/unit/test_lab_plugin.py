"""labplugin: what a session reports of tests that ran in guests, and of guests that went wrong.

Each test writes a throwaway folder of tests and runs pytest on it. The guest is a stand-in that
runs the command here, which makes the plugin's part quick to see; the last test has a real one.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

TESTS = Path(__file__).resolve().parents[1]
LIMIT_S = 60

# tools/lab as the plugin knows it, without a guest; a test can have no kernel made, or none at all.
STAND_IN = """
import os, subprocess, sys
words = sys.argv[1:]
if "--print" in words:
    sys.exit(os.environ.get("NO_KERNEL"))
scratch = words[words.index("--scratch") + 1]
cpus = words[words.index("--cpus") + 1]
environment = os.environ | {"LAB": "1", "LAB_SCRATCH": scratch, "LAB_DISKS": "", "CPUS": cpus}
with open(os.path.join(os.getcwd(), "guests"), "a") as guests:
    guests.write(f"{os.getpid()}\\n")
status = subprocess.run(words[words.index("--") + 1:], env=environment).returncode
sys.exit(status if status >= 0 else 128 - status)
"""


class Folder:
    """A throwaway folder of tests: `device` for the guest, `unit` for here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("pytest.ini", f"""
            [pytest]
            pythonpath = {TESTS}
            lab_folders = device
            addopts = --strict-markers -rA --import-mode=importlib
            filterwarnings = error
        """)
        self.write("conftest.py", 'pytest_plugins = ["labplugin.plugin"]\n')
        self.write("stand_in", STAND_IN)

    def write(self, name: str, text: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))

    def command(self, *words: str, real: bool = False) -> list[str]:
        lab = [] if real else [f"--lab-program={self.path}/stand_in"]
        return [sys.executable, "-m", "pytest", *lab, *words]

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "LAB"))}
        # Other plugins would only make it slower.
        return kept | {"COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def run(self, *words: str, real: bool = False, **variables: str) -> Result:
        done = subprocess.run(
            self.command(*words, real=real), cwd=self.path, env=self.environment() | variables,
            capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def guests(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [int(line) for line in (self.path / "guests").read_text().split()]
        return []


class Result:
    """What a session has said."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status = status
        self.text = stdout
        self.stderr = stderr
        line = re.compile(r"^(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) .*", re.MULTILINE)
        self.lines = sorted(line.findall(stdout))

    @property
    def total(self) -> str:
        """The last line, without the time that it took."""
        return re.sub(r" in [\d.]+s.*", "", self.text.strip().splitlines()[-1]).strip("= ")

    def has(self, *lines: str) -> None:
        """Each of the lines is there, as the start of a line of the summary."""
        for line in lines:
            assert any(there.startswith(line) for there in self.lines), f"{line}\n{self.text}"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


MANY = """
    import sys, unittest, warnings
    import pytest

    @pytest.fixture
    def broken(): raise RuntimeError("in setup")

    @pytest.fixture
    def breaks():
        yield
        print("words of the teardown")
        raise RuntimeError("in teardown")

    def test_pass(): print("words of a passed test")
    def test_fail():
        print("words on stdout"); print("words on stderr", file=sys.stderr)
        assert [1, 2, 3] == [1, 2, 4]
    def test_setup(broken): pass
    def test_teardown(breaks): pass
    def test_both(breaks): assert 0
    def test_skip(): pytest.skip("a reason")
    @pytest.mark.skipif(True, reason="another reason")
    def test_skipif(): pass
    @pytest.mark.xfail(reason="known")
    def test_xfail(): assert 0
    @pytest.mark.xfail(strict=True)
    def test_xpass(): pass
    @pytest.mark.parametrize("text", ["a::b", "x/[y]", "\\u00e4 \\n", "", "-k"])
    def test_odd_names(text): assert text != "-k"
    def test_property(record_property): record_property("key", ("value", object))
    def test_chained():
        try: {}["missing"]
        except KeyError as error: raise ValueError("chained") from error
    def test_warning(): warnings.warn("a warning is an error")
    def test_exit(): raise SystemExit(3)
    def test_subtests(subtests):
        for i in range(3):
            with subtests.test(i=i): assert i != 1
    class TestClass:
        def test_method(self): pass
    class Case(unittest.TestCase):
        def test_case(self): self.assertEqual(1, 1)
        @unittest.skip("of unittest")
        def test_skipped_case(self): pass
"""


def masked(text: str) -> list[str]:
    """The lines of a session's output that tell neither where it ran nor in which order."""
    # (pytest serialises what tells subtests apart as its repr)
    text = re.sub(r"0x[0-9a-f]+|\b[\d.]+s\b|\[ *\d+%\]|=+|__+|'", "", text)
    row = re.compile(r"((device|unit)/\S+ )?[.FEsxu]+ *|lab: .*|plugins:.*|")
    return sorted(line.rstrip() for line in text.splitlines() if not row.fullmatch(line))


@pytest.mark.parametrize("options", [[], ["-v", "-l", "--tb=short"]], ids=str)
def test_a_session_with_guests_says_what_one_without_would(
    folder: Folder, options: list[str],
) -> None:
    folder.write("device/test_many.py", MANY)
    folder.write("device/test_more.py", "def test_one(): pass\ndef test_two(): assert 0, 'two'\n")
    folder.write("unit/test_x.py", "import os\ndef test_x(): assert 'LAB' not in os.environ\n")
    with_guests = folder.run(*options)
    assert len(folder.guests()) == 2
    without = folder.run("--native", *options)
    assert len(folder.guests()) == 2
    assert with_guests.status == without.status == 1
    assert with_guests.total == without.total
    assert with_guests.lines == without.lines
    assert len(with_guests.lines) > 20
    assert masked(with_guests.text) == masked(without.text)


def test_rows_of_a_file_stay_whole(folder: Folder) -> None:
    for name in "ab":
        folder.write(f"device/test_{name}.py", """
            import time, pytest
            @pytest.mark.parametrize("n", range(8))
            def test_slow(n): time.sleep(0.05)
        """)
    result = folder.run("-r", "N")
    rows = re.findall(r"^device/test_[ab]\.py \.+ +\[ *\d+%\]$", result.text, re.MULTILINE)
    assert len(rows) == 2, result.text


# -- selection ------------------------------------------------------------------------------------

TWO_FILES = ("def test_one(): pass\ndef test_two(): assert 0\n", "def test_three(): pass\n")


@pytest.mark.parametrize(("words", "total"), [
    (["-k", "one", "-m", "device"], "1 passed, 3 deselected"),
    (["device/test_a.py::test_two", "unit"], "1 failed, 1 passed"),
    (["--deselect", "device/test_a.py"], "2 passed, 2 deselected"),
    (["--co"], "4 tests collected"),
], ids=str)
def test_selection(folder: Folder, words: list[str], total: str) -> None:
    for name, text in zip("ab", TWO_FILES, strict=True):
        folder.write(f"device/test_{name}.py", text)
    folder.write("unit/test_here.py", "def test_here(): pass\n")
    assert folder.run(*words).total == total


def test_last_failed(folder: Folder) -> None:
    for name, text in zip("ab", TWO_FILES, strict=True):
        folder.write(f"device/test_{name}.py", text)
    folder.run()
    result = folder.run("--lf")
    assert result.total.startswith("1 failed")
    result.has("FAILED device/test_a.py::test_two")
    assert "PASSED" not in result.text


def test_stop_at_the_first_failure(folder: Folder) -> None:
    folder.write("device/test_a.py", "import time\ndef test_one(): assert 0\n"
                                     "def test_two(): time.sleep(60)\n")
    folder.write("device/test_b.py", "import time\ndef test_three(): time.sleep(60)\n")
    result = folder.run("-x")
    assert result.status == 1
    assert result.total == "1 failed"
    assert "stopping after 1 failures" in result.text
    assert_ended(folder.guests())


def test_one_guest_at_a_time(folder: Folder) -> None:
    for name in "abc":
        folder.write(f"device/test_{name}.py", """
            import os, time
            def test_x(): os.mkdir("busy"); time.sleep(0.3); os.rmdir("busy")
        """)
    assert folder.run("--lab-jobs=1").total == "3 passed"


def test_processors_of_a_guest(folder: Folder) -> None:
    """One, or as many as its tests ask for."""
    folder.write("device/test_a.py", """
        import os, pytest
        def test_x(): assert os.environ["CPUS"] == "1"
        @pytest.mark.cpus(2)
        def test_y(): assert os.environ["CPUS"] == "2"
        def test_z(): assert os.environ["CPUS"] == "1"
    """)
    assert folder.run().total == "3 passed"


MEETING = """
    import glob, time
    def test_x():
        {first}
        deadline = time.monotonic() + 20
        while len(glob.glob("here-*")) < {others}:
            assert time.monotonic() < deadline, "the others have not come"
            time.sleep(0.01)
        {last}
"""


def test_one_guest_more_once_nothing_runs_here(folder: Folder) -> None:
    for name in "abc":
        first = f'open("here-{name}", "w").close()'
        folder.write(f"device/test_{name}.py", MEETING.format(first=first, others=3, last=""))
    two = 'assert len(glob.glob("here-*")) == 2'
    folder.write("unit/test_here.py", MEETING.format(first="", others=2, last=two))
    result = folder.run("--lab-jobs=2")
    assert result.total == "4 passed", result.text


def test_tests_with_guests_of_their_own_come_last(folder: Folder) -> None:
    text = "import pytest\n@pytest.mark.uses_lab\ndef test_last(): pass\n"
    folder.write("unit/test_a.py", text)
    folder.write("unit/test_b.py", "def test_first(): pass\n")
    result = folder.run("-v")
    assert result.text.index("test_first PASSED") < result.text.index("test_last PASSED")


# -- guests that come to no good ------------------------------------------------------------------

# name of the file: (what one of its tests does, outcome of this test, outcome of the one behind it,
# what is told besides). Each file is a guest's.
BAD = {
    "dies": (
        "os.kill(os.getpid(), 9)",
        "FAILED {bad} - the guest died (status 137), while this test ran",
        "FAILED {after} - not run: the guest died (status 137)",
        "",
    ),
    "crashes": (
        "os.kill(os.getpid(), signal.SIGSEGV)",
        "FAILED {bad} - the guest died (status 139), while this test ran",
        "FAILED {after} - not run: the guest died (status 139)",
        "Fatal Python error: Segmentation fault",
    ),
    "exits": (
        "os._exit(0)",
        "FAILED {bad} - the guest died (status 0), while this test ran",
        "FAILED {after} - not run: the guest died (status 0)",
        "",
    ),
    "gives_up": (
        "pytest.exit('enough')",
        "FAILED {bad} - the guest's pytest has ended (status 2, the guest's 2), while",
        "FAILED {after} - not run: the guest's pytest has ended (status 2, the guest's 2)",
        "",
    ),
    "fails_behind": (
        "atexit.register(os._exit, 9)",
        "PASSED {bad}",
        "ERROR {file}::lab - the guest's pytest has ended (status 0, the guest's 9)",
        "",
    ),
    "complains": (
        "DMESG.write_text('Oops: 1')",
        "PASSED {bad}",
        "ERROR {file}::lab - the guest's kernel complained",
        "Oops: 1",
    ),
    "complains_and_dies": (
        "DMESG.write_text('Oops: 2'), os.kill(os.getpid(), 9)",
        "FAILED {bad} - the guest's kernel complained (status 137), while this test ran",
        "FAILED {after} - not run: the guest's kernel complained (status 137)",
        "Oops: 2",
    ),
    "lacks_one": (
        "pass\nif 'LAB' in os.environ: del test_after",
        "PASSED {bad}",
        "FAILED {after} - not collected in the guest",
        "1 tests are collected only here: {after}",
    ),
    "has_one_more": (
        "pass\nif 'LAB' in os.environ:\n    def test_more(): pass",
        "PASSED {bad}",
        "ERROR {file}::lab - the guest collects other tests than this machine",
        "1 tests are collected only in the guest: {file}::test_more",
    ),
    "not_imported": (
        "pass\nif 'LAB' in os.environ: import nothing_like_it",
        "FAILED {bad} - not collected in the guest",
        "FAILED {after} - not collected in the guest",
        "No module named 'nothing_like_it'",
    ),
    "skipped_as_a_whole": (
        "pass\nif 'LAB' in os.environ: pytest.skip('no', allow_module_level=True)",
        "FAILED {bad} - not collected in the guest",
        "FAILED {after} - not collected in the guest",
        "",
    ),
    "never_starts": (
        "pass\nif 'LAB' in os.environ: os._exit(3)",
        "FAILED {bad} - not run: the guest died (status 3)",
        "FAILED {after} - not run: the guest died (status 3)",
        "",
    ),
}
BAD_FILE = """\
import atexit, os, signal, time
from pathlib import Path
import pytest
DMESG = Path(os.environ.get("LAB_SCRATCH", ""), "dmesg")
def test_before(): pass
def test_bad(): {body}
def test_after(): pass
{rest}
"""


def write_bad(folder: Folder, name: str, text: str) -> None:
    """Write a file of three tests; the first line of `text` is the second's, the rest its end."""
    body, _, rest = text.partition("\n")
    folder.write(f"device/test_{name}.py", BAD_FILE.format(body=body, rest=rest))


def assert_ended(processes: list[int]) -> None:
    """None of the processes is there, or will be in a moment."""
    deadline = time.monotonic() + 20
    for process in processes:
        while os.path.exists(f"/proc/{process}"):
            assert time.monotonic() < deadline, f"{process} lives on"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def bad_session(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = Folder(tmp_path_factory.mktemp("bad"))
    for name, (body, *_) in BAD.items():
        write_bad(folder, name, body)
    folder.write("device/test_good.py", "def test_good(): pass\n")
    return folder.run("--lab-jobs=3")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_guest(bad_session: Result, name: str) -> None:
    file = f"device/test_{name}.py"
    words = {"file": file, "bad": f"{file}::test_bad", "after": f"{file}::test_after"}
    _, bad, after, told = BAD[name]
    bad_session.has(bad.format(**words), after.format(**words))
    assert told.format(**words) in bad_session.text


def test_bad_guests_harm_no_other(bad_session: Result) -> None:
    assert bad_session.status == 1
    bad_session.has("PASSED device/test_good.py::test_good")
    for name, (_, bad, *_) in BAD.items():
        before = "FAILED" if "- not" in bad else "PASSED"
        bad_session.has(f"{before} device/test_{name}.py::test_before")
        for test in ("before", "bad", "after"):  # each has exactly one outcome
            there = {line for line in bad_session.lines if f"test_{name}.py::test_{test}" in line}
            assert len(there) == 1, there


def test_a_guest_that_falls_silent(folder: Folder) -> None:
    write_bad(folder, "sleeper", "time.sleep(60)")
    result = folder.run("--lab-silence=12")
    ended = "the guest was ended: it reported nothing for 12 s"
    result.has(f"FAILED device/test_sleeper.py::test_bad - {ended}, while this test ran",
               f"FAILED device/test_sleeper.py::test_after - not run: {ended}")
    assert (result.status, result.total) == (1, "2 failed, 1 passed")
    assert "in test_bad" in result.text  # where it hung
    assert_ended(folder.guests())


def test_no_kernel(folder: Folder) -> None:
    write_bad(folder, "idle", "pass")
    folder.write("unit/test_here.py", "def test_here(): pass\n")
    result = folder.run(NO_KERNEL="make: *** no rule")
    assert (result.status, result.total) == (1, "3 failed, 1 passed")
    result.has("FAILED device/test_idle.py::test_bad - not run: the lab could not build its kernel")
    assert "make: *** no rule" in result.text


def test_a_driver_that_dies(folder: Folder) -> None:
    write_bad(folder, "sleeper", "time.sleep(2)")
    folder.write("unit/test_here.py", """
        import os, signal, time
        from pathlib import Path
        def test_here():
            guests = Path("guests")
            while not guests.exists() or not guests.read_text(): time.sleep(0.05)
            guest = guests.read_text().strip()
            driver = Path(f"/proc/{guest}/stat").read_text().rpartition(")")[2].split()[1]
            os.kill(int(driver), signal.SIGKILL)
    """)
    result = folder.run()
    result.has("FAILED device/test_sleeper.py::test_after - not run: the guest's driver died")
    assert result.status == 1
    assert_ended(folder.guests())


def test_tests_that_run_here_find_themselves_alone(folder: Folder) -> None:
    folder.write("device/test_a.py", "import time\ndef test_a(): time.sleep(1)\n")
    folder.write("unit/test_here.py", """
        import os, threading, time
        from pathlib import Path
        def test_here():
            while not os.path.exists("guests"): time.sleep(0.05)
            assert threading.active_count() == 1
            assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == ""
    """)
    assert folder.run().total == "2 passed"


def test_guests_end_with_a_session_that_is_killed(folder: Folder) -> None:
    write_bad(folder, "sleeper", "time.sleep(60)")
    for number in (signal.SIGKILL, signal.SIGINT):
        (folder.path / "guests").unlink(missing_ok=True)
        session = subprocess.Popen(folder.command(), cwd=folder.path, env=folder.environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not folder.guests():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        session.send_signal(number)
        assert session.wait(20) == (-9 if number == signal.SIGKILL else 2)
        assert_ended(folder.guests())


# -- what this machine collects -------------------------------------------------------------------


LOST = {
    "unit/check_x.py": "def test_x(): pass\n",
    "unit/test_empty.py": "def helper(): pass\n",
    "unit/build/test_x.py": "def test_x(): pass\n",  # a folder that pytest leaves out
    "unit/test_ignored.py": "def test_x(): pass\n",  # by unit/conftest.py
    "device/test_skipped.py": "import pytest\npytest.skip('no', allow_module_level=True)\n",
    "device/test_no_import.py": "import pytest\npytest.importorskip('no')\ndef test_x(): pass\n",
}


def test_files_whose_tests_would_be_lost(folder: Folder) -> None:
    folder.write("unit/test_here.py", "def test_here(): pass\n")
    folder.write("unit/conftest.py", "collect_ignore = ['test_ignored.py']\n")
    for name, text in LOST.items():
        folder.write(name, text)
    result = folder.run()
    assert result.status == pytest.ExitCode.USAGE_ERROR, result.text
    found = re.findall(r"(\S+\.py): no test was collected from this file", result.stderr)
    assert set(found) == {f"{folder.path}/{name}" for name in LOST}
    assert folder.run("unit/test_here.py").status == 0  # all that was asked for


def test_a_skip_can_be_made_to_fail(folder: Folder) -> None:
    for name in ("device/test_a.py", "unit/test_b.py"):
        folder.write(name, """
            import pytest
            def test_skip(): pytest.skip("no device")
            @pytest.mark.xfail
            def test_xfail(): assert 0
        """)
    assert folder.run().total == "2 skipped, 2 xfailed"
    result = folder.run("--no-skips")
    assert (result.status, result.total) == (1, "2 failed, 2 xfailed")
    result.has("FAILED device/test_a.py::test_skip - skipped: Skipped: no device (--no-skips)")


# -- the real one ---------------------------------------------------------------------------------


@pytest.mark.uses_lab
def test_a_real_guest(folder: Folder) -> None:
    subprocess.run([sys.executable, TESTS.parent / "tools/lab", "--print", "kernel"], check=True)
    folder.write("device/test_a.py", """
        import ctypes, os, pathlib, pytest
        def test_kernel(): assert "ublk" in pathlib.Path("/proc/kallsyms").read_text()
        def test_disks():
            assert [os.path.exists(disk) for disk in os.environ["LAB_DISKS"].split()] == [True] * 2
        def test_fail(): print("words"); assert 0, "as it should"
        def test_temporary(tmp_path): (tmp_path / "x").write_text("x")
        def test_read_only():
            with pytest.raises(OSError): open(__file__, "a")
        def test_gone():
            os.sync(); ctypes.CDLL(None).reboot(0x4321fedc)
        def test_after(): pass
    """)
    result = folder.run("-v", real=True)
    died = "the guest died (status 125)"
    result.has(*(f"PASSED device/test_a.py::test_{name}"
                 for name in ("kernel", "disks", "temporary", "read_only")),
               "FAILED device/test_a.py::test_fail - AssertionError: as it should",
               f"FAILED device/test_a.py::test_gone - {died}, while this test ran",
               f"FAILED device/test_a.py::test_after - not run: {died}")
    assert (result.status, result.total) == (1, "3 failed, 4 passed")
