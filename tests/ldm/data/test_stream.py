"""Streams: every sample once an epoch, each process its own, in an order that can be gone on from anywhere."""

import functools
import http.server
import threading
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import DataConfig, TrainingConfig
from ldm.config import RunConfig as AnyRun
from ldm.data import stream as streams
from ldm.data.batches import micro_batches, open_data
from ldm.data.captions import open_images
from ldm.data.order import Share
from ldm.data.stream import Position, Reader
from ldm.errors import RunError, UserError
from ldm.training.checkpoint import Saved

SIZES = [5, 4, 6, 3]
START = Position()
ALL = sorted(10 * shard + k for shard, size in enumerate(SIZES) for k in range(size))


@pytest.fixture
def source(tmp_path, write_shards):
    write_shards(tmp_path, SIZES)
    return str(tmp_path / "*.tar")


def config_of(source: str, **settings) -> DataConfig:
    words = {"caption_column": "txt", "image_size": 8, "shuffle_buffer": 4}
    return DataConfig(**{"source": source, "streaming": True, **words, **settings})


def read(source: str, count: int, rank=0, ranks=1, size=1, position=START, seed=0, **settings) -> list[dict]:
    """`count` micro-batches of a process."""
    stream = open_data(config_of(source, **settings), seed, ranks)
    share = Share(size * ranks, 1, ranks, rank)
    run = AnyRun(output_dir="", data=stream.config, training=TrainingConfig(batch_size=size * ranks, max_steps=count))
    state = {"stream": {"shards": stream.shards.count, "positions": [position.__dict__] * ranks}}
    return list(micro_batches(stream, run, share, Saved(Path(), 0, state)))


def numbers(batches: list[dict]) -> list[int]:
    return [int(caption.split()[-1]) for batch in batches for caption in batch["captions"]]


def assert_equal(one: list[dict], two: list[dict]) -> None:
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a["images"], b["images"]) and torch.equal(a["indices"], b["indices"])
        assert a["captions"] == b["captions"] and a["position"] == b["position"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_sample_once_an_epoch_and_each_process_its_own(source, ranks):
    seen = set()
    for rank in range(ranks):
        own = [n for n in ALL if n // 10 % ranks == rank]
        epochs = [numbers(read(source, 3 * len(own), rank, ranks))[i * len(own) :][: len(own)] for i in range(3)]
        assert all(sorted(epoch) == own for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3  # orders of their own
        assert not seen & set(own)
        seen |= set(own)
    assert seen == set(ALL)


def test_the_order_is_of_the_seed_and_no_shard_is_read_as_it_is_stored(source):
    first, again, other = (numbers(read(source, 18, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other and sorted(other) == ALL
    of_a_shard = [[n for n in first if n // 10 == shard] for shard in range(4)]
    assert any(part != sorted(part) for part in of_a_shard)


def test_pictures_belong_to_their_captions_and_flips_are_drawn(source):
    mirrored = []
    for batch in read(source, 9, size=4, horizontal_flip=True):
        for image, number in zip(batch["images"], numbers([batch]), strict=True):
            sides = [int((image[0, 0, x] * 127.5 + 127.5).round()) for x in (1, 6)]
            assert sorted(sides) == [0, number]
            mirrored.append(sides[0] == number)
    assert 5 < sum(mirrored) < 31


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_from_any_batch_on_it_goes_on_as_if_never_left(source, tmp_path, write_tar, workers):
    damaged = {f"005{n}.png": b"damaged" if n == 1 else Image.new("RGB", (8, 8)) for n in range(3)}
    write_tar(
        tmp_path / "shard-004.tar", dict(sorted((damaged | {f"005{n}.txt": f"grey 5{n}" for n in range(3)}).items()))
    )
    settings = {"size": 3, "max_bad_fraction": 0.2, "horizontal_flip": True}
    whole = read(source, 20, **settings)  # 60 samples are three epochs and a bit
    assert Counter(n // 10 for n in numbers(whole))[5] > 3 and whole[-1]["position"].epoch == 2
    assert whole[-1]["position"].num_bad >= 2
    for left in range(0, 19) if workers == 0 else (7,):
        rest = read(source, 19 - left, position=whole[left]["position"], num_workers=workers, **settings)
        assert_equal(rest, whole[left + 1 :])


def test_only_the_shard_it_is_in_and_a_block_are_read_again(source, monkeypatch):
    position = read(source, 17)[-1]["position"]
    stream = open_data(config_of(source), 0)
    opened, rows = [], stream.shards.rows
    monkeypatch.setattr(
        stream, "shards", streams.Shards(stream.shards.names, lambda *at: opened.append(at[0]) or rows(*at))
    )
    list(islice(Reader(stream, Share(1), 1, position), 1))
    assert len(opened) < 3 <= len(SIZES) - 1 == position.shard


def test_a_block_larger_than_the_data_is_an_epoch(source):
    batches = read(source, 36, shuffle_buffer=1000)
    assert sorted(numbers(batches[:18])) == sorted(numbers(batches[18:])) == ALL


def test_too_few_shards(source):
    with pytest.raises(UserError, match=r"4 shards are too few for 5 processes"):
        open_data(config_of(source), 0, 5)


def test_another_number_of_processes_or_shards_cannot_go_on(source, write_shards, tmp_path):
    stream = open_data(config_of(source), 0, 2)
    run = AnyRun(output_dir="", data=stream.config)
    left = {"shards": 4, "positions": [Position().__dict__] * 3}
    with pytest.raises(UserError, match=r"3 processes were reading .* 2 cannot go on .*start as many as before"):
        micro_batches(stream, run, Share(64, 1, 2), Saved(Path(), 1, {"stream": left}))
    left = {"shards": 5, "positions": [Position().__dict__] * 2}
    with pytest.raises(UserError, match=r"had 5 shards and has 4"):
        micro_batches(stream, run, Share(64, 1, 2), Saved(Path(), 1, {"stream": left}))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_too_many_bad_images_stop_it_at_the_end_of_the_epoch(tmp_path, write_tar, capfd, workers):
    """Those of all threads that decode."""
    members = {f"{n}.png": b"damaged" if n < 2 else Image.new("RGB", (8, 8)) for n in range(10)}
    path = write_tar(tmp_path / "a.tar", dict(sorted((members | {f"{n}.txt": str(n) for n in range(10)}).items())))
    with pytest.raises(RunError) as raised:
        read(str(path), 30, num_workers=workers)
    assert str(raised.value).startswith("2 of the first") or str(raised.value).startswith("3 of the first")
    assert "max_bad_fraction 0.05 allows" in str(raised.value) and "\n" not in str(raised.value)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: sample 0 of")]
    assert len(told) == 1


def test_nothing_but_bad_images_ends(tmp_path, write_tar):
    path = write_tar(tmp_path / "a.tar", {"1.png": b"damaged", "1.txt": "a"})
    with pytest.raises(RunError, match=r"of the first .* cannot be used"):
        read(str(path), 1, max_bad_fraction=1.0)


def test_parquet_by_files_or_row_groups(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdef"))})
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png")
    rows = {"image": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}] * 6, "label": list(range(6))}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "one.parquet", batch_size=2)
    settings = {"caption_column": None, "caption_templates": ["letter {label}"]}
    for ranks in (1, 3):
        letters = []
        for rank in range(ranks):
            batches = read(str(tmp_path / "one.parquet"), 6 // ranks, rank, ranks, **settings)
            letters += [batch["captions"][0] for batch in batches]
            rest = read(str(tmp_path / "one.parquet"), 1, rank, ranks, position=batches[0]["position"], **settings)
            assert_equal(rest, batches[1:2])
            assert (batches[0]["images"] * 127.5 + 127.5).round().unique().tolist() == [9]
        assert sorted(letters) == [f"letter {x}" for x in "abcdef"]


def test_what_cannot_be_streamed_is_refused(tmp_path, source):
    with pytest.raises(UserError, match=r"data.max_images must be null with data.streaming"):
        config_of(source, max_images=5)
    with pytest.raises(UserError, match=r"shapes is no tar shards, parquet files or Hub repository"):
        open_data(config_of("shapes"), 0)
    with pytest.raises(UserError, match=r"has to be read in any order here"):
        open_images(config_of(source), 0)
    with pytest.raises(UserError, match=r"caption_column 'words'.*has png, txt"):
        open_data(config_of(source, caption_column="words"), 0)
    with pytest.raises(UserError, match=r"image_column 'jpg'.*has png, txt"):
        open_data(config_of(source, image_column="jpg"), 0)


def test_a_shard_cut_short_is_found_before_the_first_sample(source, tmp_path):
    last = tmp_path / "shard-003.tar"
    last.write_bytes(last.read_bytes()[:2048])
    with pytest.raises(UserError, match=r"shard-003.tar is no tar archive, or cut short"):
        open_data(config_of(source), 0)


def test_a_part_in_memory_and_a_pass_as_stored(source):
    stream = open_data(config_of(source), 0)
    excerpt = stream.excerpt(7)
    assert len(excerpt) == 7 and [excerpt.captions(n)[0] for n in range(7)] == [f"grey {n}" for n in ALL[:7]]
    assert excerpt.pixels(6)[0, 0, 6] == ALL[6]
    assert list(stream.some_captions(7)) == [f"grey {n}" for n in ALL[:7]]
    passes = [list(open_data(config_of(source), 0, 2).in_order(rank)) for rank in range(2)]
    assert [int(captions[0].split()[1]) for part in passes for _, _, captions in part] == sorted(
        ALL, key=lambda n: n // 10 % 2
    )
    name, pixels, _ = passes[1][0]
    assert name.startswith("sample 0010 of") and pixels.dtype == np.uint8 and pixels[0, 0, 6] == 10


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; every shard's first `failures` answers break off in the middle."""

    failures: ClassVar[Counter] = Counter()

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        broken = self.failures[self.path] > 0
        self.failures[self.path] -= broken
        self.wfile.write(data[: len(data) // 2] if broken else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def url(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls_are_read_as_files_are_whatever_the_network_does(source, url, monkeypatch):
    from_disk = read(source, 12, size=3)
    monkeypatch.setattr(streams, "WAITS", (0, 0))
    for failures in (0, 2):
        _Handler.failures = Counter({f"/shard-00{n}.tar": failures for n in range(1, 4)})
        batches = read(url + "/shard-{000..003}.tar", 12, size=3)
        assert numbers(batches) == numbers(from_disk)
        assert all(torch.equal(a["images"], b["images"]) for a, b in zip(batches, from_disk, strict=True))
    _Handler.failures = Counter({"/shard-001.tar": 4})
    with pytest.raises(RunError, match=r"shard-001.tar cannot be read: ConnectionError: .* did not arrive.*--resume"):
        read(url + "/shard-{000..003}.tar", 12, size=3)


def test_urls_that_are_not_there(url, source):
    with pytest.raises(UserError, match=r"absent.tar: HTTP Error 404"):
        open_data(config_of(f"{url}/absent.tar"), 0)
    with pytest.raises(UserError, match=r"with data.streaming=true alone"):
        open_images(config_of(f"{url}/shard-000.tar", streaming=False), 0)
    with pytest.raises(UserError, match=r"Connection refused"):
        open_data(config_of("http://127.0.0.1:9/a.tar"), 0)
