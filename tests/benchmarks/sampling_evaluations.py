"""How many evaluations of its networks a picture needs: solvers, steps and guidance intervals against 50 steps of DDIM.

All rows draw from the same texts, samples of the prior and first noise, so that they differ by the solver alone. A row
is as good as the first where the judge reads as many pictures right and the Fréchet distance is no larger, both but for
`TOLERANCE`; of those the one with the fewest evaluations is the best.
"""

import time
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import cifar10_classifier
from bundled_model import Photographs, features_of, prompt_of
from cifar10_classifier import CLASSES
from ldm.evaluation.distances import frechet_distance
from ldm.training import randomness
from pipelines import LatentDiffusionPipeline

TOLERANCE = 0.02
EVERYWHERE = (0.0, 1.0)
SOLVERS = {
    "DDIM": (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {"timestep_spacing": "linspace"}),
    "DPM++ 2M trailing": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
    "DPM++ 2M Karras": (DPMSolverMultistepScheduler, {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
    "DPM++ 2M in λ": (DPMSolverMultistepScheduler, {"timestep_spacing": "linspace", "use_lu_lambdas": True}),
    "UniPC": (UniPCMultistepScheduler, {"timestep_spacing": "linspace"}),
    "UniPC trailing": (UniPCMultistepScheduler, {"timestep_spacing": "trailing"}),
    "UniPC, last step from 0.5": (
        UniPCMultistepScheduler,
        {"use_exponential_sigmas": True, "sigma_min": 0.5, "sigma_max": 50.0},
    ),
    "UniPC Karras": (UniPCMultistepScheduler, {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
}
"""Name -> class, and what differs from the model's own scheduler."""
NO_SPACING = {"use_exponential_sigmas": False, "sigma_min": None, "sigma_max": None}
"""Takes back the spacing of a model whose last step was trained."""


@dataclass(frozen=True)
class Row:
    """A way to draw. The prior's evaluations are those of every row that has the same `prior_steps`."""

    solver: str
    steps: int
    interval: tuple[float, float] = EVERYWHERE
    guidance_scale: float | None = None
    prior_steps: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.solver}, {self.steps} steps"]
        if self.interval != EVERYWHERE:
            parts.append("guided in {:g} … {:g}".format(*self.interval))
        if self.guidance_scale is not None:
            parts.append(f"scale {self.guidance_scale:g}")
        if self.prior_steps is not None:
            parts.append(f"prior {self.prior_steps}")
        return ", ".join(parts)


REFERENCE = Row("DDIM", 50)
ROWS = [
    Row("DDIM", 25),
    *(Row("DPM++ 2M", steps) for steps in (20, 15)),
    *(Row(solver, 12) for solver in SOLVERS if solver != "DDIM"),
    *(Row("DPM++ 2M trailing", steps) for steps in (10, 8)),
    *(Row("UniPC trailing", steps) for steps in (16, 14, 10, 9, 8, 6)),
    *(Row("UniPC, last step from 0.5", steps) for steps in (10, 8, 6)),  # as train_last_step.py's models draw
    *(Row("UniPC trailing", 10, interval) for interval in ((0.15, 1.0), (0.3, 1.0), (0.0, 0.95), (0.3, 0.95))),
]


@dataclass(frozen=True)
class Judged:
    row: Row
    unet: float
    """Evaluations of the U-Net for one picture; a guided step is two."""
    prior: float
    accuracy: float
    frechet: float
    seconds: float

    def is_as_good_as(self, other: "Judged") -> bool:
        return self.accuracy >= other.accuracy * (1 - TOLERANCE) and self.frechet <= other.frechet * (1 + TOLERANCE)


class Evaluations:
    """Counts how many samples pass through a network."""

    def __init__(self, network: nn.Module):
        self.count = 0
        self.hook = network.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _network: nn.Module, arguments: tuple, keywords: dict) -> None:
        self.count += len(arguments[0] if arguments else keywords["hidden_states"])


def image_embeddings(pipe: LatentDiffusionPipeline, per_class: int, seed: int, steps: int | None) -> list[Tensor]:
    """The prior's samples for each class, (per_class, D)."""
    defaults = pipe.default_settings
    return [
        pipe.sample_image_embeds(
            prompt_of(name),
            per_class,
            defaults["prior_num_inference_steps"] if steps is None else steps,
            defaults["prior_guidance_scale"],
            defaults["num_prior_samples"],
            [randomness.generator(seed, "prior", c, number) for number in range(per_class)],
        )
        for c, name in enumerate(CLASSES)
    ]


def draw(
    pipe: LatentDiffusionPipeline, row: Row, embeddings: list[Tensor], seed: int, solvers: dict[str, object]
) -> Tensor:
    """Pictures (10 · per_class, 3, H, W) in [-1, 1], class by class."""
    kind, changes = solvers[row.solver]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **(NO_SPACING | changes))
    pictures = []
    for c, name in enumerate(tqdm(CLASSES, desc=str(row), unit=" classes", leave=False)):
        count = len(embeddings[c])
        drawn = pipe(
            prompt_of(name),
            num_images_per_prompt=count,
            num_inference_steps=row.steps,
            guidance_scale=row.guidance_scale,
            guidance_interval=row.interval,
            image_embeds=embeddings[c],
            generator=[randomness.generator(seed, "picture", c, number) for number in range(count)],
            output_type="pt",
        ).images
        pictures.append(drawn.float() * 2 - 1)
    return torch.cat(pictures)


def judged(
    pipe: LatentDiffusionPipeline, rows: list[Row], per_class: int, seed: int, photographs: Photographs
) -> list[Judged]:
    """The reference, then every row."""
    classifier, own = cifar10_classifier.load(), pipe.scheduler
    labels = torch.arange(10).repeat_interleave(per_class)
    unet, prior = Evaluations(pipe.unet), Evaluations(pipe.prior)
    embeddings: dict[int | None, tuple[list[Tensor], float]] = {}
    result = []
    for row in [REFERENCE, *rows]:
        if row.prior_steps not in embeddings:
            prior.count = 0
            made = image_embeddings(pipe, per_class, seed, row.prior_steps)
            embeddings[row.prior_steps] = (made, prior.count / len(labels))
        unet.count, begin = 0, time.monotonic()
        pipe.scheduler = own
        pictures = draw(pipe, row, embeddings[row.prior_steps][0], seed, SOLVERS)
        logits, features = features_of(classifier, pictures, str(row))
        result.append(
            Judged(
                row=row,
                unet=unet.count / len(labels),
                prior=embeddings[row.prior_steps][1],
                accuracy=(logits.argmax(1) == labels).double().mean().item(),
                frechet=frechet_distance(features, photographs.known),
                seconds=time.monotonic() - begin,
            )
        )
        print(line_of(result[-1], result[0]), flush=True)
    pipe.scheduler = own
    unet.hook.remove()
    prior.hook.remove()
    return result


HEAD = f"{'':<52}{'U-Net':>7}{'fewer':>8}{'prior':>7}{'right':>8}{'Fréchet':>9}{'':>9}{'':>10}{'s':>6}"


def line_of(judged: Judged, reference: Judged) -> str:
    change = judged.frechet / reference.frechet - 1
    verdict = "as good" if judged.is_as_good_as(reference) else ""
    return (
        f"{judged.row!s:<52}{judged.unet:>7.1f}{reference.unet / judged.unet:>7.1f}×{judged.prior:>7.0f}"
        f"{judged.accuracy:>8.1%}{judged.frechet:>9.3f}{change:>+9.1%}{verdict:>10}{judged.seconds:>6.0f}"
    )


def best_of(rows: list[Judged]) -> Judged:
    """The row of fewest evaluations that is as good as the first."""
    return min((row for row in rows if row.is_as_good_as(rows[0])), key=lambda row: (row.unet, row.frechet))


def chart(rows: list[Judged]) -> Figure:
    """Pictures read right, and their Fréchet distance, over the U-Net's evaluations; below and above the dashed lines
    they are not as good as the reference's. What is far worse is left out."""
    reference, best = rows[0], best_of(rows)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, value, bound, shown, label in zip(
        figure.subplots(1, 2),
        ("accuracy", "frechet"),
        (reference.accuracy * (1 - TOLERANCE), reference.frechet * (1 + TOLERANCE)),
        ((reference.accuracy * 0.93, 1.0), (reference.frechet * 0.9, reference.frechet * 1.15)),
        ("pictures read right", "Fréchet distance to the photographs"),
        strict=True,
    ):
        for number, solver in enumerate(SOLVERS):
            for guided, marker in ((True, "o"), (False, "^")):
                those = [r for r in rows if r.row.solver == solver and (r.row.interval == EVERYWHERE) is guided]
                name = solver if guided else f"{solver}, in an interval"
                axes.plot(
                    [r.unet for r in those],
                    [getattr(r, value) for r in those],
                    marker,
                    color=f"C{number}",
                    label=name if those else None,
                )
        axes.axhline(bound, color="grey", linestyle="--", linewidth=1)
        ring = {"markersize": 15, "markerfacecolor": "none", "color": "black"}
        axes.plot(best.unet, getattr(best, value), "o", **ring, label=f"fewest: {best.row}")
        axes.set(xlabel="evaluations of the U-Net for a picture", ylabel=label, xscale="log", ylim=shown)
        axes.set_xticks(ticks := [8, 12, 16, 24, 32, 50, 100], [str(tick) for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
    axes.legend(fontsize="x-small")
    return figure
