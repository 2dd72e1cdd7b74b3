"""The judges as `ldm.evaluation` takes them: the same features and readings as the benchmarks have."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

import bundled_model
import cifar10_classifier
import resnet_judge
from ldm.evaluation.distances import frechet_distance, nearest
from ldm.evaluation.features import open_classifier, open_features


def test_is_a_feature_network_and_a_reader():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, features = cifar10_classifier.features(cifar10_classifier.load(), images * 2 - 1)
    network, reader = cifar10_classifier.feature_network(), cifar10_classifier.reader()
    assert open_features(network) is network and open_classifier(reader) is reader
    assert (network.size, network.image_size, reader.names) == (256, 32, cifar10_classifier.CLASSES)
    torch.testing.assert_close(network(images), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reader(images), logits, rtol=1e-4, atol=1e-4)
    larger = torch.nn.functional.interpolate(images, 64)
    assert network(larger).shape == (3, 256)


# ---- the second one --------------------------------------------------------------------------------------------------


def test_the_second_reads_pictures_as_transformers_alone_does():
    noise = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = (torch.nn.functional.interpolate(noise, 32, mode="bilinear") * 255).round().byte()
    processor = AutoImageProcessor.from_pretrained(resnet_judge.FOLDER)
    model = AutoModelForImageClassification.from_pretrained(resnet_judge.FOLDER, dtype=torch.float32)
    pictures = [Image.fromarray(np.asarray(picture.permute(1, 2, 0))) for picture in pixels]
    with torch.no_grad():
        expected = model(**processor(pictures, return_tensors="pt")).logits
    reader = open_classifier(resnet_judge.FOLDER)
    assert reader.names == cifar10_classifier.CLASSES
    # The processor rounds what it resized to whole grey levels.
    torch.testing.assert_close(reader(pixels.float() / 255), expected, rtol=0.02, atol=0.05)


def test_the_second_is_small_and_another_network_than_the_first():
    model = AutoModelForImageClassification.from_pretrained(resnet_judge.FOLDER)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    assert (resnet_judge.FOLDER / "model.safetensors").stat().st_size <= 4 * 2**20
    assert resnet_judge.stated_accuracy() >= 0.87


@pytest.fixture
def squares() -> tuple[Tensor, Tensor]:
    """24 images (uint8) and their labels: a bright square of the label's size on noise."""
    labels = torch.arange(24) % 10
    pixels = torch.randint(90, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for image, label in zip(pixels, labels, strict=True):
        image[:, 8 : 10 + label, 8 : 10 + label] = 250
    return pixels, labels


def test_an_augmented_image_is_a_function_of_seed_epoch_and_sample(squares):
    pixels, _ = squares
    every = resnet_judge.augmented(pixels, 0, 0, torch.arange(24))
    index = torch.tensor([7, 2, 19])
    assert torch.equal(resnet_judge.augmented(pixels, 0, 0, index), every[index])
    for seed, epoch in ((0, 1), (1, 0)):
        assert not torch.equal(resnet_judge.augmented(pixels, seed, epoch, index), every[index])
    hidden = torch.isclose(every, resnet_judge._column(resnet_judge.MEAN)).all(1)
    assert hidden.sum((1, 2)).min() >= 16 and hidden.sum((1, 2)).max() == 64  # a corner of it, or all
    columns = [image.mean((0, 1)).argmax() for image in every]
    assert len({int(column) for column in columns}) > 5  # moved and mirrored


def test_the_second_is_trained_and_written_and_resumes_bit_for_bit(squares, tmp_path, monkeypatch):
    for name, value in {"BATCH_SIZE": 8, "CHECKPOINT_EVERY": 2}.items():
        monkeypatch.setattr(resnet_judge, name, value)
    settings = {"epochs": 2, "seed": 3, "peak_lr": 0.1}
    whole, _ = resnet_judge.train(*squares, **settings, run=tmp_path / "whole", resume=False)
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "step-000004").rename(tmp_path / "cut" / "step-000004")
    resumed, _ = resnet_judge.train(*squares, **settings, run=tmp_path / "cut", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    resnet_judge.write(whole, tmp_path / "judge")
    reader = open_classifier(tmp_path / "judge")
    images = squares[0].float() / 255
    with torch.no_grad():
        expected = whole.float()(pixel_values=resnet_judge.normalised(images)).logits
    torch.testing.assert_close(reader(images), expected, rtol=1e-3, atol=1e-3)
    accuracy = resnet_judge.class_accuracy(reader, *squares)
    assert accuracy["all"] == (expected.argmax(1) == squares[1]).double().mean().item()
    card = resnet_judge.card(accuracy, **settings, steps=6, minutes=0.1)
    assert card.data.eval_results[0].metric_value == round(accuracy["all"], 4)


def test_the_learning_rate_makes_one_cycle():
    factors = [resnet_judge.learning_rate_factor(done) for done in (0, resnet_judge.WARM_UP, 1)]
    assert factors == pytest.approx([0.1, 1, 0])


def test_mistakes_of_its_training_are_told_before_data_are_read(tmp_path, monkeypatch):
    for options, said in ((["--epochs", "0"], "--epochs 0"), (["--resume"], "no checkpoint there")):
        monkeypatch.setattr("sys.argv", ["resnet_judge.py", "--run", str(tmp_path), "--data", "nowhere", *options])
        with pytest.raises(resnet_judge.UserError, match=said):
            resnet_judge.main()


# ---- what both are asked for -----------------------------------------------------------------------------------------


def test_readings_of_both_judges_stand_side_by_side():
    labels = torch.arange(10).repeat_interleave(2)
    logits = torch.nn.functional.one_hot(labels, 10).float()
    logits[6] = torch.nn.functional.one_hot(torch.tensor(5), 10)  # a cat read as a dog
    wrong, right = (bundled_model.reading(some, labels) for some in (logits, torch.nn.functional.one_hot(labels)))
    assert wrong["accuracy"] == 0.95 and wrong["class_accuracy"]["cat"] == 0.5 and wrong["confusion"][3][5] == 1
    measured = {"frechet_distance": 6.0, "frechet_floor": 2.0, "frechet_ratio": 3.0, "nearest_ratio": 1.0}
    farther = measured | {"frechet_distance": 8.0, "frechet_ratio": 4.0}
    text = bundled_model.table({"images": 20, **wrong, **measured, "second_judge": right | farther})
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["cat"] == ["50.0%", "dog", "(1)", "100.0%"] and lines["all"][:2] == ["95.0%", "100.0%"]
    assert lines["Fréchet"][-2:] == ["6.000", "8.000"] and lines["in"][-2:] == ["3.000", "4.000"]


def test_distances_are_by_the_judge_whose_photographs_are_given():
    draw = torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(256, (60, 3, 32, 32), generator=draw, dtype=torch.uint8), torch.arange(60) % 10
    first = bundled_model.features_of(bundled_model.cifar10_classifier.load(), pixels, "")[1]
    second = bundled_model.second_features_of(pixels, "")
    by_first, by_second = (bundled_model.Photographs(found[:40], found[40:], labels[40:]) for found in (first, second))
    pictures = pixels[20:40].float() / 127.5 - 1
    report = bundled_model.judge(pictures, labels[20:40], by_first, by_second)
    assert report["frechet_distance"] == pytest.approx(frechet_distance(first[20:40], first[:40]), rel=1e-4)
    told = report["second_judge"]
    assert told["frechet_distance"] == pytest.approx(frechet_distance(second[20:40], second[:40]), rel=1e-4)
    alone = bundled_model.judge(pictures, labels[20:40], by_first)
    assert "frechet_distance" not in alone["second_judge"] and alone["frechet_ratio"] == report["frechet_ratio"]


def test_photographs_are_compared_once_however_many_pictures_are_judged(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    train, test = torch.rand(60, 8, generator=draw), torch.rand(40, 8, generator=draw)
    photographs = bundled_model.Photographs(train, test, torch.arange(40) % 10)
    counts = torch.full((10,), 2)
    subset = bundled_model.floor_subset(photographs.test_labels, counts, 3)
    assert photographs.floors(counts)[3].item() == pytest.approx(frechet_distance(test[subset], train), rel=1e-6)
    assert photographs.median_nearest == nearest(test, train)[0].median().item()
    others = photographs.floors(torch.full((10,), 3))
    assert not torch.equal(others, photographs.floors(counts))
    for name in ("nearest", "frechet_distance", "gaussian_of"):
        monkeypatch.setattr(bundled_model, name, None)  # of which nothing is asked again
    assert torch.equal(photographs.floors(counts + 1), others) and photographs.median_nearest > 0
