"""How a model draws unless a call says otherwise: the settings, what each may be, and those that a folder holds.

Imports nothing heavy: the command line asks it first.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ldm.errors import UserError, nearest
from ldm.hub import INDEX
from pipelines.checks import check_count, check_interval, check_scale, check_share

DEFAULT_SETTINGS = {
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "noise_level": 0,
    "prior_num_inference_steps": 25,
    "prior_guidance_scale": 4.0,
    "num_prior_samples": 2,
    "guidance_rescale": 0.0,
    "guidance_interval": (0.0, 1.0),
}
SETTINGS = "_default_settings"
"""The key of `model_index.json` that holds a model's own settings, which stock Diffusers passes over."""
SETTINGS_FILE = "settings.json"
"""In a run's model folder: those that its U-Net was trained to be drawn with."""
MOST_SAMPLES = 1000
"""Of the prior, for one image: beyond it a slip of the hand would take days."""
Check = Callable[[str, object], Any]
CHECKS: dict[str, Check] = {
    "num_inference_steps": check_count,
    "guidance_scale": check_scale,
    "noise_level": partial(check_count, smallest=0),
    "prior_num_inference_steps": check_count,
    "prior_guidance_scale": check_scale,
    "num_prior_samples": partial(check_count, largest=MOST_SAMPLES),
    "guidance_rescale": check_share,
    "guidance_interval": check_interval,
}


def check_settings(settings: object, closer: Mapping[str, Check] | None = None) -> None:
    """Raises `UserError` for anything but a dictionary of settings, each of which some model could draw with. `closer`:
    checks of one model, in place of those of any."""
    checks = {**CHECKS, **(closer or {})}
    if not isinstance(settings, Mapping):
        raise UserError(f"default settings are a {type(settings).__name__}; give a dictionary of {', '.join(CHECKS)}")
    for name, value in settings.items():
        if name not in CHECKS:
            raise UserError(f"unknown setting '{name}'{nearest(str(name), list(CHECKS))}")
        checks[name](name, value)


@contextmanager
def telling_of(folder: Path) -> Iterator[None]:
    """Within, a `UserError` is of the settings that `folder` holds, and says so."""
    try:
        yield
    except UserError as error:
        raise UserError(f"'{folder / INDEX}', {SETTINGS}: {error}; mend it there, or leave it out") from None
