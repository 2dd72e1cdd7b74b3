"""What the figures of an evaluation are a function of, and the folder that belongs to it. Imports nothing heavy."""

import json
import os
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import write_text

SETTINGS = "settings.json"


def check_output(output: Path) -> None:
    """Raises `UserError` unless `output` is new, empty, or of an evaluation that was begun, and can be written."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output '{output}' is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / SETTINGS).is_file():
        raise UserError(f"--output '{output}' is already in use, and by no evaluation; name a new folder")
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"--output '{output}': '{existing}' cannot be written; name another folder")


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Makes the folder that of an evaluation with `settings`, or goes on with it where it is that already.

    Raises:
        UserError: another evaluation was begun there; the line names the settings that differ.
    """
    settings = json.loads(json.dumps(settings))  # as they will be read again: tuples are lists
    path = output / SETTINGS
    if path.is_file():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
        except (ValueError, TypeError):
            raise UserError(f"'{path}' cannot be read; remove the folder, or name a new one") from None
        if differing:
            said = ", ".join(f"{name} {begun.get(name)}, now {settings.get(name)}" for name in differing)
            raise UserError(f"--output '{output}' is of another evaluation: {said}; name a new folder")
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--output '{output}' cannot be written: {error.strerror}; name another folder") from None
