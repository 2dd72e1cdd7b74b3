"""Which room may enter which, read from the sources: train → pipelines → ldm, never back; and no pickle anywhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "ldm": {"pipelines", "train", "tests"},
    "pipelines": {"train", "tests"},
    "train": {"tests"},
    "tests/benchmarks": {"tests"},  # scripts, for which a wheel's package of this name may come first
    "ldm/diffusion": {"diffusers", "transformers", "accelerate", "datasets", "open_clip", "numpy"},
}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, those inside functions and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_never_back(room):
    files = sources(room)
    assert len(files) > 1
    assert {path.name: imported(path) & FORBIDDEN[room] for path in files if imported(path) & FORBIDDEN[room]} == {}


@pytest.mark.parametrize("room", ["ldm", "pipelines", "train", "tests"])
def test_no_pickle_is_read_or_written(room):
    for path in sources(room):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {
            f"{node.func.value.id}.{node.func.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        }
        assert not imported(path) & PICKLES, path
        assert not calls & {"torch.save", "torch.load"}, path
        if room != "tests":
            assert not {call for call in calls if call.endswith((".save_state", ".load_state"))}, path
