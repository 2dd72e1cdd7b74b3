"""What each choice of the bundled model's recipe is worth: small U-Nets of equal budget, trained and judged alike.

    python tests/benchmarks/ablations.py --output FOLDER --autoencoder RUN --clip RUN --prior RUN --data FOLDER
        [--rows base,epsilon] [--steps 400] [--images 20000] [--images-per-class 50] [key=value …]

A row is trained by the scripts of `train/` from configs/cifar10, as processes, or draws otherwise with a row's U-Net.
All draw the same captions from the same image embeddings (the prior's; a row with a CLIP of its own has a prior of its
own, too) and, where latents have one shape, the same noise, by UniPC with the settings in DRAWING;
`bundled_model.judge` reads the pictures. `key=value` goes to every training of a U-Net, such as
model.block_out_channels=[64,128,192] on a GPU. Run again, it goes on: what is trained is not trained again, what is
measured is not measured again. FOLDER gets ablations.json and ablations.png.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from bundled_model import Photographs, features_of, judge, prompt_of, read_photographs
from cifar10_classifier import CLASSES, load, read_split, to_unit_range
from image_embeddings import told_by
from ldm.errors import RunError, UserError, choose, exit_code_of
from ldm.evaluation.reconstruction import psnr
from ldm.training import averages, randomness
from pipelines import LatentDiffusionPipeline
from pipelines.arguments import ArgumentParser
from pipelines.assemble import assemble

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "autoencoder": "train_autoencoder",
    "clip": "train_clip",
    "cache": "cache_latents",
    "prior": "train_prior",
    "ldm": "train_ldm",
}
UNET = (
    "model.block_out_channels=[32,64,96]",
    "model.norm_num_groups=16",
    "training.warmup_steps=50",
    "training.ema_decay=0.995",
    "sample_prompts=[]",
)
"""The small U-Net, of 2.5 million parameters, and its schedule; all else is configs/cifar10/ldm.yaml's."""

DOWN, UP = ("[" + ",".join([kind] * 3) + "]" for kind in ("DownEncoderBlock2D", "UpDecoderBlock2D"))
FOURTH = (f"model.down_block_types={DOWN}", f"model.up_block_types={UP}", "model.block_out_channels=[32,64,64]")
"""An autoencoder that divides sides by 4, not 2."""
RECONSTRUCTED = 500  # test photographs

CLIP_BUDGET = ("training.max_steps=150", "training.warmup_steps=25")
PRIOR_BUDGET = ("training.max_steps=400", "training.warmup_steps=25")
"""Of a row's own CLIP, and of the prior that goes with it."""

DRAWING = {"num_inference_steps": 10, "guidance_scale": 3.0}
PRIOR = {"num_inference_steps": 25, "guidance_scale": 2.0, "num_samples": 4}


@dataclass(frozen=True)
class Row:
    """A U-Net that is trained, or one of another row that draws otherwise."""

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    """Of train_ldm.py."""
    autoencoder: tuple[str, ...] | None = None
    """Overrides of train_autoencoder.py, where the row has an autoencoder of its own."""
    clip: tuple[str, ...] | None = None
    """Overrides of train_clip.py, where the row has a CLIP of its own, and so a prior."""
    of: str | None = None
    """The row whose U-Net this one draws with."""
    length: float | None = None
    """Of the average of its weights that this one draws with (`ldm.training.averages`)."""
    drawing: Mapping[str, Any] = field(default_factory=dict)
    """What it draws with other than DRAWING says."""
    spacing: str = "trailing"
    """Which timesteps the solver takes: `trailing` begins with the very last, `leading` with one before it."""


ROWS = (
    Row("base", "base: v, uniform timesteps, AdamW", ("average_lengths=[0.05,0.1]", "snapshot_every=50")),
    Row("base-seed-1", "base, another seed", ("seed=1",)),
    Row("epsilon", "predicts ε", ("prediction_type=epsilon",)),
    Row("epsilon-leading", "predicts ε, drawn from t = 900", of="epsilon", spacing="leading"),
    Row("min-snr", "min-SNR, γ = 5", ("min_snr_gamma=5",)),
    Row("logit-normal", "logit-normal timesteps", ("timestep_sampling=logit_normal",)),
    Row("no-prior", "without the prior: text alone", ("image_embedding_dropout=1",)),
    Row("muon", "Muon", ("training.optimizer=muon",)),
    Row("logit-normal-min-snr", "logit-normal and min-SNR", ("timestep_sampling=logit_normal", "min_snr_gamma=5")),
    Row("logit-normal-muon", "logit-normal and Muon", ("timestep_sampling=logit_normal", "training.optimizer=muon")),
    Row("captions-alone", "short CLIP, without SLIP's term", clip=("image_image_weight=0",)),
    Row("slip", "short CLIP, with SLIP's term", clip=("image_image_weight=0.5",)),
    Row("4x16x16", "latents 4×16×16, short autoencoder", autoencoder=()),
    Row("4x8x8", "latents 4×8×8, short autoencoder", autoencoder=FOURTH),
    Row("8x8x8", "latents 8×8×8, short autoencoder", autoencoder=(*FOURTH, "model.latent_channels=8")),
    *(Row(f"average-{x}", f"average of length {x}", of="base", length=x) for x in (0.02, 0.05, 0.1, 0.2)),
    *(Row(f"guidance-{x}", f"guidance {x}", of="base", drawing={"guidance_scale": float(x)}) for x in (1, 2, 4, 6)),
    Row("interval", "guidance only in 0.3 … 0.95 of the noise", of="base", drawing={"guidance_interval": (0.3, 0.95)}),
    Row("leading", "base, drawn from t = 900", of="base", spacing="leading"),
    *(Row(f"steps-{x}", f"{x} steps", of="base", drawing={"num_inference_steps": x}) for x in (5, 20)),
)
SEEDS = ("base", "base-seed-1")
"""The rows whose difference is the noise of all others."""


class Ablations:
    """The folder of a table: what its rows share, and what each has."""

    def __init__(self, arguments: Any):
        self.output, self.given = Path(arguments.output), arguments
        budget = {name: getattr(arguments, name) for name in ("steps", "images", "images_per_class", "overrides")}
        self.settings = {**budget, "drawing": DRAWING, "prior": PRIOR}

    # ---- training ----------------------------------------------------------------------------------------------------

    def run(self, stage: str, folder: Path, overrides: Sequence[str]) -> Path:
        """The run in `folder` of the script of `stage`: as it is where it has ended, else begun or gone on with."""
        if (folder / "model").is_dir() or (folder / "index.json").is_file():
            return folder
        config = ROOT / "configs" / "cifar10" / f"{stage}.yaml"
        command = [sys.executable, ROOT / "train" / f"{SCRIPTS[stage]}.py", "--config", config, f"output_dir={folder}"]
        if any((folder / "checkpoints").glob("step-*")):
            command.append("--resume")
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        with log.open("a") as file:
            code = subprocess.run([*command, *overrides], stdout=file, stderr=file, cwd=ROOT).returncode
        if code:
            raise RunError(f"{folder} ended with exit code {code}; {log} says why; run this again to go on")
        return folder

    def stages(self, row: Row) -> dict[str, Path]:
        """The runs of all four stages of a row, by the names that `assemble` knows."""
        given, own = self.given, self.output / row.name
        data = (f"data.source={Path(given.data) / 'train.parquet'}", f"data.max_images={given.images}")
        autoencoder, clip, prior = Path(given.autoencoder), Path(given.clip), Path(given.prior)
        budget = f"training.max_steps={given.steps}"
        if row.autoencoder is not None:
            autoencoder = self.run("autoencoder", own / "autoencoder", (*data, budget, *row.autoencoder))
        if row.clip is not None:
            clip = self.run("clip", own / "clip", (*data, *CLIP_BUDGET, *row.clip))
        encoders = (f"autoencoder={autoencoder}", f"clip={clip}")
        shared = self.output if row.autoencoder is None and row.clip is None else own
        cache = self.run("cache", shared / "cache", (*data, "precision=auto", *encoders))
        if row.clip is not None:
            prior = self.run("prior", own / "prior", (f"clip={clip}", f"cache={cache}", *PRIOR_BUDGET))
        read = (*encoders, f"prior={prior}", f"cache={cache}", budget)
        unet = self.run("ldm", own / "unet", (*read, *UNET, *given.overrides, *row.overrides))
        return {"autoencoder": autoencoder, "clip": clip, "prior": prior, "unet": unet}

    def model(self, row: Row) -> LatentDiffusionPipeline:
        """What a row draws with."""
        trained = row if row.of is None else row_of(row.of)
        folder = self.output / trained.name / "model"
        if not folder.is_dir():
            assemble(**self.stages(trained), output=folder, dtype="float32")
        pipeline = LatentDiffusionPipeline.from_pretrained(folder)
        if row.length is not None:
            _, weights = averages.combined(self.output / trained.name / "unet" / "averages", row.length)
            pipeline.unet.load_state_dict(weights)
        pipeline.scheduler = UniPCMultistepScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing=row.spacing
        )
        if "image_embedding_dropout=1" in row.overrides:  # it was told no image: zeros, here as there
            pipeline.unet.class_embedding.register_forward_pre_hook(lambda _, told: (torch.zeros_like(told[0]),))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    # ---- drawing and judging -----------------------------------------------------------------------------------------

    @cached_property
    def photographs(self) -> Photographs:
        """The judge's features of the photographs, kept."""
        path = self.output / "photographs.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(vars(read_photographs(self.given.data)), path)
        return Photographs(**load_file(path))

    @torch.no_grad()
    def image_embeds(self, row: Row, pipeline: LatentDiffusionPipeline) -> Tensor:
        """The prior's samples (10, N, D) for every class, the same for all rows that share it, kept."""
        path = (self.output if row.clip is None else self.output / row.name) / "embeddings.safetensors"
        if not path.is_file():
            number = self.given.images_per_class
            drawn = [
                pipeline.sample_image_embeds([prompt_of(name)] * number, generator=self.generators("prior", c), **PRIOR)
                for c, name in enumerate(tqdm(CLASSES, desc="the prior's samples", unit=" classes"))
            ]
            save_file({"image_embeds": torch.stack(drawn).cpu()}, path)
        return load_file(path)["image_embeds"]

    def generators(self, what: str, c: int) -> list[torch.Generator]:
        seeds = (randomness.key(0, "ablations", what, c, k) for k in range(self.given.images_per_class))
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    @torch.no_grad()
    def reconstructed(self, row: Row) -> dict:
        """How well the judge reads test photographs that went through the row's autoencoder, and their PSNR in dB."""
        pixels, labels = read_split(self.given.data, "test")
        photographs, vae = to_unit_range(pixels[:RECONSTRUCTED]), self.model(row).vae
        images = vae.decode(vae.encode(photographs.to(vae.device)).latent_dist.mean).sample.cpu()
        logits, _ = features_of(load(), images.clamp(-1, 1), "reconstructions")
        accuracy = (logits.argmax(1) == labels[:RECONSTRUCTED]).float().mean().item()
        return {"accuracy": accuracy, "psnr": psnr((photographs + 1) / 2, (images + 1) / 2).mean().item()}

    def pictures(self, row: Row) -> Tensor:
        """(10 N, 3, 32, 32) in [-1, 1], class by class."""
        pipeline = self.model(row)
        drawn = []
        for c, embeds in enumerate(self.image_embeds(row, pipeline)):
            images = pipeline(
                prompt=[prompt_of(CLASSES[c])] * len(embeds),
                image_embeds=embeds.to(pipeline.device),
                generator=self.generators("noise", c),
                output_type="pt",
                **{**DRAWING, **row.drawing},
            ).images
            drawn.append(images.float().cpu() * 2 - 1)
        return torch.cat(drawn)

    def measured(self, row: Row) -> dict:
        """What is said of a row, kept in its measured.json."""
        path = self.output / row.name / "measured.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["settings"] != self.settings:
                raise UserError(f"{path} is of other settings ({kept['settings']}); choose another --output")
            return kept
        images = self.pictures(row)
        labels = torch.arange(10).repeat_interleave(self.given.images_per_class)
        kept = {**asdict(row), "settings": self.settings, **judge(images, labels, self.photographs)}
        if row.autoencoder is not None:
            kept["reconstruction"] = self.reconstructed(row)
        if row.clip is not None:
            kept["image_embeddings"] = told_by(self.stages(row)["clip"], self.given.data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=2) + "\n")
        return kept


def row_of(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def table(measured: Sequence[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| row | read right | Fréchet distance | nearest |", "| --- | --- | --- | --- |"]
    for row in measured:
        figures = f"{row['accuracy']:.1%} | {row['frechet_distance']:.1f} | {row['nearest_ratio']:.2f}"
        lines.append(f"| {row['label']} | {figures} |")
    lines.append(f"| as many test photographs | | {measured[0]['frechet_floor']:.1f} | 1 |")
    return "\n".join(lines)


def chart(measured: Sequence[dict]) -> Figure:
    """A point for each row, over a band between the rows that differ in their seed alone."""
    figure = Figure((8, 0.8 + 0.24 * len(measured)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(measured))
    for axes, (name, factor, title) in zip(
        panels, (("accuracy", 100, "read right, %"), ("frechet_distance", 1, "Fréchet distance")), strict=True
    ):
        noise = [factor * row[name] for row in measured if row["name"] in SEEDS]
        if noise:
            axes.axvspan(min(noise), max(noise), color="0.85", zorder=0)
        trained = [row["of"] is None for row in measured]
        for is_trained, colour in ((True, "C0"), (False, "C1")):
            chosen = [place for place in places if trained[place] == is_trained]
            axes.plot([factor * measured[place][name] for place in chosen], chosen, "o", color=colour)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(places, [row["label"] for row in measured])
    panels[0].invert_yaxis()
    told = "grey: between two seeds; blue: trained; orange: a U-Net of a row above, drawing otherwise"
    figure.supxlabel(told, fontsize=8)
    return figure


def main() -> None:
    parser = ArgumentParser(description="Train and judge small U-Nets that differ in one choice each.")
    parser.add_argument("--output", required=True, help="folder of the table, begun or gone on with")
    for stage in ("autoencoder", "clip", "prior"):
        parser.add_argument(f"--{stage}", required=True, metavar="RUN", help=f"finished {stage} run of configs/cifar10")
    parser.add_argument("--data", required=True, help="folder with {train,test}.parquet of CIFAR-10")
    names = tuple(row.name for row in ROWS)
    parser.add_argument("--rows", default=",".join(names), metavar="ROW,ROW", help="without it, all of them")
    parser.add_argument("--steps", type=int, default=400, help="of every U-Net, and of rows' own autoencoders")
    parser.add_argument("--images", type=int, default=20_000, help="so many training images")
    parser.add_argument("--images-per-class", type=int, default=50)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="of every training of a U-Net")
    arguments = parser.parse_intermixed_args()
    rows = arguments.rows.split(",")
    for name in rows:
        choose("--rows", name, names)

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
    ablations, measured = Ablations(arguments), []
    with tqdm(rows, unit=" rows") as bar:
        for name in bar:
            bar.set_description(name)
            measured.append(ablations.measured(row_of(name)))
    (ablations.output / "ablations.json").write_text(json.dumps(measured, indent=2) + "\n")
    chart(measured).savefig(ablations.output / "ablations.png", dpi=100)
    print(table(measured))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
