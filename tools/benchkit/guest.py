"""The guest's side: measures what the plan says and prints a line of JSON a figure.

    {"figure": "raw/randread-32", "value": 115404.0, "unit": "IO/s"}
    {"figure": "kublk-loop/randread-32", "missing": "not built"}
    {"figure": "ubi-zero-copy/randread-32", "failed": "…"}

The plan, a file: {"figures": [[SUBJECT, LOAD], …], "divisor": N, "payload": PATH, "pythons": [PATH,
…]}; the first of the Pythons that is there runs what is ours. Started by the lab as `python3 -m
benchkit.guest PLAN`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from . import disks, loads, servers, special
from .cases import Figure
from .shell import FailedError, MissingError, each_until_it_waits, fio_report, run

if TYPE_CHECKING:
    from collections.abc import Iterable

# What would let one run differ from another: addresses, and the rounds of the kernel, each of which
# costs the run that it falls into up to 10 ms.
KHUGEPAGED = "/sys/kernel/mm/transparent_hugepage/khugepaged"
SETTINGS = {
    "/proc/sys/kernel/randomize_va_space": "0",
    "/sys/module/damon_stat/parameters/enabled": "N",
    f"{KHUGEPAGED}/scan_sleep_millisecs": str((1 << 32) - 1),
}
ENVIRONMENT = {"PYTHONHASHSEED": "0", "DM_DISABLE_UDEV": "1", "LC_ALL": "C"}


def say(**words: Any) -> None:
    """Tell the host."""
    print(json.dumps(words), flush=True)


def make_venv(pythons: list[str]) -> None:
    """Complete the payload: a Python that lies in the guest waits for nothing of the host's."""
    python = next(path for path in pythons if os.path.exists(path))
    os.symlink(python, f"{servers.PLACE}/bin/python")
    with open(f"{servers.PLACE}/pyvenv.cfg", "w") as file:
        file.write(f"home = {os.path.dirname(python)}\ninclude-system-site-packages = false\n")


def prepare(payload: str, pythons: list[str]) -> None:
    """Bring the machine to where figures can be had."""
    for path, value in SETTINGS.items():
        with contextlib.suppress(FileNotFoundError), open(path, "w") as file:
            file.write(value)
    for name in [name for name in os.environ if name.startswith("PYTHON")]:
        del os.environ[name]  # the caller's: PYTHONDONTWRITEBYTECODE would have all compiled anew
    os.environ.update(ENVIRONMENT)
    os.makedirs(servers.PLACE)
    run("tar", "-xf", payload, "-C", servers.PLACE)
    make_venv(pythons)
    for module in (["ublk_drv"], ["dm-clone"], ["nbd", "nbds_max=2"]):
        run("modprobe", *module)
    disks.make()


def measure(subject: str, load: loads.Load, node: str, divisor: int) -> float:
    """Run fio once, after a few requests that bring it and the disk's code into memory."""
    if not load.fixed:
        run("fio", *load.words(node, 16))
    count = load.requests(divisor * servers.slowness(subject))
    with each_until_it_waits() if load.depth > 1 else contextlib.nullcontext():
        job = fio_report(run("fio", *load.words(node, count)))
    told = job["write" if load.rw.startswith(("write", "randwrite")) else "read"]
    if told["total_ios"] != count:
        raise FailedError(f"fio made {told['total_ios']} requests, not {count}")
    rate: float = count * 1000 / told["runtime"]
    return rate * load.block / 1e6 if load.unit == loads.BANDWIDTH else rate


def measure_subject(subject: str, figures: list[Figure], divisor: int) -> None:
    """Measure all figures of one subject, on one disk if its state allows that."""
    size = 1 if subject in servers.FRESH else max(len(figures), 1)
    for start in range(0, len(figures), size):
        left = figures[start : start + size]
        try:
            with servers.SUBJECTS[subject]() as node:
                while left:
                    load = loads.BY_NAME[left[0].load]
                    value = measure(subject, load, node, divisor)
                    say(figure=left.pop(0).name, value=value, unit=load.unit)
        except (FailedError, MissingError, OSError) as error:
            how = "missing" if isinstance(error, MissingError) else "failed"
            for figure in left:
                say(figure=figure.name, **{how: str(error)})


def measure_all(figures: Iterable[Figure], divisor: int) -> None:
    """Measure in an order that makes each disk once."""
    asked = sorted(figures, key=attrgetter("subject"))
    for subject, group in groupby(asked, key=attrgetter("subject")):
        own = list(group)
        measure_subject(subject, [f for f in own if f.load in loads.BY_NAME], divisor)
        for figure in own:
            if figure.load not in loads.BY_NAME:
                special.measure(figure, say)


def main() -> None:
    """Do the plan."""
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    prepare(plan["payload"], plan["pythons"])
    say(kernel=os.uname().release)
    measure_all([Figure(*words) for words in plan["figures"]], plan["divisor"])
    say(end=True)


if __name__ == "__main__":
    main()
