"""`ublk-ubi serve`: bdev_ubi's calls on a socket."""

from __future__ import annotations

import os

import click

from ublk_ubi.cli.common import UbiCommand

EXAMPLES = """
  ublk-ubi serve --json spdk_conf.json
  ublk-ubi serve --json spdk_conf.json --spdk /var/tmp/spdk.sock
  ublk-ubi serve -r /var/tmp/spdk.sock                   where bdev_ubi was listening
"""


@click.command(cls=UbiCommand, examples=EXAMPLES)
@click.option(
    "-r", "--rpc-socket", metavar="PATH",
    help="Where to listen, mode 0600. [default: /run/ublk-ubi/rpc.sock]",
)
@click.option(
    "--json", "config_path", metavar="FILE",
    help="Configuration to begin with, in SPDK's form, as bdev_ubi has it.",
)
@click.option(
    "--spdk", "spdk_socket", metavar="SOCKET",
    help="SPDK's own socket: make each disk's bdev there, and pass vhost calls on to it.",
)
def command(*, rpc_socket: str | None, config_path: str | None, spdk_socket: str | None) -> int:
    """Serve SPDK's JSON-RPC with bdev_ubi's calls, until ended by a signal.

    Takes bdev_ubi's place: bdev_ubi_create, bdev_ubi_delete, bdev_aio_create and bdev_uring_create
    (a name for a path), bdev_get_bdevs, save_config; and bdev_ubi_status, _hydrate, _wait,
    _recover, _upgrade, _resize. Disks are made as `add` makes them, writethrough unless told, and
    stay when this ends; started again it finds them.
    """
    from ublk_ubi.serve import loading, process

    calls: list[loading.Call] = []
    if config_path is not None:
        calls = loading.read(
            config_path, with_spdk=spdk_socket is not None, report=process.log,
        )
    path = os.path.abspath(rpc_socket or process.default_socket())
    spdk_path = os.path.abspath(spdk_socket) if spdk_socket is not None else None
    return process.Serve(path, spdk_path).run(calls)
