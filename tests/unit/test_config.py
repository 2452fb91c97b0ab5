"""Config files and options: what is taken, and the one line for everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from ublk_ubi import config
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import DeviceOptions

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, values: object) -> str:
    path = folder / "vm.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def refused(function: Any, *args: Any) -> str:
    with pytest.raises(UbiError) as caught:
        function(*args)
    assert caught.value.code == Exit.USAGE
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_whole_config(tmp_path: Path) -> None:
    path = write(tmp_path, {
        "image": "golden.raw", "base": "/srv/vm.base", "name": "vm", "size": "5G",
        "stripe_size": "64K", "block_size": "4K", "mode": "0640", "queues": 2,
        "copy_on_read": False, "fence_timeout_s": 5,
    })
    options = config.build_options(config.load_config(path))
    assert options == DeviceOptions(
        image=str(tmp_path / "golden.raw"), base="/srv/vm.base", name="vm", size=5 << 30,
        stripe_size=64 << 10, block_size=4096, mode=0o640, queues=2, copy_on_read=False,
        fence_timeout_s=5.0,
    )


@pytest.mark.parametrize(("text", "rate"), [("200M", 200 << 20), ("max", None), (65536, 65536)])
def test_rates(tmp_path: Path, text: object, rate: int | None) -> None:
    path = write(tmp_path, {"image": "/i", "base": "/b", "rate": text, "hydrate": True})
    options = config.build_options(config.load_config(path))
    assert (options.rate, options.hydrate) == (rate, True)


def test_a_base_that_is_there_may_lack_its_image(tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert "--image is missing" in refused(config.build_options, {"base": str(base)})
    base.touch()
    assert config.build_options({"base": str(base)}).image is None
    for making in ("format", "adopt"):
        values = {"base": str(base), making: True}
        assert "--image is missing" in refused(config.build_options, values)


def test_bytes_are_sizes_too(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": "/i", "base": "/b", "size": 4096})
    assert config.build_options(config.load_config(path)).size == 4096


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"image":', "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"image": "\xff"}', None),
        ({"image": "/i", "bas": "/b"}, "unknown key 'bas'; the keys are base, image, name"),
        ({"size": "5GB"}, "size: '5GB' can be read two ways: write 5G"),
        ({"stripe_size": "x"}, "stripe_size: 'x' is not a size"),
        ({"mode": 660}, 'write it as octal text, like "0660"'),
        ({"mode": "rw"}, "not three octal digits"),
        ({"mode": "1777"}, "not three octal digits"),
        ({"rate": "200MB"}, "rate: '200MB' can be read two ways: write 200M"),
        ({"rate": "1K"}, "rate: 1K is out of range: 64K to 16G"),
        ({"rate": "fast"}, "rate: 'fast' is not a size"),
        ({"hydrate": 1}, "hydrate: expected `bool`, got `int`"),
        ({"cache": "writeback,"}, "use writeback, writethrough or unsafe"),
        ({"base": 7}, "base: expected `str`, got `int`"),
    ],
)
def test_files_that_are_refused_by_name(tmp_path: Path, values: Any, words: str | None) -> None:
    path = write(tmp_path, values)
    if words is None:
        config.load_config(path)
        return
    message = refused(config.load_config, path)
    assert message.startswith(f"config {path}")
    assert words in message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "No such file" in refused(config.load_config, str(tmp_path / "nope"))
    assert "not a regular file" in refused(config.load_config, str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refused(config.load_config, str(tmp_path / "fifo"))
    (tmp_path / "big").write_bytes(b" " * (config.MAX_CONFIG + 1))
    assert "larger than 1 MiB" in refused(config.load_config, str(tmp_path / "big"))
    (tmp_path / "binary").write_bytes(b'{"image":"\xff"}')
    assert "not a JSON object" in refused(config.load_config, str(tmp_path / "binary"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image": None}, "--image is missing"),
        ({"image": ""}, "--image is missing"),
        ({"base": ""}, "--base is missing"),
        ({"image": "", "base": ""}, "--image and --base are missing"),
        ({"image": 5}, "image: expected `str | null`, got `int`"),
        ({"image": "a\0b"}, "is not a path"),
        ({"image": "/" + "a" * 5000}, "is not a path"),
        ({"base": "/\udcff"}, "is not UTF-8"),
        ({"queues": 0}, "--queues 0 is out of range: 1 to 64"),
        ({"queues": 65}, "--queues 65"),
        ({"queues": True}, "queues: expected `int`"),
        ({"queues": "2"}, "queues: expected `int`, got `str`"),
        ({"depth": 4097}, "--depth 4097 is out of range: 1 to 4096"),
        ({"depth": 0}, "--depth 0 is out of range: 1 to 4096"),
        ({"cache": "no"}, "cache: invalid enum value 'no'; use writeback, writethrough or unsafe"),
        ({"data_path": "x"}, "data_path: invalid enum value 'x'; use auto, zero-copy or copy"),
        ({"rate": 65535}, "--rate 65535 is out of range: 64K to 16G (bytes a second), or max"),
        ({"rate": (1 << 34) + 1}, "--rate 17179869185 is out of range"),
        ({"min_free": "100%"}, "--min-free '100%' is no share of a filesystem"),
        ({"min_free": "nan%"}, "--min-free 'nan%' is no share of a filesystem"),
        ({"min_free": "-1%"}, "--min-free '-1%' is no share of a filesystem"),
        ({"min_free": "5GB"}, "--min-free: '5GB' can be read two ways"),
        ({"cpus": "0-"}, "--cpus '0-' is not a list of CPUs: write it like 0-3,8"),
        ({"hydrator_cpus": "a"}, "--hydrator-cpus 'a' is not a list of CPUs"),
        ({"hydrate": "yes"}, "hydrate: expected `bool`, got `str`"),
        ({"id": -1}, "--id -1 is out of range"),
        ({"id": 1 << 32}, "--id 4294967296 is out of range"),
        ({"size": 0}, "--size 0"),
        ({"size": -512}, "--size -512"),
        ({"size": 513 << 9, "block_size": 4096}, "no multiple of --block-size 4096: use 266240"),
        ({"stripe_size": 32 << 10}, "--stripe-size 32K: use 64K, 128K"),
        ({"stripe_size": 2 << 20}, "--stripe-size 2M"),
        ({"stripe_size": 96 << 10}, "--stripe-size 96K"),
        ({"stripe_size": -1}, "--stripe-size -1"),
        ({"block_size": 1024}, "block_size: invalid enum value 1024; use 512 or 4096"),
        ({"image_format": "qcow2"}, "image_format: invalid enum value 'qcow2'; use raw"),
        ({"image_cache": "all"}, "image_cache: invalid enum value 'all'; use none or page"),
        ({"mode": 0o1777}, "--mode 1777"),
        ({"name": "../x"}, "cannot be a name"),
        ({"fence_timeout_s": -1}, "--fence-timeout -1"),
        ({"fence_timeout_s": float("nan")}, "--fence-timeout nan"),
        ({"fence_timeout_s": float("inf")}, "--fence-timeout inf"),
        ({"format": True, "adopt": True}, "--format and --adopt exclude one another"),
        ({"zero": True, "keep_old_data": True}, "--zero and --keep-old-data exclude"),
        ({"owner": "no-such-user"}, "there is no user 'no-such-user'"),
        ({"owner": "root:no-such-group"}, "there is no group 'no-such-group'"),
        ({"owner": ":"}, "write USER, USER:GROUP or :GROUP"),
        ({"owner": ""}, "write USER, USER:GROUP or :GROUP"),
        ({"owner": "root:"}, "write USER, USER:GROUP or :GROUP"),
        ({"owner": "5000000000"}, "write USER, USER:GROUP or :GROUP"),
        ({"nonsense": 1}, "object contains unknown field `nonsense`"),
    ],
)
def test_options_that_are_refused(values: dict[str, Any], words: str) -> None:
    assert words in refused(config.build_options, {"image": "/i", "base": "/b", **values})


@pytest.mark.parametrize(
    ("owner", "ids"),
    [("root", (0, 0)), ("root:root", (0, 0)), (":0", (-1, 0)), ("7", (7, -1)), ("7:8", (7, 8))],
)
def test_owners(owner: str, ids: tuple[int, int]) -> None:
    assert config.resolve_owner(owner) == ids
    options = DeviceOptions(base="/b", owner=owner)
    by_number = config.with_owner_by_number(options, ids).owner
    assert by_number is not None
    assert "root" not in by_number
    assert config.resolve_owner(by_number) == ids
    none = DeviceOptions(base="/b")
    assert config.with_owner_by_number(none, (-1, -1)) == none


def test_the_daemons_import_stays_small() -> None:
    """What the daemon reads its options with must not bring the CLI's libraries."""
    code = (
        "import sys, ublk_ubi.config, ublk_ubi.runtime, ublk_ubi.links, ublk_ubi.rpc_server\n"
        "print([name for name in ('click', 'rich', 'asyncio') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
