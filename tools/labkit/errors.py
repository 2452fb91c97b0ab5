"""How the lab says no."""

USAGE = 2
TIMED_OUT = 124
BROKEN = 125  # the lab itself failed: kernel not built, guest died


class LabError(Exception):
    """One line that names the thing, the value and the way out; `status` is the exit status."""

    def __init__(self, message: str, status: int = BROKEN) -> None:
        super().__init__(message)
        self.status = status
