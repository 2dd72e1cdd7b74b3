"""Reports as files and as pages."""

from dataclasses import replace

import pytest

from ldm.errors import UserError
from ldm.evaluation.report import Figure, Report, as_comparison, as_json, as_markdown, read

DISTANCE = Figure(
    part="Pictures drawn", name="FID", value=12.3456, better="lower", images=1000, against="50 images of train",
    network="inception", weights="abc", interval=(12.0, 12.6), real=3.2, remark="by many",
)  # fmt: skip
SHARE = Figure(part="Captions", name="accuracy", value=90.0, unit="%", better="higher", images=1000)
REPORT = Report(
    model="mine", settings={"num_images": 1000, "data": "there", "split": "test", "seed": 0, "clip": None},
    figures=[DISTANCE, SHARE], warnings=["few"], pictures={"a.png": "Pictures"},
    curves={"steps": [{"steps": 5, "FID": 20.0}, {"steps": 10, "FID": 15.5}]}, made_with={"torch": "2"},
)  # fmt: skip


def test_json_is_read_back_as_it_was(tmp_path):
    (tmp_path / "report.json").write_text(as_json(REPORT))
    assert read(tmp_path) == read(tmp_path / "report.json") == REPORT


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"figures": [{"part": "x"}]}', '{"accuracy": 1}'])
def test_other_files_are_no_reports(tmp_path, content):
    with pytest.raises(UserError, match="holds no report"):
        read(tmp_path)
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match="is no report of `ldm evaluate`"):
        read(tmp_path)


def test_the_page_names_what_every_figure_rests_on():
    page = as_markdown(REPORT)
    line = "| FID | 12.35 [12, 12.6] | 3.2 | lower | 1,000 | 50 images of train | inception | abc | 1 |"
    assert line in page and "Note 1: by many." in page
    assert "| accuracy | 90 % | higher | 1,000 |" in page
    assert "**Warning.** few" in page and "![Pictures](a.png)" in page and "| 10 | 15.5 |" in page


def test_only_what_was_got_alike_is_compared():
    other = replace(
        REPORT,
        settings=REPORT.settings | {"seed": 1},
        figures=[replace(DISTANCE, value=14.0, interval=(13.9, 14.1)), replace(SHARE, network="another")],
    )
    page = as_comparison(("a", "b"), (REPORT, other))
    assert "| Pictures drawn | FID (inception) | 12.35 [12, 12.6] | 14 [13.9, 14.1] | a |" in page
    assert "- seed: 0 and 1" in page
    assert "- a: accuracy = 90" in page and "- b: accuracy (another) = 90" in page
    elsewhere = replace(REPORT, settings=REPORT.settings | {"data": "elsewhere"})
    assert "- b: FID (inception) = 12.35" in as_comparison(("a", "b"), (REPORT, elsewhere))


@pytest.mark.parametrize(
    ("value", "interval", "said"),
    [(13.0, (12.5, 13.5), "the intervals overlap"), (11.0, (10.9, 11.1), "b"), (12.3456, (12.0, 12.6), "")],
)
def test_which_is_better(value, interval, said):
    other = replace(REPORT, figures=[replace(DISTANCE, value=value, interval=interval)])
    line = next(line for line in as_comparison(("a", "b"), (REPORT, other)).splitlines() if "FID" in line)
    assert line.endswith(f"| {said} |" if said else f"[{interval[0]:g}, {interval[1]:g}] |")
