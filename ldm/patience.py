"""Requests of the Hub's client that end: by itself it waits without bound for some answers, and for others minutes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

SILENCE = 8.0
"""Seconds that a connection may stay silent."""
TRIES = 12.0
"""Seconds after which what has brought nothing so far is not asked for again."""


class GaveUp(Exception):
    """Not one of the errors after which the client tries again."""


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, every request gives up after `SILENCE`, and `GaveUp` is raised instead of a repetition after `TRIES`.

    A download that goes on from where it was cut is no repetition: it asks for other bytes of the file.
    """
    from huggingface_hub import get_session

    session = get_session()
    first_asked: dict[tuple[str, str, str | None], float] = {}
    is_over = False

    def bound(request) -> None:
        nonlocal is_over
        now, wanted = time.monotonic(), (request.method, str(request.url), request.headers.get("Range"))
        is_over = is_over or now - first_asked.setdefault(wanted, now) > TRIES
        if is_over:
            raise GaveUp("the Hub does not answer")
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), SILENCE)

    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks.get("request", []), bound]}
    try:
        yield
    finally:
        session.event_hooks = hooks
