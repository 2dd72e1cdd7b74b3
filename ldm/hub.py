"""From a folder or the name of a repository to a local folder whose components are whole."""

import json
from pathlib import Path

from ldm.errors import UserError

INDEX = "model_index.json"
PATTERNS = ["*.safetensors", "*.json", "*.txt"]


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is, anything else as a repository of the Hub, of which only safetensors and JSON are taken.

    Raises `UserError` where there is no such folder, repository or revision, or no connection.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision!r} belongs to a repository, but '{name}' is a folder; leave it out")
        return folder
    if folder.exists():
        raise UserError(f"model '{name}' is a file; give the folder that holds {INDEX}")
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")) or str(name).endswith("/"):
        raise UserError(f"model folder '{name}' does not exist; give a folder that holds {INDEX}, or owner/repository")
    return _download(str(name), revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except GatedRepoError:
        reason = "is gated; accept its terms on its page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is neither a folder nor a repository that can be read; check the name, or log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r}; give a branch, a tag or a full commit hash"
    except HFValidationError:
        reason = "is neither a folder nor a possible repository name; it must be owner/repository"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError) as error:
        response = getattr(error.__cause__ or error, "response", None)
        what = "cannot be reached" if response is None else f"answered {response.status_code}"
        reason = f"is no folder, is not in the cache, and the Hub {what}; check the name and the connection"
    raise UserError(f"model '{name}' {reason}")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises `UserError` where it is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing; the folder is incomplete: copy or write it again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({type(error).__name__}); copy or write it again") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' does not hold a JSON object; copy or write it again")
    return content


def check_components(folder: Path) -> None:
    """Raises `UserError` unless every component that `model_index.json` names is there and whole."""
    index = read_json(folder / INDEX)
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            check_component(folder / name, str(entry[1]))


def check_component(folder: Path, class_name: str) -> None:
    """Raises `UserError` unless `folder` holds a scheduler's, tokenizer's, processor's or model's files, whole."""
    if not folder.is_dir():
        raise UserError(f"'{folder}' is missing; the model needs this component ({class_name})")
    if "Tokenizer" in class_name:
        read_json(folder / "tokenizer_config.json")
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise UserError(f"'{folder / 'tokenizer.json'}' is missing; the folder is incomplete: copy it again")
    elif "Scheduler" in class_name:
        read_json(folder / "scheduler_config.json")
    elif "Processor" in class_name or "Extractor" in class_name:
        read_json(folder / "preprocessor_config.json")
    else:
        read_json(folder / "config.json")
        _check_weights(folder, class_name)


def _check_weights(folder: Path, class_name: str) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise UserError(
                f"'{folder / pickles[0]}' is a pickle, which is not opened; save the model with safe_serialization=True"
            )
        raise UserError(f"'{folder}' holds no *.safetensors; the weights of this {class_name} are missing")
    for index in folder.glob("*.safetensors.index.json"):
        for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not (folder / shard).is_file():
                raise UserError(f"'{folder / shard}' is missing, though {index.name} names it; copy it again")
    for file in files:
        _check_length(file)


def _check_length(path: Path) -> None:
    """A safetensors file is a length (8 bytes, little-endian), a JSON header of that length, and the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        try:
            if not 0 < header_length <= size - 8:
                raise ValueError
            header = json.loads(file.read(header_length))
            tensors = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + header_length + max(tensors, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(
                f"'{path}' is not a whole safetensors file ({size} bytes); copy or write it again"
            ) from None
    if size != expected:
        raise UserError(f"'{path}' has {size} bytes of {expected}: half-written; copy or write it again")
