"""How a command fails: one line that names the thing, its value and the remedy, and an exit code. No traceback."""

import difflib
import errno
import sys
from collections.abc import Callable
from typing import Any

REMEDIES = {
    errno.ENAMETOOLONG: "is too long for a file's name; give a shorter one",
    errno.EACCES: "may not be opened; change its permissions, or name another",
}
"""What a user did with a file, wherever that is noticed first."""


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
    except (RunError, OSError) as error:  # of the latter those that nobody expected, which name their file
        if remedy := REMEDIES.get(getattr(error, "errno", None)):
            print(f"error: '{error.filename}' {remedy}", file=sys.stderr)
            return 2
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def nearest(name: str, known: list[str]) -> str:
    """What an error says after a name that is not known: the one that was probably meant, or all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def require(holds: bool, name: str, value: Any, allowed: str) -> None:
    """Raises UserError, which says what is `allowed`, unless the value of `name` `holds`."""
    if not holds:
        raise UserError(f"{name} must be {allowed}, got {value}")


def choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises UserError, which names the nearest, unless the value of `name` is one of those `allowed`."""
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{nearest(value, list(allowed))}")
