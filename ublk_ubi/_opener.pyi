# Types of the compiled opener.

from typing import Any, NoReturn

REFUSALS: tuple[str, ...]

class Refused(Exception):  # noqa: N818 - it is an answer
    reason: str
    opener: Opener

class Opener:
    base_fd: int
    sync_fd: int
    def __init__(
        self,
        *,
        base_fd: int,
        sync_fd: int,
        base_bytes: int,
        image_bytes: int,
        identity: tuple[int, int],
        fingerprint: bytes,
        new_uuid: bytes,
        boot_id: bytes,
        stripe_bytes: int,
        default_stripe_bytes: int,
        block_bytes: int,
        format: bool,  # noqa: A002 - the option's name
        adopt: bool,
        force: bool,
        force_stale: bool,
        no_image: bool,
        image_lost: bool = False,
        device_bytes: int = 0,
    ) -> None: ...
    def open(self, host: Any) -> None: ...
    def close(self, host: Any) -> None: ...
    def grow(self, host: Any, device_bytes: int) -> None: ...
    def let_go(self) -> None: ...
    def set_device_bytes(self, device_bytes: int) -> None: ...
    def fail(self) -> NoReturn: ...
    @property
    def uuid(self) -> bytes: ...
    @property
    def generation(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def fingerprint(self) -> bytes: ...
    @property
    def recorded_image_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def recorded_device_bytes(self) -> int: ...
    @property
    def stripe_bytes(self) -> int: ...
    @property
    def image_stripes(self) -> int: ...
    @property
    def creating(self) -> bool: ...
    @property
    def adopting(self) -> bool: ...
    @property
    def going_on(self) -> bool: ...
    @property
    def latch(self) -> int: ...
