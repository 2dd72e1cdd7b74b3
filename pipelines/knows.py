"""What a model knows: `knows.json` in its folder, {"words": [...], "says": "..."}."""

import re
from pathlib import Path

from ldm import hub
from ldm.errors import UserError

NAME = "knows.json"


def note_on(folder: Path, prompt: str) -> str:
    """What the model says of a prompt that has none of its words; nothing where it has one, or says nothing.

    Raises:
        UserError: the file is not as it must be.
    """
    if not (folder / NAME).is_file():
        return ""
    knows = hub.read_json(folder / NAME)
    words, says = knows.get("words", []), knows.get("says", "")
    if not isinstance(says, str) or not isinstance(words, list):
        raise UserError(f"'{folder / NAME}': words must be a list, and says a text; mend it there, or remove it")
    said = set(re.findall(r"\w+", prompt.lower()))
    return "" if any(word in said or f"{word}s" in said for word in words) else says
