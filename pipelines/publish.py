"""A pipeline's folder put on the Hub, with a card."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ldm.clip.parts import WHOLE
from ldm.components.configs import read_json
from ldm.errors import RunError, UserError
from ldm.hub import INDEX
from pipelines.card import GRID, REPORT, TRAINING, model_card
from pipelines.checks import check_prompt

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CARD = "README.md"
BESIDE = (CARD, GRID, REPORT, TRAINING, "knows.json", "LICENSE", "image_encoder", "image_processor", WHOLE)
"""What a model's folder may hold beside the components, and keeps when it is published."""
SAMPLE_PROMPTS = 16  # at most, in the grid


def publish(
    pipe: "DiffusionPipeline", source: Path | None, repository: str, variant: str | None = None, **options
) -> str:
    """Uploads the pipeline and what lies beside its components in `source`; the commit's address on the Hub.

    `options`: `publish_folder`'s.
    """
    with TemporaryDirectory() as name:
        write = lambda: pipe.save_pretrained(name, variant=variant)  # noqa: E731 (after the Hub has agreed)
        return publish_folder(pipe, Path(name), source, repository, write, **options)


def publish_folder(
    pipe: "DiffusionPipeline",
    folder: Path,
    source: Path | None,
    repository: str,
    write: Callable[[], None] | None = None,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    sample_prompts: list[str] | None = None,
) -> str:
    """Uploads the pipeline that was saved in `folder`, or that `write` saves there; the commit's address on the Hub.

    What lies beside its components in `source`, where it was opened from, goes with it; a card is written where there
    is none, and a grid drawn of `sample_prompts` where they are given. Raises `UserError` where the Hub refuses the
    name or the login, `RunError` where the upload broke off; a repository's commit is whole or is not made.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    if sample_prompts:
        sample_prompts = check_prompt("sample_prompts", sample_prompts)
    api = HfApi(token=token)
    with _telling(repository):  # before anything is drawn or written
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if write is not None:
        write()
    for kept in BESIDE if source is not None else ():
        if (source / kept).is_dir() and not (folder / kept).exists():
            shutil.copytree(source / kept, folder / kept)
        elif (source / kept).is_file() and not (folder / kept).exists():
            shutil.copyfile(source / kept, folder / kept)
    if sample_prompts:
        _draw_grid(pipe, sample_prompts, folder / GRID)
    if not (folder / CARD).is_file():
        (folder / CARD).write_text(model_card(folder, repository), encoding="utf-8")
    components = [name for name, entry in read_json(folder / INDEX).items() if isinstance(entry, list)]
    with _telling(repository):
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or "Upload the model",
            create_pr=create_pr,
            allow_patterns=[INDEX, *BESIDE, *(f"{name}/*" for name in (*components, *BESIDE))],
            ignore_patterns=["*.bin", "*.pt", "*.ckpt", "*.py"],
        ).commit_url


def _draw_grid(pipe: "DiffusionPipeline", prompts: list[str], path: Path) -> None:
    import torch
    from diffusers.utils import make_image_grid

    prompts = prompts[:SAMPLE_PROMPTS]
    images = [pipe(prompt, generator=torch.Generator().manual_seed(i)).images[0] for i, prompt in enumerate(prompts)]
    columns = max(n for n in range(1, len(images) + 1) if len(images) % n == 0 and n * n <= 2 * len(images))
    make_image_grid(images, rows=len(images) // columns, cols=columns).save(path)


@contextmanager
def _telling(repository: str) -> Iterator[None]:
    """What the Hub refuses, and what breaks off, in one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError:
        raise UserError(f"'{repository}' is not a possible repository name; it must be owner/repository") from None
    except OfflineModeIsEnabled:
        raise UserError(f"'{repository}' cannot be pushed to: HF_HUB_OFFLINE is set; unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"'{repository}' cannot be pushed to: the Hub answered {status}; log in with `hf auth login`, or give "
                "a token that may write there"
            ) from None
        raise RunError(f"'{repository}' could not be pushed to: the Hub answered {status}; try again later") from None
    except Exception as error:  # whatever the client's transport raises
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunError(f"'{repository}' could not be pushed to ({said}); check the connection, try again") from None
