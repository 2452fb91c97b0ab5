"""Turns what a user wrote, in a file or on the command line, into checked DeviceOptions.

A value is checked once, here, whichever way it came in; the daemon checks it against the world.
"""

from __future__ import annotations

import functools
import os
import stat
from typing import Any

import msgspec

from ublk_ubi.cpus import parse_cpus
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.hydration import parse_min_free
from ublk_ubi.options import (
    MAX_DEPTH,
    MAX_QUEUES,
    MAX_RATE,
    MAX_STRIPE_SIZE,
    MIN_RATE,
    MIN_STRIPE_SIZE,
    DeviceOptions,
)
from ublk_ubi.runtime import check_name
from ublk_ubi.sizes import format_size, parse_size

MAX_CONFIG = 1 << 20
MAX_ID = (1 << 20) - 1  # the driver's minor numbers
MAX_PATH = 4095
SIZE_KEYS = ("size", "stripe_size", "block_size")
PATH_KEYS = ("image", "base")
CHOICES = {
    "block_size": "512 or 4096",
    "image_format": "raw",
    "image_cache": "none or page",
    "cache": "writeback, writethrough or unsafe",
    "data_path": "auto, zero-copy or copy",
}
EXCLUSIVE = (("format", "adopt"), ("zero", "keep_old_data"))


def load_config(path: str) -> dict[str, Any]:
    """Read a config file: a JSON object with keys of DeviceOptions.

    Sizes may be text (`"5G"`), `rate` too, or `"max"`; `mode` is octal text (`"0660"`); relative
    paths count from the file's own folder. Raises UbiError (usage) that names the file and what is
    wrong with it.
    """
    try:
        values = msgspec.json.decode(_read(path), type=dict[str, Any])
    except OSError as error:
        raise UbiError(f"config {path}: {error.strerror}", Exit.USAGE) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise UbiError(f"config {path} is not a JSON object: {error}", Exit.USAGE) from None
    known = DeviceOptions.__struct_fields__
    if unknown := [key for key in values if key not in known]:
        raise UbiError(
            f"config {path}: unknown key {unknown[0]!r}; the keys are {', '.join(known)}",
            Exit.USAGE,
        )
    folder = os.path.dirname(os.path.abspath(path))
    try:
        read = {key: _from_text(key, value, folder) for key, value in values.items()}
        _convert({**read, "base": read.get("base") or "the command line's"})
    except UbiError as error:
        raise UbiError(f"config {path}: {error.message}", Exit.USAGE) from None
    return read


def build_options(values: dict[str, Any]) -> DeviceOptions:
    """Make checked options of `values`, whose sizes are bytes already. Raises UbiError (usage)."""
    if not values.get("base") and not values.get("image"):
        raise UbiError("--image and --base are missing: say where they are", Exit.USAGE)
    if not values.get("base"):
        raise UbiError("--base is missing: say where the base is", Exit.USAGE)
    if not values.get("image") and not _may_lack_image(values):
        raise UbiError(
            "--image is missing: say where the image is (a base that has all of it needs none)",
            Exit.USAGE,
        )
    options = _convert(values)
    _check(options)
    return options


def _convert(values: dict[str, Any]) -> DeviceOptions:
    """Check the types of values. Raises UbiError (usage)."""
    try:
        return msgspec.convert(values, DeviceOptions)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$.")
        key = where.rstrip("`")
        name = f"{key}: " if key else ""
        way_out = f"; use {CHOICES[key]}" if key in CHOICES else ""
        raise UbiError(f"{name}{reason[:1].lower()}{reason[1:]}{way_out}", Exit.USAGE) from None


@functools.cache  # a live daemon has no list of users any more
def resolve_owner(owner: str) -> tuple[int, int]:
    """Give the uid and gid of `USER[:GROUP]`, by name or number; -1 for a group not given.

    A user by name brings its own group. Raises UbiError (usage) for one that does not exist.
    """
    import grp
    import pwd

    user, colon, group = owner.partition(":")
    uid, gid = -1, -1
    try:
        if user.isascii() and user.isdigit():
            uid = int(user)
        elif user:
            entry = pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
    except KeyError:
        raise UbiError(f"--owner {owner!r}: there is no user {user!r}", Exit.USAGE) from None
    try:
        if group.isascii() and group.isdigit():
            gid = int(group)
        elif group:
            gid = grp.getgrnam(group).gr_gid
    except KeyError:
        raise UbiError(f"--owner {owner!r}: there is no group {group!r}", Exit.USAGE) from None
    if (colon and not group) or (uid < 0 and gid < 0) or max(uid, gid) >= (1 << 32) - 1:
        raise UbiError(f"--owner {owner!r}: write USER, USER:GROUP or :GROUP", Exit.USAGE)
    return uid, gid


def with_owner_by_number(options: DeviceOptions, owner: tuple[int, int]) -> DeviceOptions:
    """Return `options` with what `resolve_owner` gave, for where nobody knows the names."""
    if options.owner is None:
        return options
    uid, gid = ("" if number < 0 else str(number) for number in owner)
    return msgspec.structs.replace(options, owner=f"{uid}:{gid}" if gid else uid)


def parse_rate(text: str) -> int | None:
    """Read a rate in bytes a second, such as 200M; `max` is None. Raises UbiError (usage)."""
    if text == "max":
        return None
    rate = parse_size(text)
    _check_rate(rate, text)
    return rate


def _check_rate(rate: int, said: str) -> None:
    """Refuse a rate that background hydration cannot keep to. Raises UbiError (usage)."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UbiError(
            f"{said} is out of range: {format_size(MIN_RATE)} to {format_size(MAX_RATE)} "
            "(bytes a second), or max",
            Exit.USAGE,
        )


def parse_mode(text: str) -> int:
    """Read permission bits in octal, such as 0660. Raises UbiError (usage)."""
    try:
        mode = int(text, 8) if len(text) <= 5 else -1
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise UbiError(f"mode {text!r} is not three octal digits: write it like 0660", Exit.USAGE)
    return mode


def _read(path: str) -> bytes:
    # Non-blocking, so that a FIFO by mistake does not hang; a pipe by intent (/dev/stdin) works.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UbiError(f"config {path} is not a regular file", Exit.USAGE)
        data = b""
        while piece := os.read(fd, MAX_CONFIG + 1 - len(data)):
            data += piece
    finally:
        os.close(fd)
    if len(data) > MAX_CONFIG:
        raise UbiError(f"config {path} is larger than 1 MiB", Exit.USAGE)
    return data


def _from_text(key: str, value: Any, folder: str) -> Any:
    """Turn the text forms that only people write into values."""
    if key in SIZE_KEYS and isinstance(value, str):
        try:
            return parse_size(value)
        except UbiError as error:
            raise UbiError(f"{key}: {error.message}") from None
    if key == "rate" and isinstance(value, str):
        try:
            return parse_rate(value)
        except UbiError as error:
            raise UbiError(f"rate: {error.message}") from None
    if key == "mode":
        if not isinstance(value, str):
            raise UbiError(f'mode {value!r}: write it as octal text, like "0660"')
        return parse_mode(value)
    if key in PATH_KEYS and isinstance(value, str) and value:
        return os.path.join(folder, value)
    return value


def _check(options: DeviceOptions) -> None:
    """Refuse what no device can be made of. Raises UbiError (usage)."""
    if options.name is not None:
        check_name(options.name)
    for key in PATH_KEYS:
        if (path := getattr(options, key)) is not None:
            _check_path(key, path)
    _check_range("queues", options.queues, 1, MAX_QUEUES)
    if options.depth is not None:
        _check_range("depth", options.depth, 1, MAX_DEPTH)
    if options.rate is not None:
        _check_rate(options.rate, f"--rate {options.rate}")
    parse_min_free(options.min_free)
    for option, cpus in (("--cpus", options.cpus), ("--hydrator-cpus", options.hydrator_cpus)):
        if cpus is not None:
            parse_cpus(option, cpus)
    if options.id is not None:
        _check_range("id", options.id, 0, MAX_ID)
    if options.size is not None and options.size <= 0:
        raise UbiError(f"--size {options.size}: a device has at least one block", Exit.USAGE)
    block = options.block_size
    if options.size is not None and block is not None and options.size % block:
        raise UbiError(
            f"--size {options.size} is no multiple of --block-size {block}: use "
            f"{-(-options.size // block) * block}",
            Exit.USAGE,
        )
    size = options.stripe_size
    if size is not None and (
        not MIN_STRIPE_SIZE <= size <= MAX_STRIPE_SIZE or size.bit_count() != 1
    ):
        raise UbiError(
            f"--stripe-size {format_size(size) if size > 0 else size}: "
            "use 64K, 128K, 256K, 512K or 1M",
            Exit.USAGE,
        )
    if not 0 <= options.mode <= 0o777:
        raise UbiError(f"--mode {options.mode:o} is not three octal digits", Exit.USAGE)
    if not 0 <= options.fence_timeout_s <= 86400:  # NaN included
        raise UbiError(
            f"--fence-timeout {options.fence_timeout_s:g} is out of range: 0 to 86400 seconds",
            Exit.USAGE,
        )
    for one, other in EXCLUSIVE:
        if getattr(options, one) and getattr(options, other):
            raise UbiError(
                f"--{_dashed(one)} and --{_dashed(other)} exclude one another: give one of them",
                Exit.USAGE,
            )
    if options.owner is not None:
        resolve_owner(options.owner)


def _may_lack_image(values: dict[str, Any]) -> bool:
    """Without an image a base is opened, never made."""
    return (values.get("image") is None and os.path.exists(str(values["base"]))
            and not any(values.get(key) for key in ("format", "adopt")))


def _check_path(key: str, path: str) -> None:
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        message = f"--{key} {path!r} is not UTF-8: rename it, or name a link to it"
        raise UbiError(message, Exit.USAGE) from None
    if "\0" in path or length > MAX_PATH:
        raise UbiError(f"--{key} {path[:60]!r} is not a path", Exit.USAGE)


def _check_range(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UbiError(f"--{key} {value} is out of range: {low} to {high}", Exit.USAGE)


def _dashed(key: str) -> str:
    return key.replace("_", "-")
