"""The README of a model's folder, from what it holds: what the model is, how it was trained, what was measured."""

import json
import math
from pathlib import Path
from typing import Any

from ldm.components.configs import read_json
from ldm.components.weights import Stored, read_headers
from ldm.hub import INDEX, REPORT, STEMS

TRAINING = "training"
"""Folder of <stage>.yaml, a stage's whole configuration, and <stage>.json, the last values of its metrics."""
GRID = "grid.png"


def model_card(folder: Path, repository: str) -> str:
    """Markdown with the metadata that the Hub reads. What the folder does not hold the card says is not known."""
    index = read_json(folder / INDEX)
    parts = {
        name: entry[1]
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and entry[1] is not None
    }
    sections = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags:\n  - latent-diffusion\n---",
        f"# {repository.rpartition('/')[2]}",
        _what_it_is(folder, parts),
        _samples(folder),
        _use(repository, index, "prior" in parts),
        _components(folder, parts),
        _training(folder),
        _measured(folder),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what_it_is(folder: Path, parts: dict[str, str]) -> str:
    unet, vae = (read_json(folder / name / "config.json") for name in ("unet", "vae"))
    side, factor = unet.get("sample_size"), 2 ** (len(vae["block_out_channels"]) - 1)
    size = f" of {side * factor} × {side * factor} pixels" if isinstance(side, int) else ""
    latents = f"{vae['latent_channels']} × {side} × {side}" if isinstance(side, int) else f"{vae['latent_channels']}"
    text = (
        f"A text-to-image latent diffusion model: it draws images{size}. A CLIP text tower reads the prompt, "
        f"{'a prior turns its embedding into that of an image, ' if 'prior' in parts else ''}"
        f"a U-Net guided by {'both' if 'prior' in parts else 'it'} removes noise from latents ({latents}), and an "
        "autoencoder decodes them."
    )
    knows = read_json(folder / "knows.json") if (folder / "knows.json").is_file() else {}
    return f"{text} {knows['says'].rstrip('.')}." if "says" in knows else text


def _samples(folder: Path) -> str:
    return f"![Samples]({GRID})" if (folder / GRID).is_file() else ""


def _use(repository: str, index: dict[str, Any], has_prior: bool) -> str:
    settings = index.get("_default_settings", {})
    names = ["num_inference_steps", "guidance_scale", *(["noise_level", "prior_guidance_scale"] if has_prior else [])]
    names += ["prior_num_inference_steps"] if has_prior else []
    given = "".join(f", {name}={settings[name]}" for name in names if name in settings)
    return f"""## Use

With stock [Diffusers](https://github.com/huggingface/diffusers), and none of the code that trained it:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repository}")
image = pipe("a photo of a cat"{given}).images[0]
```

With the package that trained it:

```bash
ldm generate "a photo of a cat" --model {repository} --output cat.png
```"""


def _components(folder: Path, parts: dict[str, str]) -> str:
    rows = ["## Components\n", "| component | class | parameters | stored as |", "| --- | --- | --- | --- |"]
    for name, kind in sorted(parts.items()):
        if not (folder / name / "config.json").is_file():
            rows.append(f"| {name} | `{kind}` | | |")
            continue
        tensors = _weights(folder / name, kind)
        count = sum(math.prod(tensor.shape) for tensor in tensors.values())
        dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))
        rows.append(f"| {name} | `{kind}` | {count:,} | {dtypes} |")
    return "\n".join(rows)


def _weights(folder: Path, kind: str) -> dict[str, Stored]:
    """Of the plain files, or of the one variant that is there."""
    stem = STEMS[0] if kind.startswith("CLIP") else STEMS[1]
    variants = [path.name.split(".")[1].split("-")[0] for path in folder.glob(f"{stem}.*.safetensors")]
    return read_headers(folder, stem, variants[0] if variants else None)


def _training(folder: Path) -> str:
    files = sorted((folder / TRAINING).glob("*.yaml"))
    if not files:
        return "## Training\n\nThe data and the configuration of the training are not recorded with this model."
    blocks = ["## Training\n\nThe data and every setting of each stage:"]
    for file in files:
        blocks.append(f"### {file.stem}\n\n```yaml\n{file.read_text(encoding='utf-8').strip()}\n```")
    return "\n\n".join(blocks)


def _measured(folder: Path) -> str:
    rows = []
    for file in sorted((folder / TRAINING).glob("*.json")):
        rows += [(f"{file.stem}, end of training: {name}", value) for name, value in _flat(read_json(file))]
    if (folder / REPORT).is_file():
        report = read_json(folder / REPORT)
        rows += _flat(report) if "figures" not in report else [_figure(figure) for figure in report["figures"]]
    if not rows:
        return "## Measured\n\nNo measurement is recorded with this model."
    table = "\n".join(f"| {name} | {_number(value)} |" for name, value in rows)
    return f"## Measured\n\n| what | value |\n| --- | --- |\n{table}"


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        rows += _flat(value, f"{before}{name}, ") if isinstance(value, dict) else [(f"{before}{name}", value)]
    return rows


def _figure(figure: dict[str, Any]) -> tuple[str, object]:
    """A figure of `ldm evaluate`, with what it rests on."""
    beside = (f"{figure['images']:,} images", figure["against"] and f"against {figure['against']}", figure["network"])
    name = f"{figure['part']}, {figure['name']} ({', '.join(said for said in beside if said)})"
    return name, f"{figure['value']:.4g} {figure['unit']}".strip()


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False).strip('"')
