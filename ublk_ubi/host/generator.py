"""Written by `ublk-ubi systemd install`: what the units of disks stand on.

systemd runs this at boot and at every daemon-reload, before anything is mounted: it needs Python
alone, and neither the package nor its dependencies. For each NAME.json it writes a drop-in of
ublk-ubi@NAME.service, so that base and image are there before the disk, and their mounts go after
it; and one of each mount in fstab whose source is /dev/ublk-ubi/NAME, so that it is unmounted while
the disk is still there.
"""

from __future__ import annotations

import json
import os
import re
import sys

CONFIG_FOLDER = "/etc/ublk-ubi"
FSTAB = "/etc/fstab"
DISKS = "/dev/ublk-ubi/"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
PLAIN = re.compile(rb"[A-Za-z0-9:_.]")
DROP_IN = "50-ublk-ubi.conf"


def escape(path: str) -> str:
    """Write a path as a unit's name has it (systemd-escape --path)."""
    parts = [part for part in path.split("/") if part]
    if not parts:
        return "-"
    escaped = ""
    for number, byte in enumerate(os.fsencode("/".join(parts))):
        one = bytes([byte])
        if one == b"/":
            escaped += "-"
        elif PLAIN.fullmatch(one) and not (number == 0 and one == b"."):
            escaped += one.decode()
        else:
            escaped += f"\\x{byte:02x}"
    return escaped


def quote(path: str) -> str:
    """Write a path as a setting's word."""
    inner = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{inner}"'


def settings_for(key: str, path: str) -> list[str]:
    """Say what a disk needs whose `key` is `path`."""
    if path.startswith(DISKS) and NAME.fullmatch(path.removeprefix(DISKS)):
        other = f"ublk-ubi@{path.removeprefix(DISKS)}.service"
        return [f"Wants={other}", f"After={other}"]
    if path.startswith("/dev/"):
        device = f"{escape(path)}.device"
        # An image that is gone may not be needed any more: the daemon knows.
        return [f"{'Requires' if key == 'base' else 'Wants'}={device}", f"After={device}"]
    return [f"RequiresMountsFor={quote(path)}"]


def paths_of(config: str) -> list[tuple[str, str]]:
    """Read the files that a configuration names. Raises OSError or ValueError."""
    with open(config, encoding="utf-8") as file:
        values = json.load(file)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - as any other bad content
    paths = []
    for key in ("base", "image"):
        value = values.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or not value or re.search(r"[\x00-\x1f]", value):
            raise ValueError(f"{key} is not a path")
        paths.append((key, os.path.normpath(os.path.join(os.path.dirname(config), value))))
    return paths


def mounts_on_disks(fstab: str) -> list[tuple[str, str]]:
    """List the disks' names in fstab, each with the unit of what is mounted (or swapped to)."""
    try:
        with open(fstab, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.split() for line in file if not line.lstrip().startswith("#")]
    except OSError:
        return []
    found = []
    for words in lines:
        if len(words) < 3:
            continue
        source, target, kind = (
            re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word) for word in words[:3]
        )
        name = source.removeprefix(DISKS)
        if source == name or not NAME.fullmatch(name):
            continue
        unit = f"{escape(source)}.swap" if kind == "swap" else f"{escape(target)}.mount"
        found.append((name, unit))
    return found


def write(folder: str, unit: str, settings: list[str]) -> None:
    """Write a drop-in of a unit."""
    path = os.path.join(folder, f"{unit}.d")
    os.makedirs(path, exist_ok=True)
    text = "\n".join(["# of ublk-ubi", "[Unit]", *dict.fromkeys(settings), ""])
    with open(os.path.join(path, DROP_IN), "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def generate(target: str, folder: str = CONFIG_FOLDER, fstab: str = FSTAB) -> int:
    """Write all drop-ins below `target`; returns 1 when a configuration could not be read."""
    code = 0
    try:
        files = sorted(os.listdir(folder))
    except OSError:
        files = []
    for file in files:
        name = file.removesuffix(".json")
        if name == file or not NAME.fullmatch(name):
            continue
        config = os.path.join(folder, file)
        try:
            settings = [setting for place in paths_of(config) for setting in settings_for(*place)]
            write(target, f"ublk-ubi@{name}.service", settings)
        except (OSError, ValueError, RecursionError) as error:
            print(f"ublk-ubi: {config}: {error}", file=sys.stderr)
            code = 1
    for name, unit in mounts_on_disks(fstab):
        service = f"ublk-ubi@{name}.service"
        if f"{name}.json" in files:
            write(target, unit, [f"Wants={service}", f"After={service}"])
    return code


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: ublk-ubi-generator NORMAL EARLY LATE (systemd.generator)")
    sys.exit(generate(sys.argv[1]))
