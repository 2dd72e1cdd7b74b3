"""`ldm plot`: what a run logged, as a picture."""

import json

import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.curves import curves, read_metrics, running_mean
from pipelines.cli import main as ldm_command


@pytest.fixture
def run(tmp_path):
    rows = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3} for step in range(1, 201)]
    rows += [{"step": 200, "cosine_prior": 0.9, "cosine_text": 0.4}]
    (tmp_path / "run").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"step": 201, "lo')
    return tmp_path / "run"


def test_reads_every_metric_and_passes_over_a_torn_line(run):
    metrics = read_metrics(run)
    assert list(metrics) == ["loss", "learning_rate", "cosine_prior", "cosine_text"]
    assert metrics["loss"] == (list(range(1, 201)), [1 / step for step in range(1, 201)])
    assert metrics["cosine_prior"] == ([200], [0.9])


def test_passes_over_what_is_no_metric(run):
    rows = ['[1]', '{"loss": 9}', '{"step": "x", "loss": 9}', '{"step": 1, "loss": [9.0]}', '{"step": 1, "name": "me"}',
            '{"step": 2, "over_t": []}', '{"step": 2, "over_t": [1.0, 2.0]}', '{"step": 3, "over_t": 3.0}']  # fmt: skip
    before = read_metrics(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\n\xff\n" + "\n".join(rows).encode())
    assert read_metrics(run) == {**before, "over_t": ([2], [[1.0, 2.0]])}
    assert len(curves(run).axes) == 6


def test_a_panel_a_metric_with_its_mean(run):
    panels = [axes for axes in curves(run).axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["loss", "learning_rate", "cosine_prior", "cosine_text"]
    assert [len(axes.lines) for axes in panels] == [2, 2, 1, 1]
    assert running_mean([0.0, 3.0, 6.0, 3.0], 1) == [1.5, 3.0, 4.0, 4.5]


def test_a_list_is_a_curve_for_each_step(run):
    with (run / "metrics.jsonl").open("w") as file:
        for step in (100, 200, 300):
            file.write(json.dumps({"step": step, "validation_loss_over_t": [3.0, 2.0, 1.0, step / 100]}) + "\n")
    (panel,) = (axes for axes in curves(run).axes if axes.get_visible())
    assert [list(line.get_ydata()) for line in panel.lines] == [[3, 2, 1, 1], [3, 2, 1, 2], [3, 2, 1, 3]]
    assert list(panel.lines[0].get_xdata()) == [0.125, 0.375, 0.625, 0.875]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["step 100", "step 300"]


def test_the_command_writes_beside_the_run_or_where_it_is_told(run, tmp_path, capsys):
    for further, path in (([], run / "curves.png"), (["--output", str(tmp_path / "a.png")], tmp_path / "a.png")):
        with pytest.raises(SystemExit) as ended:
            ldm_command(["plot", str(run), *further])
        assert ended.value.code == 0
        assert capsys.readouterr().out.strip() == str(path)
        low, high = Image.open(path).convert("L").getextrema()
        assert low < 100 and high == 255


def test_what_is_no_run_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        ldm_command(["plot", str(tmp_path / "absent")])
    assert ended.value.code == 2 and "is not a folder; name the output_dir of a run" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such file; name the output_dir"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no metrics yet"):
        read_metrics(tmp_path)
