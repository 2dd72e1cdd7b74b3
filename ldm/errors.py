"""How a command fails: one line that names the thing, its value and the remedy, and an exit code. No traceback."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """What the user gave cannot be used: exit code 2."""


class RunError(RuntimeError):
    """A run that was rightly started has failed: exit code 1."""


class Stopped(RuntimeError):
    """A run that a signal ended, everything saved: exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def exit_code_of(command: Callable[[], None]) -> int:
    """Runs `command`; its one-line failure goes to standard error, its exit code is returned."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
