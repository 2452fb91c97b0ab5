"""`ublk-ubi del`: takes disks away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ublk_ubi.cli.common import Seconds, UbiCommand, complete_name, json_option, say
from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ublk_ubi.runtime import Device

EXAMPLES = """
  ublk-ubi del ubi0
  ublk-ubi del /dev/ublkb0 /dev/ublk-ubi/vm1
  ublk-ubi del vm1 --if-exists --timeout 60
  ublk-ubi del -a --force
"""
_AT_ONCE = 16


@click.command("del", cls=UbiCommand, examples=EXAMPLES)
@click.argument("targets", metavar="[NAME]...", nargs=-1, shell_complete=complete_name)
@click.option("-a", "--all", "everything", is_flag=True, help="All disks of this machine.")
@click.option(
    "--force", is_flag=True,
    help="Also when it is open or mounted; kill a daemon that does not stop in time.",
)
@click.option("--if-exists", is_flag=True, help="A disk that is not there is no error.")
@click.option(
    "--timeout", "timeout_s", type=Seconds(0.1, 86400), metavar="SECONDS",
    help="How long a disk may take to stop. [default: 30, with --force 10]",
)
@json_option
def command(
    *,
    targets: tuple[str, ...],
    everything: bool,
    force: bool,
    if_exists: bool,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    """Take disks away; what was written stays on their bases.

    Stopping makes durable what is not so yet. A disk that is open or mounted is refused without
    --force, which takes it away from under its users. Also clears up after a daemon that died.
    """
    from ublk_ubi import removal
    from ublk_ubi.cli.many import tell_end

    if everything == bool(targets):
        raise click.UsageError("give NAMEs, or -a for all")
    if timeout_s is None:
        timeout_s = removal.FORCED_TIMEOUT_S if force else removal.DEFAULT_TIMEOUT_S
    errors: list[UbiError] = []
    deleted = []
    devices = _find(targets, errors, if_exists=if_exists)

    def remove(device: Device) -> None:
        removal.remove_device(device, force=force, timeout_s=timeout_s)

    for device, problem in zip(devices, _each(remove, devices), strict=True):
        if isinstance(problem, UbiError):
            errors.append(problem)
            continue
        if problem is not None:
            raise problem
        deleted.append(device.name)
        if not as_json:
            say(f"{device.name} deleted")
    return tell_end({"deleted": deleted}, errors, as_json=as_json)


def _each(function: Callable[[Device], None], devices: list[Device]) -> Iterator[Exception | None]:
    """Call a function for each device, several at once: most of stopping is waiting.

    Yields what each raised, in order. The threads are daemons: a Ctrl-C waits for none of them.
    """
    import threading

    from ublk_ubi import structs

    structs.make_ready()
    outcomes: dict[str, Exception] = {}
    places = threading.Semaphore(_AT_ONCE)

    def work(device: Device) -> None:
        with places:
            try:
                function(device)
            except Exception as error:
                outcomes[device.name] = error

    threads = [threading.Thread(target=work, args=(device,), daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    for thread, device in zip(threads, devices, strict=True):
        thread.join()
        yield outcomes.get(device.name)


def _find(
    targets: tuple[str, ...], errors: list[UbiError], *, if_exists: bool,
) -> list[Device]:
    """Resolve the targets, each device once; all of them when there is no target."""
    from ublk_ubi.links import resolve
    from ublk_ubi.runtime import all_devices

    if not targets:
        return all_devices()
    found: dict[str, Device] = {}
    for target in targets:
        try:
            device = resolve(target)
        except UbiError as error:
            if error.code != Exit.NO_DEVICE or not if_exists:
                errors.append(error)
            continue
        found[device.name] = device
    return list(found.values())
