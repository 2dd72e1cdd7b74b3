"""The command `ldm evaluate`: its options, and what can be told of them before anything heavy is imported."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from ldm import hub
from ldm.errors import UserError
from ldm.files import expanded
from pipelines.checks import MOST_AT_ONCE, MOST_IMAGES, check_count, check_scale
from pipelines.evaluation.settings import check_output

FEWEST = 6
"""Images; precision and recall look at each image's five neighbours."""
LARGEST_SEED = 2**63 - 1
BUNDLED = "the bundled model"
MODELS = ("A", "B")
"""Folders of two models' evaluations, where --compare is given models."""


def add_command(commands, bundled: Path) -> None:
    """Adds `evaluate` to the command line's parser. bundled: the model that is taken where none is named."""
    parser = commands.add_parser("evaluate", help="judge what a model draws, and each of its parts, in figures")
    add = parser.add_argument
    add("--model", metavar="FOLDER|REPO", help="default: the bundled one; or a model of pixels of train_ldm.py")
    add("--revision", metavar="SHA", help="branch, tag or commit of a REPO")
    add("--data", metavar="SOURCE", help="a folder, parquet file, tar shards, repository of the Hub, or shapes")
    add("--output", metavar="REPORT", help="a new folder, or that of an evaluation to go on with")
    add("--split", metavar="NAME", help="whose captions are drawn; default: test, or validation, or the only one")
    add("--against", metavar="NAME", help="split that the pictures are compared with; default: train, if there is one")
    add("--num-images", metavar="N", type=int, default=1000, help="to draw; default: 1000")
    add("--reference-images", metavar="N", type=int, default=10_000, help="at most, to compare with; default: 10000")
    add("--caption-column", metavar="NAME", help="default: a column of texts, if there is one")
    add("--caption-template", metavar="TEXT", help="over columns; default: 'a photo of a {label}' over class labels")
    add("--label-names", metavar="NAME,NAME,…", type=_names, help="of whole-number labels 0, 1, … without names")
    add("--features", metavar="NETWORK", help="of distances: inception, open_clip:MODEL/TAG, a folder, own")
    add("--clip", metavar="FOLDER", help="that reads captions; default: the model's own")
    add("--classifier", metavar="FOLDER", help="in transformers' layout, that reads what each picture shows")
    add("--num-inference-steps", metavar="N", type=int, help="default: the model's own")
    add("--guidance-scale", metavar="G", type=float, help="default: the model's own")
    add("--steps", metavar="N,N,…", type=_list_of(int), help="draws a curve of quality over these")
    add("--guidance-scales", metavar="G,G,…", type=_list_of(float), help="draws a curve of quality over these")
    add("--curve-images", metavar="N", type=int, help="for each point of a curve; default: 200, or --num-images")
    add("--seed", metavar="N", type=int, default=0, help="of pictures, choice of images and intervals; default: 0")
    add("--batch-size", metavar="N", type=int, default=50, help="pictures drawn at once; default: 50")
    add("--compare", metavar=MODELS, nargs=2, help="two reports, or with --data two models, side by side")
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(command=lambda arguments: evaluate(arguments, bundled, defaults))


def evaluate(arguments: argparse.Namespace, bundled: Path, defaults: Mapping[str, object]) -> None:
    """`ldm evaluate`: writes the report and prints its path; or prints two, compared. `defaults`: of its options."""
    if arguments.compare is not None and arguments.model is not None:
        raise UserError("--model and --compare exclude each other; --compare A B takes two models, or two reports")
    if _are_reports(arguments):
        for name, default in defaults.items():
            if name not in ("compare", "output") and getattr(arguments, name) != default:
                raise UserError(f"--{name.replace('_', '-')} is of no use to --compare with two reports; leave it out")
        folders = tuple(expanded(name) for name in arguments.compare)
        output = None if arguments.output is None else expanded(arguments.output)
        print(_compared(folders, output), end="")
        return
    for option in ("data", "output"):
        if not getattr(arguments, option):
            hint = " (--compare was not given two folders that hold a report.json)"
            said = hint if arguments.compare and option == "data" else ""
            raise UserError(f"--{option} is missing{said}; see `ldm evaluate --help`")
    _check(arguments)
    output = expanded(arguments.output)
    check_output(output) if arguments.compare is None else [check_output(output / name) for name in MODELS]
    names = arguments.compare or [arguments.model or BUNDLED]
    models = {name: hub.resolve(bundled if name == BUNDLED else name, arguments.revision) for name in names}
    for folder in models.values():  # by whose files drawn pictures are known to be its own
        if folder.resolve() in output.resolve().parents:
            raise UserError(f"--output '{output}' is in the model's folder, which it would change; name another folder")
    from pipelines.cli import be_quiet

    be_quiet()
    from pipelines.evaluation.model import open_painter
    from pipelines.evaluation.run import evaluate as evaluate_model

    for folder in models.values() if arguments.compare is not None else ():
        open_painter(folder, {})  # or else what is amiss with the second is told when the first has been judged
    folders = (output,) if arguments.compare is None else tuple(output / name for name in MODELS)
    for name, folder in zip(names, folders, strict=True):
        print(evaluate_model(arguments, name, models[name], folder))
    if arguments.compare is not None:
        print(_compared(folders, output), end="")


def _are_reports(arguments: argparse.Namespace) -> bool:
    """Whether --compare was given two reports. With --data it takes models, which may hold a report as well."""
    if arguments.compare is None or arguments.data is not None:
        return False
    return all((expanded(name) / "report.json").is_file() for name in arguments.compare)


def _compared(folders: tuple[Path, Path], output: Path | None) -> str:
    from pipelines.evaluation.comparison import compare

    return compare(folders, output)


def _check(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for numbers that cannot be used."""
    for option, smallest, largest in (
        ("num_images", FEWEST, MOST_IMAGES),
        ("reference_images", FEWEST, None),
        ("curve_images", FEWEST, None),
        ("batch_size", 1, MOST_AT_ONCE),
    ):
        value, name = getattr(arguments, option), f"--{option.replace('_', '-')}"
        if value is None:
            continue
        if smallest == FEWEST and value < FEWEST:
            raise UserError(f"{name} is {value}; precision and recall by five neighbours need at least {FEWEST} images")
        check_count(name, value, smallest, largest)
    if arguments.curve_images is not None and not (arguments.steps or arguments.guidance_scales):
        raise UserError("--curve-images belongs to a curve; give --steps or --guidance-scales, too")
    check_count("--seed", arguments.seed, smallest=0, largest=LARGEST_SEED)
    for option, check in (("num_inference_steps", check_count), ("steps", check_count),
                          ("guidance_scale", check_scale), ("guidance_scales", check_scale)):  # fmt: skip
        given = getattr(arguments, option)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            check(f"--{option.replace('_', '-')}", value)
    if arguments.caption_column is not None and arguments.label_names is not None:
        raise UserError("--caption-column and --label-names exclude each other; leave one out")
    if arguments.caption_column is not None and arguments.caption_template is not None:
        raise UserError("--caption-column and --caption-template exclude each other; leave one out")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of names with commas between, such as cat,dog,bird")
    return names


def _list_of(kind: type):
    def read(text: str) -> list:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"'{text}' is no list of numbers with commas between, such as 5,10,20"
            ) from None

    return read
