"""Debian's kernel source, through a private apt configuration, and the tools that build it.

The system's own `deb` entry is copied with another suite; lists and state live in a folder of ours.
The system's configuration is read, never changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BACKPORTS = "trixie-backports"
STABLE = "trixie"
COMPONENT = "main"
SOURCE_PACKAGE = re.compile(r"linux-source-(\d+)\.(\d+)")
OLDEST = (7, 0)

# What the build runs or includes, and the package that has it.
TOOLS = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "perl": "perl",
    "/usr/include/stdio.h": "libc6-dev",
    "/usr/include/linux/types.h": "linux-libc-dev",
}

UNPACK = (
    'dpkg-deb --fsys-tarfile "$1" | tar -xOf - --wildcards "./usr/src/*.tar.xz" '
    '| xz -dc -T0 | { shift; tar -x --strip-components=1 "$@"; }'
)
# Code of drivers that a user-mode kernel cannot have; their Kconfig files are needed.
LEFT_PACKED = (
    "*/drivers/gpu/*.[chsS]",
    "*/drivers/media/*.[chsS]",
    "*/sound/*.[chsS]",
    "*/arch/arm/boot/*",
    "*/arch/arm64/boot/*",
)


# A mirror may be amid a change, or answer with an error for a moment.
TRIES = 3
PAUSE_S = 5.0

WAIT_FOR_LOCK = ("-o", "DPkg::Lock::Timeout=600")  # someone else may be installing


@dataclass(frozen=True)
class Entry:
    """A `deb` entry of the system: where the archive is, and what signs it."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...]  # deb822 names, as Signed-By


def missing_packages() -> list[str]:
    """List the packages that the build lacks here."""
    return [package for tool, package in TOOLS.items() if not _present(tool)]


def _present(tool: str) -> bool:
    return Path(tool).exists() if tool.startswith("/") else shutil.which(tool) is not None


def install(packages: Iterable[str], log: Path) -> None:
    """Install packages with the system's own configuration; needs root and apt."""
    names = " ".join(packages)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise LabError(f"building the lab's kernel needs {names}; install: apt-get install {names}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update"],
        ["apt-get", "install", "-y", "--no-install-recommends", *WAIT_FOR_LOCK, *names.split()],
    ):
        with log.open("ab") as output:
            result = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
            )
        if result.returncode and command[1] == "install":
            raise LabError(f"apt-get could not install {names} ({last_line(log)}); install them")


def patiently(fetch: Callable[[], object]) -> None:
    """Do what needs the network; some times, if need be."""
    for _ in range(TRIES - 1):
        try:
            fetch()
        except LabError:
            time.sleep(PAUSE_S)
        else:
            return
    fetch()


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


# -- the system's sources -----------------------------------------------------------------------


def parse_deb822(text: str) -> Iterator[Entry]:
    """Yield the entries of a `.sources` file."""
    for stanza in re.split(r"\n\s*\n", re.sub(r"^#.*\n?", "", text, flags=re.MULTILINE)):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace() and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled") == "no":
            continue
        options = tuple(
            (key, fields[key])
            for key in ("signed-by", "trusted", "architectures", "check-valid-until")
            if key in fields
        )
        for uri in fields.get("uris", "").split():
            yield Entry(
                uri,
                tuple(fields.get("suites", "").split()),
                tuple(fields.get("components", "").split()),
                options,
            )


def parse_one_line(text: str) -> Iterator[Entry]:
    """Yield the entries of a `sources.list`."""
    names = {"arch": "architectures"}
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s*)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if not match:
            continue
        options = []
        for option in (match[1] or "").split():
            key, _, value = option.partition("=")
            options.append((names.get(key, key), value.replace(",", " ")))
        yield Entry(match[2], (match[3],), tuple(match[4].split()), tuple(options))


def system_entries(root: Path = Path("/etc/apt")) -> Iterator[Entry]:
    """Yield every `deb` entry of the system's configuration."""
    for path in sorted(root.glob("sources.list.d/*.sources")):
        yield from parse_deb822(path.read_text(errors="replace"))
    for path in [root / "sources.list", *sorted(root.glob("sources.list.d/*.list"))]:
        if path.exists():
            yield from parse_one_line(path.read_text(errors="replace"))


def debian_entry(entries: Iterable[Entry], codename: str) -> Entry:
    """Pick the entry that has this release's main archive, not someone else's with its words."""

    def likeness(entry: Entry) -> tuple[bool, bool, bool]:
        keys = dict(entry.options).get("signed-by", "")
        return (
            "debian-archive" in keys,
            "debian" in entry.uri.rstrip("/").rpartition("/")[2],
            codename in entry.suites,
        )

    release = {codename, "stable", "oldstable", "testing"}
    fitting = [e for e in entries if COMPONENT in e.components and release & set(e.suites)]
    if not fitting:
        raise LabError(
            f"no `deb` entry with suite {codename} and component {COMPONENT} under /etc/apt: "
            "the lab's kernel is built from Debian's archive; add the entry"
        )
    return max(fitting, key=likeness)


def codename() -> str:
    """Name this machine's release of Debian."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return "stable"


# -- apt, privately -----------------------------------------------------------------------------


class Archive:
    """One suite of Debian's, seen through lists and state of our own beneath `folder`."""

    def __init__(self, folder: Path, log: Path, suite: str = BACKPORTS) -> None:
        self._suite = suite
        if shutil.which("apt-get") is None:
            raise LabError("no apt-get here: the lab's kernel is built from Debian's archive")
        self._folder = folder
        self._log = log
        for sub in ("sources", "lists/partial", "cache/archives/partial"):
            (folder / sub).mkdir(parents=True)
        (folder / "status").touch()
        entry = debian_entry(system_entries(), codename())
        lines = ["Types: deb", f"URIs: {entry.uri}", f"Suites: {suite}", f"Components: {COMPONENT}"]
        lines += [f"{key.title()}: {value}" for key, value in entry.options]
        (folder / "sources/lab.sources").write_text("\n".join(lines) + "\n")

    def _fetch(self, *command: str, cwd: Path | None = None) -> None:
        patiently(lambda: self._run(*command, cwd=cwd))

    def _run(self, *command: str, cwd: Path | None = None) -> str:
        settings = {
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": str(self._folder / "sources"),
            "Dir::State": str(self._folder),
            "Dir::State::lists": str(self._folder / "lists"),
            "Dir::State::status": str(self._folder / "status"),
            "Dir::Cache": str(self._folder / "cache"),
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        with self._log.open("ab") as log:
            result = subprocess.run(
                [command[0], *options, *command[1:]],
                env={**os.environ, "LC_ALL": "C"},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                check=False,
            )
        if result.returncode:
            raise LabError(
                f"{command[0]} {command[1]} failed for suite {self._suite}: {last_line(self._log)} "
                "(is the archive within reach?)"
            )
        return result.stdout.decode(errors="replace")

    def update(self) -> None:
        """Fetch the suite's lists."""
        self._fetch("apt-get", "-o", "APT::Update::Error-Mode=any", "update")

    def newest_kernel_source(self) -> tuple[str, str]:
        """Return (package, version) of the newest kernel source that the suite offers."""
        self.update()
        listed = self._run("apt-cache", "search", "--names-only", "^linux-source-")
        best: tuple[tuple[int, int], str] | None = None
        for package in (line.split()[0] for line in listed.splitlines() if line.strip()):
            if match := SOURCE_PACKAGE.fullmatch(package):
                number = (int(match[1]), int(match[2]))
                if number >= OLDEST and (best is None or number > best[0]):
                    best = (number, package)
        if best is None:
            raise LabError(f"suite {self._suite} offers no linux-source-7.x: the lab needs one")
        shown = self._run("apt-cache", "show", "--no-all-versions", best[1])
        version = re.search(r"^Version: (\S+)$", shown, re.MULTILINE)
        if version is None:
            raise LabError(f"apt-cache shows no version of {best[1]}")
        return best[1], version[1]

    def unpack_source(self, package: str, version: str, into: Path, only: str = "*") -> Path:
        """Download the package (apt checks the signature) and unpack its tarball, or some of it."""
        self._fetch("apt-get", "download", f"{package}={version}", cwd=self._folder)
        deb = next(self._folder.glob(f"{package}_*.deb"))
        into.mkdir()
        command = ["bash", "-o", "pipefail", "-c", UNPACK, "unpack", str(deb), "-C", str(into)]
        command += [*(f"--exclude={pattern}" for pattern in LEFT_PACKED), "--wildcards", only]
        with self._log.open("ab") as log:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            )
        if result.returncode:
            raise LabError(f"cannot unpack {deb.name}: {last_line(self._log)}")
        deb.unlink()
        return into

    def newest_kernel(self, architecture: str) -> tuple[str, list[str]]:
        """Return the release of the suite's packaged kernel, and the packages that hold its files.

        They are one (linux-image-RELEASE), or several (linux-base-, -binary-, -modules-RELEASE).
        """
        self.update()
        shown = self._run("apt-cache", "show", "--no-all-versions", f"linux-image-{architecture}")
        release = re.search(r"^Depends:.*?\blinux-image-(\d\S*)", shown, re.MULTILINE)
        if release is None:
            raise LabError(f"suite {self._suite} offers no linux-image-{architecture}")
        pattern = f"^linux-.*-{re.escape(release[1])}$"
        listed = self._run("apt-cache", "search", "--names-only", pattern)
        names = {line.split()[0] for line in listed.splitlines() if line.strip()}
        parts = {f"linux-{part}-{release[1]}" for part in ("base", "binary", "modules")}
        return release[1], sorted(parts) if parts <= names else [f"linux-image-{release[1]}"]

    def unpack(self, packages: Iterable[str], into: Path) -> None:
        """Download packages (apt checks the signatures) and unpack them, without their scripts."""
        for package in packages:
            self._fetch("apt-get", "download", package, cwd=self._folder)
            deb = next(self._folder.glob(f"{package}_*.deb"))
            with self._log.open("ab") as log:
                subprocess.run(["dpkg-deb", "-x", deb, into], stdout=log, stderr=log, check=True)
            deb.unlink()
