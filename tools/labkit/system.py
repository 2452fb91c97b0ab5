"""What a guest can be: user-mode Linux on the machine's own files, or a Debian machine in QEMU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(frozen=True)
class Lines:
    """Descriptors of the guest's ends of its lines to the relay."""

    log: int  # kernel messages
    out: int
    err: int
    control_up: int
    screen: int
    control_down: int
    keys: int

    @classmethod
    def from_base(cls, base: int) -> Lines:
        """Make lines of descriptors in a row."""
        return cls(*range(base, base + len(cls.__dataclass_fields__)))


@dataclass(frozen=True)
class Spec:
    """One boot, as the first process of the guest's namespace knows it."""

    memory: int  # bytes
    cpus: int
    disks: list[str]  # files
    private: str  # a folder that only the guest's process sees, writable
    lines: Lines


class System(Protocol):
    """Starts guests of one kind."""

    @property
    def memory_is_private(self) -> bool:
        """Tell whether the guest's memory lies in the private folder."""

    @property
    def private_bytes(self) -> int:
        """Tell how much more than disks and memory the private folder is to hold."""

    @property
    def has_terminal(self) -> bool:
        """Tell whether COMMAND can have the caller's terminal."""

    def disk_nodes(self, count: int) -> list[str]:
        """Name the device nodes of the caller's disks."""

    def write_files(self, private: str, plan: Plan) -> None:
        """Put what the guest reads first into the private folder."""

    def command(self, spec: Spec) -> tuple[str, list[str]]:
        """Return the program that is the guest, and its arguments, its name first."""
