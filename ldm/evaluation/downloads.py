"""Weights of others that only torch.hub's servers have: no repository of the Hub, no safetensors."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import torch

from ldm.errors import RunError, UserError

SILENCE = 20.0
"""Seconds after which a server that sends nothing is given up."""


def cached(url: str) -> Path:
    """Where torch.hub keeps the file of a URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def download(url: str) -> None:
    """Weights that torch.hub keeps, fetched where they are not in its cache and checked by the hash in their name.

    Raises:
        UserError: they are not there and cannot be had, or hold anything but tensors.
        RunError: the download broke off.
    """
    try:
        with _given_up_after(SILENCE):
            torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=sys.stderr.isatty(), check_hash=True, weights_only=True
            )
    except (URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"{url} cannot be reached ({type(error).__name__}); fetch it elsewhere, to {cached(url)}"
        ) from None
    except Exception as error:  # of the file: unpickling knows many
        if cached(url).is_file():
            raise UserError(f"'{cached(url)}' is damaged ({type(error).__name__}); delete it") from None
        raise RunError(f"the download of {url} broke off ({type(error).__name__}); run it again") from None


@contextmanager
def _given_up_after(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
