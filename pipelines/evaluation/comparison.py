"""Two evaluations side by side, as a page and a picture."""

from pathlib import Path

from ldm.errors import UserError
from ldm.evaluation import report
from ldm.evaluation.report import Report
from ldm.files import write_text
from pipelines.evaluation import pictures
from pipelines.evaluation.run import SAMPLES

PAGE, PICTURE = "comparison.md", "comparison.png"


def compare(folders: tuple[Path, Path], output: Path | None) -> str:
    """The page; written into `output`, too, where there is one, with the samples of both in one picture.

    Raises:
        UserError: a folder that holds no report, or an `output` that cannot be written.
    """
    reports: tuple[Report, Report] = tuple(report.read(folder) for folder in folders)
    names = _names(folders, reports)
    page = report.as_comparison(names, reports)
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            if all((folder / SAMPLES).is_file() for folder in folders):
                pictures.side_by_side(*(folder / SAMPLES for folder in folders), names).save(output / PICTURE)
                page += f"\n![{names[0]} and {names[1]}]({PICTURE})\n"
            write_text(output / PAGE, page)
        except OSError as error:
            raise UserError(f"--output '{output}' cannot be written: {error.strerror}; name another folder") from None
    return page


def _names(folders: tuple[Path, Path], reports: tuple[Report, Report]) -> tuple[str, str]:
    """What tells them apart: the models' names, or the reports', or A and B."""
    for names in (tuple(Path(one.model).name for one in reports), tuple(folder.absolute().name for folder in folders)):
        if all(names) and names[0] != names[1]:
            return names
    return ("A", "B")
