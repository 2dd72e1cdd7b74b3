"""The command `ldm`: draw pictures, put trained stages together.

Nothing heavy is imported before the arguments are checked, so that a mistake is told at once.
"""

import argparse
import contextlib
import gc
import io
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from ldm import hub
from ldm.errors import RunError, UserError, exit_code_of
from ldm.files import expanded, make_readable, write_image
from pipelines import deferred, evaluate
from pipelines.arguments import ArgumentParser
from pipelines.assemble import (
    COMPONENTS,
    assemble,
    check_can_be_made,
    check_fit,
    check_output_folder,
    find_components,
    run_folders,
    written_whole,
)
from pipelines.checks import MOST_IMAGES, check_count, check_number, check_prompt, check_scale, check_share
from pipelines.knows import note_on
from pipelines.settings import SETTINGS, check_settings, telling_of

BUNDLED_MODEL = Path(__file__).parent / "default"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST_SEED = 2**63 - 1
IMAGES_AT_ONCE, PIXELS_AT_ONCE = 16, 2**20
"""Of the pictures that are drawn together; what more of them gain in speed is little beside the memory they take."""


def main(argv: Sequence[str] | None = None, alone: bool = False) -> None:
    """Runs the command and exits: 0, 2 for what the user gave, 1 for a failure (`ldm/errors.py`).

    `alone`: nothing else happens in this process, so that `generate` imports no more than it needs.
    """
    sys.exit(exit_code_of(lambda: _run(argv, alone)))


def console() -> None:
    """The command as installed."""
    main(alone=True)


def _run(argv: Sequence[str] | None, alone: bool) -> None:
    arguments = _parser().parse_args(argv, argparse.Namespace(alone=alone))
    with warnings.catch_warnings():  # which also restores how they are shown
        warnings.showwarning = _show_in_one_line
        arguments.command(arguments)


def _show_in_one_line(message: Warning | str, *_, **__) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="ldm", description="Text to image with latent diffusion, every stage trainable.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    drawing = commands.add_parser("generate", help="draw pictures of a text")
    drawing.add_argument("prompt", type=str, help="what to draw, such as 'a photo of a cat'")
    drawing.add_argument("--output", metavar="FILE", required=True, help=f"the picture: {', '.join(PICTURES)}")
    drawing.add_argument("--model", metavar="FOLDER|REPO", default=str(BUNDLED_MODEL), help="default: the bundled one")
    drawing.add_argument("--revision", metavar="SHA", help="branch, tag or commit of a REPO")
    drawing.add_argument("--seed", metavar="N", type=int, default=0, help="of the first picture; default: 0")
    drawing.add_argument(
        "--num-images", metavar="N", type=int, default=1, help="writes FILE-0, FILE-1, …, seeds N, N+1"
    )
    drawing.add_argument("--num-inference-steps", metavar="N", type=int, help="default: the model's own")
    drawing.add_argument("--guidance-scale", metavar="G", type=float, help="1: none; default: the model's own")
    drawing.add_argument("--negative-prompt", metavar="TEXT", type=str, help="what to move away from")
    drawing.add_argument("--lora", metavar="PATH|REPO", help="adapters: of a run with lora, a file, or a repository")
    drawing.add_argument("--lora-scale", metavar="S", type=float, help="0: none of them; default: 1")
    drawing.add_argument("--image", metavar="FILE", help="a picture to start from, cropped to the model's size")
    drawing.add_argument(
        "--strength", metavar="S", type=float, help="0: the picture again, 1: none of it; default: 0.8"
    )
    drawing.add_argument("--mask", metavar="FILE", help="white where --image is drawn anew, at strength 1 by default")
    drawing.set_defaults(command=generate)

    joining = commands.add_parser("assemble", help="put trained stages together in one folder")
    for stage, what in (
        ("autoencoder", "train_autoencoder.py"),
        ("clip", "train_clip.py"),
        ("prior", "train_prior.py; none where the U-Net was trained with image_conditioning=false"),
        ("unet", "train_ldm.py"),
    ):
        joining.add_argument(
            f"--{stage}", metavar="RUN", required=stage != "prior", help=f"run folder of {what}, or a pipeline"
        )
    joining.add_argument("--output", metavar="FOLDER", required=True, help="a new folder")
    joining.set_defaults(command=join)

    exporting = commands.add_parser("export-clip", help="a CLIP that open_clip publishes, for the stages that take one")
    exporting.add_argument("name", metavar="NAME", help="of open_clip's models, or hf-hub:owner/repository")
    exporting.add_argument("--pretrained", metavar="TAG|FILE", help="of the weights; a file must be safetensors")
    exporting.add_argument("--output", metavar="FOLDER", required=True, help="a new folder")
    exporting.set_defaults(command=export_clip)

    evaluate.add_command(commands, BUNDLED_MODEL)

    checking = commands.add_parser("data-check", help="look a data set over before training on it")
    checking.add_argument("source", metavar="SOURCE", help="a folder, a parquet file, or a repository of the Hub")
    checking.add_argument("--split", default="train", help="of a folder or repository; default: train")
    checking.set_defaults(command=data_check)

    averaging = commands.add_parser("average", help="a trained U-Net with an average of its weights of another length")
    averaging.add_argument("run", metavar="RUN", help="run of train_ldm.py with average_lengths")
    averaging.add_argument(
        "--length", metavar="L", type=float, required=True, help="share of the training, such as 0.1"
    )
    averaging.add_argument("--step", metavar="N", type=int, help="of a snapshot; default: the last")
    averaging.add_argument("--output", metavar="FOLDER", required=True, help="a new folder, which `assemble` takes")
    averaging.set_defaults(command=average)

    plotting = commands.add_parser("plot", help="draw a run's curves")
    plotting.add_argument("run", metavar="RUN", help="run folder of a training script")
    plotting.add_argument("--output", metavar="FILE", help="the picture; default: RUN/curves.png")
    plotting.set_defaults(command=plot)

    drawings = commands.add_parser("figures", help="redraw the figures of the source documents")
    drawings.add_argument("--output", metavar="FOLDER", required=True, help="where the PNG files go")
    drawings.add_argument(
        "--runs", metavar="FOLDER", default="runs/digits", help="runs of configs/digits; default: runs/digits"
    )
    drawings.set_defaults(command=figures)
    return parser


def generate(arguments: argparse.Namespace) -> None:
    """`ldm generate`: draws, writes, and prints the path of each picture."""
    # What needs no model is checked first
    check_prompt("prompt", arguments.prompt)
    check_count("--num-images", arguments.num_images, largest=MOST_IMAGES)
    check_count("--seed", arguments.seed, smallest=0, largest=LARGEST_SEED - arguments.num_images)
    if arguments.num_inference_steps is not None:
        check_count("--num-inference-steps", arguments.num_inference_steps)
    if arguments.guidance_scale is not None:
        check_scale("--guidance-scale", arguments.guidance_scale)
    if arguments.negative_prompt is not None:
        check_prompt("--negative-prompt", arguments.negative_prompt, may_be_empty=True)
    pictures = _pictures_to_start_from(arguments)
    if arguments.lora_scale is not None:
        if arguments.lora is None:
            raise UserError("--lora-scale belongs to adapters; give --lora PATH|REPO, too")
        check_number("--lora-scale", arguments.lora_scale)
    outputs = _picture_paths(expanded(arguments.output), arguments.num_images)
    if arguments.lora is not None:
        arguments.lora = hub.resolve_adapters(arguments.lora)
    folder = hub.resolve(arguments.model, arguments.revision)
    components = hub.check_components(folder)
    with telling_of(folder):
        check_settings(hub.read_json(folder / hub.INDEX).get(SETTINGS, {}))
    for component in components.values():
        hub.check_finite(component)
    if said := note_on(folder, arguments.prompt):
        print(f"note: {said}", file=sys.stderr)

    # Thousands of modules are imported now: looking for garbage among them again and again would take a second, and
    # when the process ends another.
    gc.disable()
    try:
        _draw(arguments, folder, outputs, pictures)
    finally:
        gc.enable()
        if arguments.alone and "triton" not in sys.modules:  # which tells at length of what is left when a process ends
            gc.freeze()


def _draw(arguments: argparse.Namespace, folder: Path, outputs: list[Path], pictures: dict) -> None:
    if arguments.alone:
        deferred.leave_out(*deferred.NEVER, *(["peft"] if arguments.lora is None else []))
    pipe, given = _open(folder, arguments.alone), {}
    if arguments.lora is not None:
        pipe.load_lora_weights(arguments.lora)
        pipe.fuse_lora(lora_scale=1.0 if arguments.lora_scale is None else arguments.lora_scale)
    if pictures:
        pipe, given = _start_from(pipe, pictures, arguments)
    at_once = images_at_once(*pipe._image_size(None, None))
    for start in range(0, len(outputs), at_once):
        paths = outputs[start : start + at_once]
        images = pipe(
            arguments.prompt,
            num_images_per_prompt=len(paths),
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            negative_prompt=arguments.negative_prompt,
            generator=_generators(arguments.seed + start, len(paths)),
            **given,
        ).images
        for image, path in zip(images, paths, strict=True):
            _write(image, path)
            print(path)


def join(arguments: argparse.Namespace) -> None:
    """`ldm assemble`: writes the folder and prints its path."""
    stages = run_folders({stage: getattr(arguments, stage) for stage in COMPONENTS})
    check_fit(find_components(stages))  # as assemble does: before the libraries that be_quiet imports
    check_output_folder(arguments.output)
    be_quiet()
    print(assemble(**{"prior": None} | stages, output=arguments.output))


def export_clip(arguments: argparse.Namespace) -> None:
    """`ldm export-clip`: writes the folder and prints its path."""
    output = check_output_folder(arguments.output)
    be_quiet()
    from ldm.clip.published import export

    with written_whole(output) as partial:
        export(arguments.name, arguments.pretrained, partial)
    print(output)


def data_check(arguments: argparse.Namespace) -> None:
    """`ldm data-check`: prints what a data set holds, and the `data` section that reads it."""
    from ldm.data.check import findings

    for line in findings(arguments.source, arguments.split):
        print(line, flush=True)


def average(arguments: argparse.Namespace) -> None:
    """`ldm average`: a copy of the run's model whose U-Net has the averaged weights; prints its folder."""
    run = expanded(arguments.run)
    if not (run / "model" / "unet").is_dir():
        raise UserError(f"RUN '{run}' has no model/unet; name the output_dir of a finished run of train_ldm.py")
    hub.check_component(run / "model" / "unet", ("UNet2DConditionModel", "UNet2DModel"))
    output = check_output_folder(arguments.output)
    be_quiet()
    from diffusers import AutoModel

    from ldm.training import averages

    step, weights = averages.combined(run / "averages", arguments.length, arguments.step)
    unet = AutoModel.from_pretrained(str(run / "model" / "unet"))
    try:
        unet.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"RUN '{run}': averages/ and model/unet are of different networks; name another run") from None
    with written_whole(output) as partial:
        shutil.copytree(run / "model", partial / "model")
        unet.save_pretrained(partial / "model" / "unet")
        for file in (partial / "model" / "unet").glob("*.safetensors"):
            make_readable(file)
    print(f"{output / 'model'}: the average of length {arguments.length:g} at step {step}")


def plot(arguments: argparse.Namespace) -> None:
    """`ldm plot`: draws metrics.jsonl, prints the picture's path."""
    run = expanded(arguments.run)
    output = run / "curves.png" if arguments.output is None else expanded(arguments.output)
    if not run.is_dir():
        raise UserError(f"RUN '{run}' is not a folder; name the output_dir of a run")
    (output,) = _picture_paths(output, 1)
    from PIL import Image

    from ldm.evaluation.curves import curves

    drawn = io.BytesIO()
    curves(run).savefig(drawn, dpi=110)
    _write(Image.open(drawn).convert("RGB"), output)
    print(output)


def figures(arguments: argparse.Namespace) -> None:
    """`ldm figures`: draws what can be drawn, prints the paths, and says what the rest would need."""
    output = expanded(arguments.output)
    check_can_be_made(output.absolute())
    be_quiet()
    from ldm.evaluation.figures import draw_all

    for path, said in draw_all(output, expanded(arguments.runs)):
        print(path if path is not None else f"note: not drawn, {said}", file=sys.stdout if path else sys.stderr)


def _picture_paths(output: Path, count: int) -> list[Path]:
    """FILE, or FILE-0 … for several. Raises `UserError` where they could not be written."""
    if output.suffix.lower() not in PICTURES:
        raise UserError(f"--output '{output}' is no picture's name; end it in one of {', '.join(PICTURES)}")
    if not output.parent.is_dir():
        raise UserError(f"--output '{output}': the folder '{output.parent}' does not exist; make it, or name another")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output '{output}': the folder '{output.parent}' cannot be written; name another")
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(count)]
    for path in paths:
        if path.is_dir():
            raise UserError(f"--output '{path}' is a folder; name a file")
    return paths


def _pictures_to_start_from(arguments: argparse.Namespace) -> dict:
    """What the pipelines that redraw take as `image` and `mask_image`; {} without --image."""
    if arguments.strength is not None:
        check_share("--strength", arguments.strength)
    for option, value in (("--mask", arguments.mask), ("--strength", arguments.strength)):
        if value is not None and arguments.image is None:
            raise UserError(f"{option} belongs to a picture to start from; give --image FILE, too")
    if arguments.image is None:
        return {}
    pictures = {"image": _read_picture("--image", arguments.image)}
    if arguments.mask is not None:
        pictures["mask_image"] = _read_picture("--mask", arguments.mask)
        sizes = [picture.size for picture in pictures.values()]
        if sizes[0] != sizes[1]:
            raise UserError(
                "--mask '{}' is {}×{} pixels, --image {}×{}; give them one size".format(
                    arguments.mask, *sizes[1], *sizes[0]
                )
            )
    return pictures


def be_quiet() -> None:
    """No progress bars for opening and writing files, no advice of the libraries."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _open(folder: Path, alone: bool):
    """The model, on an accelerator where there is one."""
    import torch

    with deferred.drawing_alone() if alone else contextlib.nullcontext():
        be_quiet()
        from pipelines.text_to_image import LatentDiffusionPipeline

        pipe = LatentDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: shown on terminals only
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def _start_from(pipe, pictures: dict, arguments: argparse.Namespace) -> tuple:
    """The same model, redrawing or inpainting, and what it starts from."""
    from PIL import ImageOps

    from pipelines import LatentDiffusionImg2ImgPipeline, LatentDiffusionInpaintPipeline

    height, width = pipe._image_size(None, None)
    given = {name: ImageOps.fit(picture, (width, height)) for name, picture in pictures.items()}
    if arguments.strength is not None:
        given["strength"] = arguments.strength
    kind = LatentDiffusionInpaintPipeline if "mask_image" in pictures else LatentDiffusionImg2ImgPipeline
    with deferred.drawing_alone() if arguments.alone else contextlib.nullcontext():
        redrawing = kind.from_pipe(pipe)
    redrawing.set_progress_bar_config(disable=None, leave=False)
    return redrawing, given


def images_at_once(height: int, width: int) -> int:
    """How many pictures of so many pixels are drawn together: a picture does not depend on it."""
    return min(IMAGES_AT_ONCE, max(1, PIXELS_AT_ONCE // (height * width)))


def _read_picture(option: str, name: str):
    """RGB and upright; a mask's transparent parts are black, kept."""
    if not (path := expanded(name)).is_file():
        raise UserError(f"{option} '{name}' is not a file; name a picture")
    from ldm.data.decode import BLACK, WHITE, open_picture, upright

    try:
        return upright(open_picture(str(path)), BLACK if option == "--mask" else WHITE)
    except (OSError, SyntaxError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise UserError(f"{option} '{name}' cannot be read as a picture ({reason})") from None


def _generators(seed: int, count: int):
    """One for each picture, on the CPU on every machine: the picture of a seed does not depend on the others."""
    import torch

    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def _write(image, path: Path) -> None:
    try:
        write_image(image, path)
    except OSError as error:
        raise RunError(f"'{path}' could not be written: {error.strerror or error}; nothing was replaced") from None


if __name__ == "__main__":
    console()
