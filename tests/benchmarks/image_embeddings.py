"""What a CLIP's image embedding tells of a photograph: its class, and where its light and colours are.

    python tests/benchmarks/image_embeddings.py --clip RUN --data FOLDER

Both are read linearly from embeddings of test photographs, after fitting on training photographs. Captions name the
class alone; what an embedding tells beyond it, a U-Net that is given the embedding need not invent.
"""

import json
import sys
from pathlib import Path

import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cifar10_classifier import CLASSES, HUB, read_split
from ldm.errors import exit_code_of
from ldm.evaluation.features import open_features
from pipelines.arguments import ArgumentParser

FITTED, TESTED = 10_000, 10_000  # photographs
THUMBNAIL = 8  # pixels a side


def told_by(clip: str | Path, source: str) -> dict[str, float]:
    """Of the CLIP run `clip` and CIFAR-10 in `source`: `class_accuracy`, of a linear classifier; and `layout_r2`, the
    part of the variance of test photographs, shrunk to 8×8 pixels, that a linear map of the embedding explains, beside
    `layout_r2_of_class`, what the class alone explains. All at most 1."""
    network, read = open_features(clip), {}
    for split, number in (("train", FITTED), ("test", TESTED)):
        pixels, labels = read_split(source, split)
        images, labels = pixels[:number].float() / 255, labels[:number]
        thumbnails = F.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)
        classes = F.one_hot(labels, len(CLASSES)).float()
        read[split] = [part.numpy() for part in (network(images), labels, thumbnails, classes)]
    (embeddings, labels, thumbnails, classes), (seen, asked, looked, known) = read["train"], read["test"]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(embeddings, labels)
    mapped = make_pipeline(StandardScaler(), Ridge()).fit(embeddings, thumbnails).predict(seen)
    of_class = Ridge().fit(classes, thumbnails).predict(known)
    return {
        "class_accuracy": float(probe.score(seen, asked)),
        "layout_r2": float(r2_score(looked, mapped, multioutput="variance_weighted")),
        "layout_r2_of_class": float(r2_score(looked, of_class, multioutput="variance_weighted")),
    }


def main() -> None:
    parser = ArgumentParser(description="Read the class and the layout of photographs from a CLIP's image embeddings.")
    parser.add_argument("--clip", required=True, metavar="RUN", help="finished run of train_clip.py")
    parser.add_argument("--data", default=HUB, help="folder with {train,test}.parquet of CIFAR-10")
    arguments = parser.parse_args()
    print(json.dumps(told_by(arguments.clip, arguments.data), indent=2))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
