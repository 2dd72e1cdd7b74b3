"""What an evaluation says: figures, each with what it is of and how it was got, as JSON and as a page."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import UserError

REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number, and all that it takes to know what it means."""

    part: str
    """What was judged: the images drawn, the autoencoder, the prior …"""
    name: str
    value: float
    unit: str = ""
    better: str = ""
    """`lower`, `higher`, or nothing where neither is."""
    images: int
    """So many images, or captions, went into it."""
    against: str = ""
    """Which images it is a distance to."""
    network: str = ""
    weights: str = ""
    """Whose features or judgement it rests on: of an equal figure elsewhere both must be the same."""
    interval: tuple[float, float] | None = None
    """Of 95 %, by bootstrap over the images."""
    real: float | None = None
    """The same of real images, of the split that the captions are from."""
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    model: str
    settings: dict[str, Any]
    figures: list[Figure]
    warnings: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    """File -> what it shows."""
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """What was varied -> a row of figures for each value."""
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    """A heading -> figures by name: accuracy caption by caption, …"""
    made_with: dict[str, Any] = field(default_factory=dict)
    """Versions, device, seconds: what differs from one evaluation to the next of the same model."""


def as_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"


def read(path: Path) -> Report:
    """A report that `as_json` wrote, from its file or the folder that holds it.

    Raises:
        UserError: there is none, or another file of that name.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        figures = [
            Figure(**row | {"interval": tuple(row["interval"]) if row["interval"] else None})
            for row in content.pop("figures")
        ]
        return Report(figures=figures, **content)
    except OSError:
        raise UserError(f"'{path}' holds no {REPORT}; give the --output of an evaluation that has ended") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"'{file}' is no report of `ldm evaluate`; give the --output of one") from None


def as_markdown(report: Report) -> str:
    """The report as a page: figures part by part, warnings, settings, pictures."""
    sections = [f"# {report.model}", _facts(report)]
    if report.warnings:
        sections.append("\n".join(f"> **Warning.** {warning}  " for warning in report.warnings))
    for part in dict.fromkeys(figure.part for figure in report.figures):
        sections.append(f"## {part}\n\n{_table([figure for figure in report.figures if figure.part == part])}")
    for varied, rows in report.curves.items():
        table = _rows(list(rows[0]), [map(number, row.values()) for row in rows])
        sections.append(f"## Quality over {varied}\n\n{_of_curves(report.settings)}\n\n{table}")
    for what, rows in report.details.items():
        table = _rows(["", "value"], [(name, number(value)) for name, value in rows.items()])
        sections.append(f"## {what.capitalize()}\n\n{table}")
    if report.pictures:
        sections.append("## Pictures")
    for file, shown in report.pictures.items():
        sections.append(f"{shown}\n\n![{shown.partition(':')[0]}]({file})")
    settings = [(name, str(value)) for name, value in report.settings.items() if value is not None]
    sections.append(f"## Settings\n\n{_rows(['setting', 'value'], settings)}")
    made_with = [(name, _written(value)) for name, value in report.made_with.items()]
    sections.append(f"Made with {', '.join(f'{name} {value}' for name, value in made_with)}.")
    return "\n\n".join(sections) + "\n"


def as_comparison(names: tuple[str, str], reports: tuple[Report, Report]) -> str:
    """Two reports as one page: every figure that both have, got in the same way; then what is not comparable."""
    first, second = reports
    lines, alone = [], []
    others = {_key(figure, second): figure for figure in second.figures}
    for figure in first.figures:
        other = others.pop(_key(figure, first), None)
        if other is None:
            alone.append(f"{names[0]}: {_title(figure)} = {number(figure.value)}")
            continue
        better = _better(figure, other)
        lines.append(
            [
                figure.part,
                _title(figure),
                _value(figure),
                _value(other),
                {None: "", -1: names[0], 1: names[1], 0: "the intervals overlap"}[better],
            ]
        )
    alone += [f"{names[1]}: {_title(figure)} = {number(figure.value)}" for figure in others.values()]
    sections = [f"# {names[0]} and {names[1]}", _rows(["of", "figure", names[0], names[1], "better"], lines)]
    if different := [
        f"- {name}: {first.settings.get(name)} and {second.settings.get(name)}"
        for name in dict.fromkeys([*first.settings, *second.settings])
        if first.settings.get(name) != second.settings.get(name)
    ]:
        sections.append("## Settings that differ\n\n" + "\n".join(different))
    if alone:
        sections.append("## Of one alone, or got in another way\n\n" + "\n".join(f"- {line}" for line in alone))
    return "\n\n".join(sections) + "\n"


def number(value: float) -> str:
    """Four digits that count; whole numbers as they are."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _facts(report: Report) -> str:
    settings = report.settings
    return (
        f"{settings.get('num_images', 0):,} images, drawn from captions of {settings.get('data')}"
        f" ({settings.get('split')}), seed {settings.get('seed')}. In brackets the 95 % interval by bootstrap over the "
        "images; “real” is the same figure of real images of that split."
    )


def _of_curves(settings: dict[str, Any]) -> str:
    """What every point of a curve rests on."""
    judges = [f"{name}: {settings[name]}" for name in ("features", "clip", "classifier") if settings.get(name)]
    return "; ".join([f"{settings.get('curve_images')} images a point", f"against {settings.get('against')}", *judges])


def _written(value: object) -> str:
    return " + ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def _table(figures: Sequence[Figure]) -> str:
    """Figures line by line; what is said of several is said once, beneath."""
    notes = list(dict.fromkeys(figure.remark for figure in figures if figure.remark))
    table = _rows(
        ["figure", "value", "real", "better", "images", "against", "network", "weights", "note"],
        [
            [
                figure.name,
                _value(figure),
                "" if figure.real is None else number(figure.real),
                figure.better,
                f"{figure.images:,}",
                figure.against,
                figure.network,
                figure.weights,
                str(notes.index(figure.remark) + 1) if figure.remark else "",
            ]
            for figure in figures
        ],
    )
    return "\n\n".join([table, *(f"Note {place}: {note}." for place, note in enumerate(notes, start=1))])


def _value(figure: Figure) -> str:
    unit = f" {figure.unit}" if figure.unit else ""
    interval = "" if figure.interval is None else f" [{number(figure.interval[0])}, {number(figure.interval[1])}]"
    return f"{number(figure.value)}{unit}{interval}"


def _title(figure: Figure) -> str:
    return figure.name + (f" ({figure.network})" if figure.network else "")


def _key(figure: Figure, report: Report) -> tuple:
    """What two figures must have in common to be compared."""
    drawn_from = (report.settings.get(name) for name in ("data", "split", "captions"))
    return figure.part, figure.name, figure.network, figure.weights, figure.images, figure.against, *drawn_from


def _better(first: Figure, second: Figure) -> int | None:
    """-1: the first, 1: the second, 0: their intervals overlap, None: neither is better than the other."""
    if not first.better or first.value == second.value:
        return None
    if first.interval and second.interval:
        (low_1, high_1), (low_2, high_2) = first.interval, second.interval
        if low_1 <= high_2 and low_2 <= high_1:
            return 0
    return -1 if (first.value < second.value) == (first.better == "lower") else 1


def _rows(head: Sequence[str], rows) -> str:
    """A table of Markdown, without the columns that are empty in every row."""
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    lines = [[head[place] for place in kept], ["---"] * len(kept), *([row[place] for place in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
