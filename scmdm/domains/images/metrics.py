"""Metrics of generated images: Frechet distances, Inception Score, copies of training images.

FID needs a network that scmdm does not contain (see inception.py). Without it, `frechet_classifier` is computed in the
features of a small classifier trained on the data set itself. It is *not* FID and is comparable only between models of
one data set. It is reported with the classifier's accuracy and the distance of an equal number of training images;
the classifier was trained on those, so unseen images of the same quality can have a larger distance.

Legend: N images, M other images, L sequence length, H height, W width, C channels, K classes, D values of an image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmdm.data.loader import read_labels, read_split, spread_rows
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import LevelTokenizer, load_tokenizer
from scmdm.domains.frechet import Moments, frechet_distance
from scmdm.domains.images.classifier import Classifier, ClassifierKey, classify, trained_classifier
from scmdm.domains.images.inception import PROTOCOL, PROTOCOL_SAMPLES, activations, load_inception
from scmdm.domains.interface import Measured
from scmdm.domains.sample_values import SampleValues
from scmdm.errors import UserError

COMPARED = 1024  # images whose nearest training images are searched; each search reads the whole training split
MEMORISED = 1 / 3  # largest ratio of nearest to second nearest distance of a memorised image (Yoon et al. 2023)
_CHUNK = 128
_FLOOR_DRAWS = 8  # random sets of training images that the floor averages over


@dataclass(frozen=True)
class ImageReference:
    """Training and held-out images and their features. Make it once for many evaluations."""

    tokenizer: LevelTokenizer
    train_NHWC: np.ndarray  # distinct training images, mirror images included
    originals_NHWC: np.ndarray  # training images without mirror images
    train_digests: frozenset[bytes]
    nearest_distance_held_out: float
    features: ClassFeatures | None  # None if the data set has no labels
    inception: InceptionReference | None

    @classmethod
    def make(
        cls, root: Path, split: str, *, work: Path, inception: Path | None = None, device: str = "cpu"
    ) -> ImageReference:
        """Read the data set at `root`; samples are compared with `split`.

        `work` is the directory in which the classifier is cached, `inception` a file of Inception's weights for FID.
        Raises UserError if the data set contains no images, or if a file cannot be used.
        """
        manifest = Manifest.read(root)
        tokenizer = image_tokenizer(root)
        train_NHWC, held_out_NHWC = (tokenizer.pictures(read_split(root, name)) for name in ("train", split))
        originals_NHWC = train_NHWC[:: mirror_step(manifest)]
        digests = _digests(train_NHWC)
        first = list({digest: row for row, digest in reversed(list(enumerate(digests)))}.values())
        distinct_NHWC = train_NHWC[sorted(first)]
        compared = held_out_NHWC[spread_rows(len(held_out_NHWC), COMPARED)]
        return cls(
            tokenizer,
            distinct_NHWC,
            originals_NHWC,
            frozenset(digests),
            float(np.median(nearest_distances(compared, distinct_NHWC, device=device)[:, 0])),
            ClassFeatures.make(root, split, manifest, train_NHWC, held_out_NHWC, work, device)
            if manifest.labels
            else None,
            InceptionReference.make(root, tokenizer, originals_NHWC, inception, device) if inception else None,
        )


@dataclass(frozen=True)
class ClassFeatures:
    """A classifier of the data set, and its features of training and held-out images."""

    classifier: Classifier
    accuracy: float
    moments: Moments  # of held-out images
    train_NF: np.ndarray  # features of training images without mirror images
    classes_K: np.ndarray  # distribution of the predicted classes of held-out images

    @classmethod
    def make(
        cls,
        root: Path,
        split: str,
        manifest: Manifest,
        train_NHWC: np.ndarray,
        held_out_NHWC: np.ndarray,
        work: Path,
        device: str,
    ) -> ClassFeatures:
        """Load the classifier from `work`, or train it."""
        key = ClassifierKey(manifest.fingerprint(), train_NHWC.shape[3], len(manifest.labels), seed=0)
        classifier = trained_classifier(train_NHWC, read_labels(root, "train"), key, work, device=device)
        train_NF, _ = classify(classifier, train_NHWC[:: mirror_step(manifest)])
        features_NF, classes_N = classify(classifier, held_out_NHWC)
        accuracy = float((classes_N == read_labels(root, split)).mean())
        return cls(classifier, accuracy, Moments.of(features_NF), train_NF, _shares(classes_N, key.classes))

    def measure(self, images_NHWC: np.ndarray) -> Measured:
        """Compute Frechet distance and total variation distance of classes, both to the held-out images."""
        features_NF, classes_N = classify(self.classifier, images_NHWC)
        exact_NF, count = features_NF.astype(np.float64), len(images_NHWC)

        def frechet(counts_N: np.ndarray) -> float:
            weighted_NF = exact_NF * counts_N[:, None]
            moments = Moments(int(counts_N.sum()), weighted_NF.sum(0), weighted_NF.T @ exact_NF)
            return frechet_distance(moments, self.moments)

        def classes(counts_N: np.ndarray) -> float:
            shares_K = np.bincount(classes_N, counts_N, len(self.classes_K)) / counts_N.sum()
            return float(np.abs(shares_K - self.classes_K).sum() / 2)

        metrics = {
            "frechet_classifier": frechet_distance(Moments.of(features_NF), self.moments),  # not FID
            "frechet_classifier_floor": self.floor(count),  # distance of an equal number of training images
            "classifier_accuracy": self.accuracy,  # on held-out images
            "class_distance": classes(np.ones(count)),
        }
        distances = {"frechet_classifier": frechet, "class_distance": classes}
        return Measured(metrics, {name: SampleValues.jackknife(of, count) for name, of in distances.items()})

    def floor(self, number: int) -> float:
        """Mean Frechet distance of `number` random training images (at most all), over fixed draws.

        The distance of a small set is biased upwards, so `number` must be the number of samples.
        """
        generator, number = np.random.default_rng(0), min(number, len(self.train_NF))
        draws = (generator.choice(len(self.train_NF), number, replace=False) for _ in range(_FLOOR_DRAWS))
        return float(np.mean([frechet_distance(Moments.of(self.train_NF[rows]), self.moments) for rows in draws]))


@dataclass(frozen=True)
class InceptionReference:
    """Inception, and the moments of training and validation images in its features."""

    network: Any
    moments: Moments
    num_images: int

    @classmethod
    def make(
        cls, root: Path, tokenizer: LevelTokenizer, originals_NHWC: np.ndarray, weights: Path, device: str
    ) -> InceptionReference:
        """Load Inception. Raises UserError if the file `weights` cannot be used."""
        network = load_inception(weights, device)
        has_validation = "validation" in Manifest.read(root).splits
        held_out = [tokenizer.pictures(read_split(root, "validation"))] if has_validation else []
        both = np.concatenate([originals_NHWC, *held_out])
        return cls(network, activations(network, both).moments, len(both))

    def measure(self, images_NHWC: np.ndarray) -> dict[str, Any]:
        """Compute the metrics that need Inception; `fid_note` gives the sizes of the compared sets."""
        found = activations(self.network, images_NHWC)
        note = f"{len(images_NHWC):,} samples against {self.num_images:,} training and validation images"
        published = "" if len(images_NHWC) >= PROTOCOL_SAMPLES else f"; not comparable with the published {PROTOCOL}"
        return {
            "fid": frechet_distance(found.moments, self.moments),
            "inception_score": found.score,
            "inception_score_std": found.score_std,
            "fid_note": note + published,
        }


def image_tokenizer(root: Path) -> LevelTokenizer:
    """Load the tokenizer of a data set of images. Raises UserError for any other data set."""
    found = load_tokenizer(root / Manifest.read(root).tokenizer.file)
    if not isinstance(found, LevelTokenizer) or found.kind != "levels":
        raise UserError(f"{root} has the tokenizer {found.kind}, not levels; give a data set of images")
    return found


def mirror_step(manifest: Manifest) -> int:
    """2 if every second training record is the mirror image of the record before it, else 1."""
    return 2 if manifest.source.get("options", {}).get("flips", False) else 1


def measure_images(ids_NL: np.ndarray, reference: ImageReference) -> Measured:
    """Compute all metrics of generated ids (N, L), and the values for intervals; FID has none.

    A sample that is not framed counts as the image that it decodes to: positions without a level are black. Raises
    UserError for fewer than two samples.
    """
    if len(ids_NL) < 2:
        raise UserError(f"num={len(ids_NL)} is not possible; distances of images need at least 2 samples")
    images_NHWC = reference.tokenizer.pictures(ids_NL)
    framed, digests = [reference.tokenizer.is_framed(row) for row in ids_NL.tolist()], _digests(images_NHWC)
    compared = images_NHWC[:COMPARED]
    device = next(reference.features.classifier.parameters()).device if reference.features else "cpu"
    nearest_N2 = nearest_distances(compared, reference.train_NHWC, device=str(device))
    memorised = int((nearest_N2[:, 0] < MEMORISED * nearest_N2[:, 1]).sum())
    values = {
        "framed": SampleValues.mean(framed),
        "copies": SampleValues.mean([digest in reference.train_digests for digest in digests]),
    }
    by_classes = reference.features.measure(images_NHWC) if reference.features else _NO_CLASSES
    by_inception = reference.inception.measure(images_NHWC) if reference.inception else _NO_INCEPTION
    metrics = {
        "num_samples": len(ids_NL),
        "num_framed": sum(framed),
        "num_distinct": len(set(digests)),
        "num_copies": int(values["copies"].array.sum()),  # samples equal to a training image
        "num_compared": len(compared),  # first samples, for which the nearest training images were searched
        "num_memorised": memorised,  # compared samples much nearer to one training image than to any other
        # Median root-mean-square distances to the nearest training image. Black to white is 1. Samples that are much
        # nearer than held-out images indicate copying.
        "nearest_distance": float(np.median(nearest_N2[:, 0])),
        "nearest_distance_held_out": reference.nearest_distance_held_out,
        **by_classes.metrics,
        **by_inception,
        "framed": values["framed"].value(),
        "distinct": len(set(digests)) / len(ids_NL),
        "copies": values["copies"].value(),
        "memorised": memorised / len(compared),
    }
    return Measured(metrics, values | by_classes.values)


_NO_CLASSES = Measured(
    dict.fromkeys(("frechet_classifier", "frechet_classifier_floor", "classifier_accuracy", "class_distance"))
)
_NO_INCEPTION = dict.fromkeys(("fid", "inception_score", "inception_score_std", "fid_note"))


def nearest_distances(images_NHWC: np.ndarray, others_MHWC: np.ndarray, *, device: str = "cpu") -> np.ndarray:
    """Compute root-mean-square distances (N, 2) to the nearest two of the others; black to white is 1.

    With fewer than two others, the missing distances are infinite.
    """
    others_MD = _flat(others_MHWC).to(device)
    found = []
    for chunk in _flat(images_NHWC).to(device).split(_CHUNK):
        # cdist uses matrix products, which are inexact for close images, so recompute the two distances.
        rows = torch.cdist(chunk, others_MD).topk(min(2, len(others_MD)), largest=False).indices
        exact = (others_MD[rows] - chunk[:, None]).square().mean(2).sqrt().sort(1).values
        found.append(torch.nn.functional.pad(exact, (0, 2 - exact.shape[1]), value=float("inf")).cpu().numpy())
    return np.concatenate(found)


def _flat(images_NHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images_NHWC.reshape(len(images_NHWC), -1)).float() / 255


def _digests(images_NHWC: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images_NHWC]


def _shares(classes_N: np.ndarray, classes: int) -> np.ndarray:
    shares_K: np.ndarray = np.bincount(classes_N, minlength=classes) / len(classes_N)
    return shares_K
