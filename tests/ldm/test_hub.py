import pytest

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


RESOLVE = """
import sys
from ldm.errors import exit_code_of
from ldm.hub import commit_of, resolve

def show():
    folder = resolve(sys.argv[1], *sys.argv[2:])
    print(commit_of(folder), *sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))

sys.exit(exit_code_of(show))
"""
OLD, NEW = "a" * 40, "b" * 40
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def repository(hub, tmp_path):
    """`user/model` of two commits."""
    names = ["model_index.json", "unet/config.json", UNET, "text_encoder/model-00001-of-00002.safetensors"]
    left_out = [
        "whole.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "safety_checker/model.safetensors",
        "net.py",
    ]
    for commit in (OLD, NEW):
        for name in names + left_out:
            path = tmp_path / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{name} of {commit} ".encode() * 100)
    hub.repositories["user/model"] = {commit: tmp_path / commit for commit in (OLD, NEW)}
    return sorted(names)


def test_a_repository_is_resolved_once_and_read_without_a_connection_from_then_on(hub, repository):
    note = f"note: 'user/model' is of commit {NEW}\n"
    first = hub.run(RESOLVE, "user/model")
    assert (first.returncode, first.stderr) == (0, note)
    assert first.stdout.split() == [NEW, *repository]
    about = [request for request in hub.requests if request.startswith("GET /api/models/user/model")]
    assert [request for request in about if "/tree/" not in request] == ["GET /api/models/user/model"]
    hub.requests.clear()
    offline = hub.run(RESOLVE, "user/model", HF_HUB_OFFLINE="1")
    unreachable = hub.run(RESOLVE, "user/model", HF_ENDPOINT="http://127.0.0.1:1")
    for result in (offline, unreachable):
        assert (result.returncode, result.stdout, result.stderr) == (0, first.stdout, note)
    assert hub.requests == []
    assert hub.run(RESOLVE, "user/model", OLD).stdout.split()[0] == OLD
    other = hub.run(RESOLVE, "user/model", "v2", HF_HUB_OFFLINE="1")
    assert other.returncode == 2 and other.stderr.count("\n") == 1


def test_a_variant_is_taken_beside_what_has_none(hub, repository):
    result = hub.run(RESOLVE.replace("*sys.argv[2:]", "variant='fp16'"), "user/model")
    names = {"unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors"}
    assert set(result.stdout.split()) == {NEW, *repository, *names}


def test_a_download_that_breaks_off_is_one_line_and_running_it_again_works(hub, repository):
    hub.cut.add(UNET)
    result = hub.run(RESOLVE, "user/model")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("failed: the download of 'user/model' broke off") and result.stderr.count("\n") == 1
    assert "run it again" in result.stderr
    assert "is not whole in the cache" in hub.run(RESOLVE, "user/model", HF_HUB_OFFLINE="1").stderr
    hub.cut.clear()
    again = hub.run(RESOLVE, "user/model")
    assert (again.returncode, again.stdout.split()) == (0, [NEW, *repository])


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((404, "RepoNotFound"), "is neither a folder nor a repository that can be read"),
        ((401, "GatedRepo"), "is gated; accept its terms"),
        ((403, "GatedRepo"), "is gated; accept its terms"),
        ((404, "RevisionNotFound"), "has no revision 'v9'"),
        ((418, ""), "the Hub answered 418"),
        ((500, ""), "the Hub answered 500"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, refusal, message):
    hub.refusals["user/model"] = refusal
    result = hub.run(RESOLVE, "user/model", "v9")
    assert result.returncode == 2
    assert result.stderr.startswith("error: model 'user/model' ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_gated_repository_shows_its_files_and_gives_none(hub, repository):
    hub.refusals["user/model/resolve"] = (403, "GatedRepo")
    result = hub.run(RESOLVE, "user/model")
    assert (result.returncode, result.stdout) == (2, "")
    assert "is gated; accept its terms" in result.stderr and result.stderr.count("\n") == 1


def test_a_revision_that_is_not_there_is_one_line(hub, repository):
    result = hub.run(RESOLVE, "user/model", "v9")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: model 'user/model' has no revision 'v9'; give a branch, a tag or a full commit hash\n"
    )


def test_what_is_in_the_cache_is_opened_though_the_hub_refuses(hub, repository):
    assert hub.run(RESOLVE, "user/model").returncode == 0
    hub.refusals["user/model"] = (503, "")
    assert hub.run(RESOLVE, "user/model").stdout.split()[0] == NEW


def test_a_repository_of_pickles_is_refused_before_anything_is_downloaded(hub, repository, tmp_path):
    (tmp_path / NEW / UNET).unlink()
    (tmp_path / NEW / "safety_checker/model.safetensors").rename(tmp_path / NEW / "safety_checker/pytorch_model.bin")
    for path in (tmp_path / NEW / "unet").glob("*.safetensors"):
        path.unlink()
    result = hub.run(RESOLVE, "user/model")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unet: only a pickle (.bin) is there; convert it to safetensors\n"
    assert not [request for request in hub.requests if "/resolve/" in request]
    assert hub.run(RESOLVE, "user/model", OLD).returncode == 0
