import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import ldm
from ldm.errors import UserError
from ldm.hub import commit_of, resolve


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}")
    return tmp_path / "model"


def line(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_itself(model):
    assert commit_of(model) is None
    assert resolve(model) == resolve(str(model)) == model


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c", "nowhere", "~/nowhere", "owner/"])
def test_a_folder_that_does_not_exist_is_told_from_a_repository(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert f"model folder '{name}' does not exist" in line(resolve, name)


def test_a_file_and_a_revision_of_a_folder_are_refused(model):
    assert "is a file" in line(resolve, model / "model_index.json")
    assert "revision 'main' belongs to a repository" in line(resolve, model, "main")


def test_a_repository_out_of_the_cache_needs_no_connection(tmp_path, monkeypatch):
    """The Hub's own cache layout, in which a repository is kept under its commit."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "model_index.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    assert resolve("someone/model") == repository / "snapshots" / commit
    assert resolve("someone/model", commit) == repository / "snapshots" / commit
    assert "cannot be reached" in line(resolve, "someone/other")
    assert "possible repository name" in line(resolve, "some one/?")


class Refusal(BaseHTTPRequestHandler):
    """A Hub that answers every request with the code in the repository's name, as `owner/404-RepoNotFound`."""

    def do_GET(self):
        status, _, code = self.path.partition("owner/")[2].split("/")[0].partition("-")
        self.send_response(int(status or 404))
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = HTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("owner/404-RepoNotFound", "is neither a folder nor a repository that can be read"),
        ("owner/401-GatedRepo", "is gated; accept its terms"),
        ("owner/404-RevisionNotFound", "has no revision 'v9'"),
        ("owner/418", "the Hub answered 418"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, repository, message):
    script = (
        "import sys; from ldm.errors import exit_code_of; from ldm.hub import resolve; "
        "sys.exit(exit_code_of(lambda: resolve(sys.argv[1], 'v9')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, repository],
        env={
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "HF_ENDPOINT": hub,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(Path(ldm.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: model '{repository}' ") and result.stderr.count("\n") == 1
    assert message in result.stderr
