"""From a folder or the name of a repository to a local folder whose components are whole and fit each other.

What is wrong with a folder is told before the libraries are there: `check_components` imports none of them,
`check_finite` numpy, and only `check_shapes` torch.
"""

import hashlib
import logging
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ldm.components import configs, fit, shapes, weights
from ldm.components.configs import CLASSES, read_json
from ldm.errors import RunError, UserError
from ldm.files import expanded, sha256, write_text
from ldm.patience import bounded

INDEX = "model_index.json"
REPORT = "report.json"
"""{what was measured: value}, or the report of `ldm evaluate`, for the card."""
ADAPTERS = "pytorch_lora_weights.safetensors"
"""As Diffusers' `save_lora_weights` calls them."""
NOT_OPENED = ("safety_checker",)
"""Of the layouts of others: what no pipeline of ours reads, and a download leaves out."""
BESIDE = ("README.md", "LICENSE", "grid.png", "training/*.yaml")
"""Of a repository's files that no component needs: what a card is made of, and stays with the model."""
STEMS = ("model", "diffusion_pytorch_model")
"""Names of weight files, without an ending: Transformers', Diffusers'."""
DOWNLOAD_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
"""Of the Hub's client, as its own functions take them."""


class Component(NamedTuple):
    folder: Path
    class_name: str
    config: dict[str, Any]
    tensors: dict[str, weights.Stored]
    """Empty for what has no weights: tokenizers, schedulers, processors."""

    def is_of(self, variant: str) -> bool:
        """Whether its weights are those of a variant, `<stem>.<variant>…safetensors`."""
        return any(f".{variant}" in tensor.file.name for tensor in self.tensors.values())


def resolve(name: str | Path, revision: str | None = None, variant: str | None = None, **options: Any) -> Path:
    """A local folder as it is, anything else as a repository of the Hub, of which only safetensors and JSON are taken.

    A repository's revision is resolved once and its commit told on standard error (`commit_of` the folder); from the
    cache where there is no connection. `options`: those of `DOWNLOAD_OPTIONS`. Raises `UserError` where there is no
    such folder, repository or revision, or neither cache nor connection, and `RunError` where a download broke off.
    """
    folder = expanded(name)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision!r} belongs to a repository, but '{name}' is a folder; leave it out")
        return folder
    if folder.exists():
        raise UserError(f"model '{name}' is a file; give the folder that holds {INDEX}")
    if not is_repository_name(name):
        raise UserError(f"model folder '{name}' does not exist; give a folder that holds {INDEX}, or owner/repository")
    return _download("model", str(name), revision, _patterns(variant), options)


def resolve_adapters(
    name: str | Path, revision: str | None = None, weight_name: str | None = None, **options: Any
) -> Path:
    """The file of adapters (LoRA), whole and finite: `name` itself, or of a folder, a run's, or a repository of the Hub
    the one called `weight_name`, ADAPTERS or else the only one. Raises as `resolve` does, and for pickles."""
    path = expanded(name)
    if not path.exists():
        if not is_repository_name(name):
            raise UserError(f"adapters '{name}' do not exist; give a file, a folder that holds {ADAPTERS}, or "
                            "owner/repository")  # fmt: skip
        patterns = ([weight_name or "*.safetensors"], [] if weight_name else ["*/*"])
        path = _download("adapters", str(name), revision, patterns, options)
    elif revision is not None:
        raise UserError(f"revision {revision!r} belongs to a repository, but '{name}' is on this machine; leave it out")
    if path.is_dir():
        path = _file_of_adapters(path / "model" if (path / "model" / ADAPTERS).is_file() else path, weight_name)
    if path.suffix != ".safetensors":
        raise UserError(f"adapters '{path}': only safetensors are opened, no pickles; convert it")
    tensors = weights.read_header(path, needs_format=False)
    if not tensors:
        raise UserError(f"adapters '{path}' hold no weights; save them again")
    weights.check_finite(path.name, tensors)
    return path


def _file_of_adapters(folder: Path, weight_name: str | None) -> Path:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if weight_name is None and ADAPTERS not in names and len(names) > 1:
        raise UserError(f"adapters '{folder}' are several: {', '.join(names)}; name one with weight_name")
    path = folder / (weight_name or (ADAPTERS if ADAPTERS in names or not names else names[0]))
    if not path.is_file():
        if not names and (pickles := sorted(path.name for path in folder.glob("*.bin"))):
            raise UserError(f"adapters '{folder}': only a pickle ({pickles[0]}) is there; convert it to safetensors")
        raise UserError(f"adapters missing: expected {path}")
    return path


def is_repository_name(name: str | Path) -> bool:
    """Whether what is no folder here may be a repository, owner/name."""
    return str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")) and not str(name).endswith("/")


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache is of; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) else None


def sha256_of_model(folder: Path) -> str:
    """The sha256, its first 16 digits, of all files of a model that say what it draws: not of what is told of it."""
    counted = (path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".safetensors"))
    files = sorted(path for path in counted if path != folder / REPORT)
    lines = [f"{path.relative_to(folder).as_posix()} {sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def fetch(name: str, files: list[str]) -> Path:
    """The cache's folder of those `files` that a repository has. Raises as `resolve` does."""
    return _download("model", name, None, (files, []), {})


def _download(
    what: str, name: str, revision: str | None, patterns: tuple[list[str], list[str]], options: dict[str, Any]
) -> Path:
    """The files of a repository that match the first patterns and not the second; `what` they are, for errors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars

    allowed, ignored = patterns
    files = {"allow_patterns": allowed, "ignore_patterns": ignored}
    commit, refusal, there = _commit(name, revision, options)
    if what == "model":
        _refuse_pickles(there)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each attempt of a download that fails is a warning
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        if isinstance(refusal, RevisionNotFoundError):
            raise refusal
        if commit is None:
            try:
                folder = Path(
                    snapshot_download(name, revision=revision, **{**files, **options, "local_files_only": True})
                )
            except LocalEntryNotFoundError:
                raise refusal from None
        else:
            with bounded():
                folder = Path(snapshot_download(name, revision=commit, **files, **options))
            _remember(folder, revision or "main", commit)
    except GatedRepoError:
        reason = "is gated; accept its terms on its page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is neither a folder nor a repository that can be read; check the name, or log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r}; give a branch, a tag or a full commit hash"
    except HFValidationError:
        reason = "is neither a folder nor a possible repository name; it must be owner/repository"
    except Exception as error:  # of the connection or the disk: the client wraps neither
        response = getattr(error, "response", None)
        if commit is not None:
            said = " ".join(str(error).split())[:200]
            raise RunError(
                f"the download of '{name}' broke off ({type(error).__name__}: {said}); run it again: what has arrived "
                "is kept"
            ) from None
        said = "cannot be reached" if response is None else f"answered {response.status_code}"
        reason = f"is no folder, is not whole in the cache, and the Hub {said}; check the name and the connection"
    else:
        print(f"note: '{name}' is of commit {commit_of(folder)}", file=sys.stderr)
        return folder
    raise UserError(f"{what} '{name}' {reason}")


def _commit(name: str, revision: str | None, options: dict[str, Any]) -> tuple[str | None, Exception | None, list[str]]:
    """The commit that a revision now is, or why that cannot be known; and its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    if options.get("local_files_only"):
        return None, OfflineModeIsEnabled("local_files_only"), []
    try:
        with bounded():
            info = HfApi(token=options.get("token")).model_info(name, revision=revision)
    except Exception as error:  # refusals of the Hub, and whatever the client's transport raises
        return None, error, []
    return info.sha, None, [file.rfilename for file in info.siblings or []]


def _refuse_pickles(files: list[str]) -> None:
    """Raises `UserError` for a component of which a repository holds pickles alone, which are not downloaded."""
    for component in CLASSES:
        own = [file for file in files if file.startswith(f"{component}/")]
        if any(file.endswith(".bin") for file in own) and not any(file.endswith(".safetensors") for file in own):
            raise weights.pickle_only(component)


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Notes in the cache which commit a branch or tag is, as the client does where it resolves them itself."""
    if revision != commit:
        path = folder.parents[1] / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, commit)


def _patterns(variant: str | None) -> tuple[list[str], list[str]]:
    """What is downloaded of a repository, and what is not: whole models in one file, other variants, pickles."""
    allowed = ["*.json", "*.txt", *BESIDE]
    for stem in STEMS:
        for kind in (f".{variant}", "") if variant else ("",):
            allowed += [f"*/{stem}{kind}.safetensors", f"*/{stem}{kind}-*-of-*.safetensors"]
            allowed += [f"*/{stem}-*-of-*{kind}.safetensors"]  # as Diffusers named them before 0.32
    return allowed, [f"{name}/*" for name in NOT_OPENED]


def check_components(folder: Path, leave_out: Collection[str] = (), variant: str | None = None) -> dict[str, Component]:
    """The components that `model_index.json` names, each whole, of an allowed class and of the others' sizes.

    `leave_out`: names of those that come from elsewhere. Raises `UserError` at the first fault.
    """
    found = {}
    for name, entry in read_json(folder / INDEX).items():
        if name.startswith("_") or not isinstance(entry, list) or name in (*leave_out, *NOT_OPENED):
            continue
        if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
            raise UserError(f"'{folder / INDEX}': '{name}' must be [library, class], got {str(entry)[:80]}")
        if entry[1] is None:
            continue
        if name not in CLASSES:
            raise UserError(f"'{name}' must be one of {', '.join(CLASSES)}, got a component of class {entry[1]}")
        found[name] = _check(folder / name, configs.check_class(name, entry), variant)
    if variant is not None and not any(component.is_of(variant) for component in found.values()):
        raise UserError(
            f"You are trying to load the model files of the `variant={variant}`, but '{folder}' holds none; leave it "
            "out"
        )
    fit.check_fit({name: component.config for name, component in found.items()})
    for tokenizer, tower in (("tokenizer", "text_encoder"), ("prior_tokenizer", "prior_text_encoder")):
        if tokenizer in found and tower in found:
            fit.check_tokenizer(folder / tokenizer, found[tokenizer].config, found[tower].config)
    for name, component in found.items():
        shapes.check_outline(name, component.class_name, component.config, component.tensors)
    return found


def check_component(folder: Path, classes: tuple[str, ...] | None = None, variant: str | None = None) -> Component:
    """The component in `folder`, whole. `classes`: those that it may be of, where not those that its name tells.

    Raises `UserError` at the first fault.
    """
    classes = classes or CLASSES[folder.name]
    if not folder.is_dir():
        raise configs.missing(folder.name, folder)
    return _check(folder, configs.written_class(folder, classes), variant)


def _check(folder: Path, class_name: str, variant: str | None) -> Component:
    if not folder.is_dir():
        raise configs.missing(folder.name, folder)
    config = configs.read_config(folder, class_name)
    has_weights = configs.config_path(folder, class_name).name == "config.json"
    stem = STEMS[0] if class_name.startswith("CLIP") else STEMS[1]
    tensors = weights.read_headers(folder, stem, variant) if has_weights else {}
    return Component(folder, class_name, config, tensors)


def check_finite(component: Component) -> None:
    """Raises `UserError` at the first of a component's weights that is not finite. Reads all of them, with numpy."""
    weights.check_finite(component.folder.name, component.tensors)


def check_shapes(component: Component) -> None:
    """Raises `UserError` unless a component's weights have the names and shapes that its configuration asks for.

    Imports the component's class, and torch.
    """
    if component.class_name in shapes.MODULES:
        shapes.check_shapes(component.folder, component.class_name, component.tensors)
