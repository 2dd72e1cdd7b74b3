"""What tests of several folders share: tar shards of captioned pictures, and a Hub on this machine."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import ldm

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before a test imports torch, which reads it once
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two for the whole suite, which holds the starts of some hundred processes; none for files that are named, whose
    figures `-s` shows."""
    return 2 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first: one worker has it alone, while the other takes file after file."""
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")


def _write_tar(path: Path, members: dict[str, bytes | str | dict | Image.Image]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, Image.Image):
                buffer = io.BytesIO()
                content.save(buffer, "JPEG" if name.endswith("jpg") else "PNG")
                content = buffer.getvalue()
            elif isinstance(content, dict):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """(path, {name of a member: bytes, text, JSON object or picture}) -> path: writes a tar archive."""
    return _write_tar


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., list[Path]]:
    """(folder, sizes, side) -> paths of shard-000.tar … with so many samples each. Picture k of shard s is of the grey
    10 · s + k, its left half black; its caption is "grey <10 · s + k>"."""

    def write(folder: Path, sizes: list[int], side: int = 8) -> list[Path]:
        paths = []
        for shard, size in enumerate(sizes):
            members = {}
            for number in range(10 * shard, 10 * shard + size):
                picture = Image.new("RGB", (side, side), (number,) * 3)
                picture.paste((0, 0, 0), (0, 0, side // 2, side))
                members |= {f"{number:04d}.png": picture, f"{number:04d}.txt": f"grey {number}"}
            paths.append(_write_tar(folder / f"shard-{shard:03d}.tar", members))
        return paths

    return write


@dataclass
class Hub:
    """A Hub that speaks the routes of huggingface.co, for the real client, from folders.

    `repositories`: name -> {commit: folder}, the last being main's. What else happens is set by the tests.
    """

    url: str = ""
    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)  # start of a path -> status, X-Error-Code
    cut: set[str] = field(default_factory=set)  # files whose download ends half-way and is refused from then on
    requests: list[str] = field(default_factory=list)
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> path -> content
    commits: list[dict] = field(default_factory=list)  # the headers of commits
    has_large_files: bool = False  # takes safetensors as such: content first, by its hash, then a commit that names it
    large: dict[str, bytes] = field(default_factory=dict)  # hash -> content
    verified: set[str] = field(default_factory=set)
    created: list[dict] = field(default_factory=list)
    home: Path = Path()

    def run(self, script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        """Runs Python code in a process whose client asks this Hub and keeps its cache in `home`."""
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, env=self._environment() | environment, capture_output=True, text=True)

    def start(self, script: str, *arguments: object, said: Path, **environment: str) -> subprocess.Popen:
        """As `run`, of code that is spoken to by pipes; its standard error goes to the file `said`."""
        command = [sys.executable, "-c", script, *map(str, arguments)]
        with said.open("w") as log:
            return subprocess.Popen(command, env=self._environment() | environment, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, stderr=log, text=True)  # fmt: skip

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(Path(ldm.__file__).parents[1]),
        }
        return kept | ours


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].strip("/")
        repository = "/".join(path.removeprefix("api/models/").split("/")[:2])
        for refused in (repository, f"{repository}/resolve"):
            if refused in self.hub.refusals and path.removeprefix("api/models/").startswith(refused):
                return self.answer(*self.hub.refusals[refused])
        if repository not in self.hub.repositories:
            return self.answer(404, "RepoNotFound")
        commits = self.hub.repositories[repository]
        rest = path.removeprefix("api/models/").split("/")[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.answer(404, "RevisionNotFound")
        if not path.startswith("api/"):
            return self.send_file(commits[commit], "/".join(rest[2:]), commit)
        files = sorted(file for file in commits[commit].rglob("*") if file.is_file())
        if rest[:1] == ["tree"]:
            return self.send_json(
                [
                    {
                        "type": "file",
                        "path": file.relative_to(commits[commit]).as_posix(),
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                    }
                    for file in files
                ]
            )
        names = [{"rfilename": file.relative_to(commits[commit]).as_posix()} for file in files]
        return self.send_json({"id": repository, "modelId": repository, "sha": commit, "siblings": names, "tags": []})

    do_HEAD = do_GET

    def send_file(self, folder: Path, name: str, commit: str) -> None:
        content = (folder / name).read_bytes()
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if name in self.hub.cut and self.command == "GET" and start:
            self.close_connection = True
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            if name in self.hub.cut:
                self.wfile.write(content[start : len(content) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content[start:])

    def do_POST(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        refusal = next((self.hub.refusals[name] for name in self.hub.refusals if name in path + body.decode()), None)
        if refusal:
            return self.answer(*refusal)
        if path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            name = f"{self.hub.created[-1].get('organization', 'owner')}/{self.hub.created[-1]['name']}"
            return self.send_json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                "lfs" if self.hub.has_large_files and file["path"].endswith(".safetensors") else "regular"
                for file in files
            ]
            return self.send_json(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(files, modes, strict=True)
                    ]
                }
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.send_json(
                {"transfer": "basic", "objects": [self.wanted(o) for o in json.loads(body)["objects"]]}
            )
        if path == "/verify":
            large = json.loads(body)
            if len(self.hub.large[large["oid"]]) != large["size"]:
                return self.answer(422, "")
            self.hub.verified.add(large["oid"])
            return self.send_json({})
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.hub.commits.append(line["value"])
                else:
                    value = line["value"]
                    is_large = line["key"] == "lfsFile"
                    content = self.hub.large[value["oid"]] if is_large else b64decode(value["content"])
                    self.hub.pushed.setdefault(name, {})[line["value"]["path"]] = content
            return self.send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40})
        return self.answer(404, "")

    def wanted(self, large: dict) -> dict:
        """What is to be done with an object of the large-file store: nothing where it is there."""
        url = self.hub.url
        actions = {"upload": {"href": f"{url}/large/{large['oid']}"}, "verify": {"href": f"{url}/verify"}}
        return large if large["oid"] in self.hub.verified else large | {"actions": actions}

    def do_PUT(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/large" in self.hub.refusals:
            return self.answer(*self.hub.refusals["/large"])
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(422, "")
        self.hub.large[oid] = body
        return self.answer(200, "")

    def send_json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    """An empty Hub, its cache empty too."""
    handler = type("Handler", (_Handler,), {"hub": Hub(home=tmp_path / "hub-home")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield handler.hub
    server.shutdown()
    server.server_close()
