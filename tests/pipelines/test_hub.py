"""Opening from a Hub and publishing to one, by the real client against a Hub on this machine."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipelines import LatentDiffusionPipeline, cli
from pipelines.card import model_card

COMMIT = "a" * 40
OPEN_AND_PUSH = """
import json, sys
from pathlib import Path
from pipelines import LatentDiffusionPipeline

pipe = LatentDiffusionPipeline.from_pretrained("user/model")
pipe.set_progress_bar_config(disable=True)
print(pipe.commit)
print(pipe.push_to_hub("user/copy", **json.loads(sys.argv[1])))
(pipe.folder / "README.md").write_text("# Ours\\n")
pipe.push_to_hub("user/kept")
"""
COMMAND = "import sys; from pipelines import cli; cli.main(sys.argv[1:])"
TAKE_PARTS = """
import sys
from ldm.training import run
from pipelines.assemble import assemble

parts = run.clip_parts("user/model", "clip", images=True)
assert run.component_folder("user/model", "autoencoder", "vae").parent == parts.image_encoder.parent
print(assemble(*["user/model"] * 4, sys.argv[1]))
try:
    run.clip_parts("user/none", "clip")
except ValueError as error:
    print(error)
"""
PUBLISH = """
import sys
from ldm.errors import exit_code_of
from pipelines.publish import publish
sys.exit(exit_code_of(lambda: publish(None, None, "user/model")))
"""


SAVE_AND_PUSH = """
import sys
from ldm.errors import exit_code_of
from pipelines import LatentDiffusionPipeline

def push():
    pipe = LatentDiffusionPipeline.from_pretrained(sys.argv[1])
    pipe.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="user/saved", commit_message="Saved")

for _ in sys.stdin:
    print(exit_code_of(push), flush=True)
"""


@pytest.fixture(scope="module")
def assembled(runs, tmp_path_factory) -> Path:
    """A folder put together from runs that have left a configuration and metrics."""
    root = tmp_path_factory.mktemp("published")
    for stage, folder in runs.items():
        shutil.copytree(folder, root / stage)
        (root / stage / "config.yaml").write_text(f"data:\n  source: /home/someone/{stage}-data\nseed: 3\n")
        lines = [{"step": 1, "loss": 0.5, "validation": {"loss": 0.75}}, {"step": 2, "loss": 0.125}]
        (root / stage / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 3')
    arguments = [part for stage in runs for part in (f"--{stage}", str(root / stage))]
    with pytest.raises(SystemExit) as caught:
        cli.main(["assemble", *arguments, "--output", str(root / "model")])
    assert caught.value.code == 0
    return root / "model"


def test_a_repository_is_opened_and_pushed_again_whole(hub, assembled, tmp_path):
    folder = shutil.copytree(assembled, tmp_path / "model")
    (folder / "report.json").write_text('{"accuracy": 0.625, "distances": {"frechet": 12.3456789}}')
    (folder / "net.py").write_text("raise SystemExit")
    hub.repositories["user/model"] = {COMMIT: folder}
    options = {"private": True, "commit_message": "First", "token": "hf_x", "sample_prompts": ["a cat", "a dog"] * 2}
    result = hub.run(OPEN_AND_PUSH, json.dumps(options))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{COMMIT}\n{hub.url}/user/copy/commit/{'c' * 40}\n"
    assert result.stderr.count(f"note: 'user/model' is of commit {COMMIT}\n") == 1
    private = [made.get("private") or made.get("visibility") == "private" for made in hub.created]  # older, newer
    assert [made["name"] for made in hub.created] == ["copy", "kept"] and private == [True, False]
    assert [commit["summary"] for commit in hub.commits] == ["First", "Upload the model"]

    back = tmp_path / "back"
    for name, content in hub.pushed["user/copy"].items():
        (back / name).parent.mkdir(parents=True, exist_ok=True)
        (back / name).write_bytes(content)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(hub.pushed["user/copy"]) == there - {"net.py"} | {"README.md", "grid.png"}
    assert Image.open(back / "grid.png").size == (32, 32)
    assert LatentDiffusionPipeline.from_pretrained(back).commit is None
    assert hub.pushed["user/kept"]["README.md"] == b"# Ours\n"

    card = hub.pushed["user/copy"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n")
    for part in (
        "# copy\n",
        "16 × 16 pixels",
        "![Samples](grid.png)",
        'DiffusionPipeline.from_pretrained("user/copy")',
        "| unet | `UNet2DConditionModel` | ",
        "source: unet-data\nseed: 3",
        "| unet, end of training: loss | 0.125 |",
        "| unet, end of training: validation, loss | 0.75 |",
        "| accuracy | 0.625 |",
        "| distances, frechet | 12.35 |",
    ):
        assert part in card
    assert "/home" not in card and str(tmp_path) not in card

    # The same cache serves the command without a connection
    drawing = ["generate", "a cat", "--model", "user/model", "--num-inference-steps", "2", "--output"]
    drawn = hub.run(COMMAND, *drawing, tmp_path / "cat.png", HF_HUB_OFFLINE="1")
    assert (drawn.returncode, drawn.stdout) == (0, f"{tmp_path / 'cat.png'}\n")
    assert drawn.stderr == f"note: 'user/model' is of commit {COMMIT}\n"
    assert Image.open(tmp_path / "cat.png").size == (16, 16)


def test_a_repository_stands_for_every_run(hub, assembled, tmp_path):
    """Its parts go on being trained, and are put together again."""
    hub.repositories["user/model"] = {COMMIT: assembled}
    result = hub.run(TAKE_PARTS, tmp_path / "again")
    assert result.returncode == 0, result.stderr
    written, refused = result.stdout.splitlines()
    assert written == str(tmp_path / "again")
    assert refused.startswith("clip: model 'user/none' is neither a folder nor a repository that can be read")
    assert result.stderr.count("note: 'user/model' is of commit") == 2  # for training, and for putting together
    for path in assembled.rglob("*.safetensors"):
        assert (tmp_path / "again" / path.relative_to(assembled)).read_bytes() == path.read_bytes(), path


def test_weights_go_to_the_store_of_large_files_and_saving_pushes_with_our_card(hub, assembled, tmp_path):
    """By the client's own protocol for large files; a push that broke off sends again only what is not there."""
    hub.has_large_files = True
    saved = tmp_path / "saved"
    (saved / "unet").mkdir(parents=True)
    (saved / "unet/old.bin").write_bytes(b"a pickle that lay there")
    (saved / "notes.txt").write_text("private")
    said = tmp_path / "said"
    client = hub.start(SAVE_AND_PUSH, assembled, saved, said=said, HF_HUB_DISABLE_XET="1")

    def push() -> str:
        """The exit code; one process pushes again and again, as imports take it longer."""
        client.stdin.write("\n")
        client.stdin.flush()
        return client.stdout.readline()

    hub.refusals["/large"] = (418, "")
    assert push() == "1\n" and hub.pushed == {}, said.read_text()
    assert "'user/saved' could not be pushed to" in said.read_text().splitlines()[-1]
    hub.refusals.clear()
    assert push() == "0\n", said.read_text()
    assert [commit["summary"] for commit in hub.commits] == ["Saved"]
    pushed = hub.pushed["user/saved"]
    weights = {path.relative_to(saved).as_posix() for path in saved.rglob("*.safetensors")}
    assert weights == {name for name in pushed if name.endswith(".safetensors")}
    assert all(pushed[name] == (saved / name).read_bytes() for name in pushed)
    assert set(hub.large.values()) == {pushed[name] for name in weights} and hub.verified == set(hub.large)
    assert not {"unet/old.bin", "notes.txt"} & set(pushed)
    assert pushed["README.md"].decode().startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n")
    assert "source: unet-data" in pushed["README.md"].decode() and "training/unet.yaml" in pushed
    hub.requests.clear()
    assert push() == "0\n"
    assert not [request for request in hub.requests if request.startswith("PUT")]
    client.communicate()
    assert client.returncode == 0


def test_what_is_damaged_on_the_hub_is_told_as_in_a_folder(hub, assembled, tmp_path):
    damaged = shutil.copytree(assembled, tmp_path / "damaged")
    weights = damaged / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    hub.repositories["user/model"] = {COMMIT: damaged}
    result = hub.run(COMMAND, "generate", "a cat", "--model", "user/model", "--output", tmp_path / "cat.png")
    assert result.returncode == 2
    said = result.stderr.splitlines()
    assert said[0] == f"note: 'user/model' is of commit {COMMIT}" and len(said) == 2
    assert said[1].startswith("error: unet/diffusion_pytorch_model.safetensors is damaged: ")


def test_a_card_says_what_is_not_known(pipe_without_prior, tmp_path):
    pipe_without_prior.save_pretrained(tmp_path)
    card = model_card(tmp_path, "user/model")
    assert "are not recorded" in card and "No measurement is recorded" in card
    assert "prior" not in card and "guided by it" in card
    (snippet,) = re.findall("```python\n(.*?)```", card, flags=re.DOTALL)
    compile(snippet, "card", "exec")


@pytest.mark.parametrize(
    ("refusal", "environment", "code", "message"),
    [
        ((401, ""), {}, 2, "the Hub answered 401; log in with `hf auth login`"),
        ((403, ""), {}, 2, "the Hub answered 403; log in"),
        ((418, ""), {}, 1, "the Hub answered 418; try again later"),
        (None, {"HF_ENDPOINT": "http://127.0.0.1:1"}, 1, "check the connection"),
        (None, {"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set; unset it"),
    ],
)
def test_a_push_that_is_refused_is_one_line(hub, refusal, environment, code, message):
    if refusal:
        hub.refusals["/api/repos/create"] = refusal
    result = hub.run(PUBLISH, **environment)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr and result.stderr.count("\n") == 1
