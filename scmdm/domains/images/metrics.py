"""Metrics of generated images: Frechet distances, Inception Score, copies of training images.

FID needs a network that scmdm does not contain (see inception.py). Without it, `frechet_classifier` is computed in the
features of a small classifier trained on the data set itself. It is *not* FID and is comparable only between models of
one data set. It is reported with the classifier's accuracy and the distance of an equal number of training images;
the classifier was trained on those, so unseen images of the same quality can have a larger distance.

Legend: N images, M other images, L sequence length, H height, W width, C channels, K classes, D values of an image.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
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
from scmdm.domains.sample_values import SampleValues
from scmdm.errors import UserError

COMPARED = 1024  # images whose nearest training images are searched; each search reads the whole training split
MEMORISED = 1 / 3  # largest ratio of nearest to second nearest distance of a memorised image (Yoon et al. 2023)
_CHUNK = 128
_FLOOR_DRAWS = 8  # random sets of training images that the floor averages over


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of all samples; a sample that is not framed counts as the image that it decodes to."""

    num_samples: int
    num_framed: int  # samples of [BOS] and levels only; positions without a level are decoded as black
    num_distinct: int
    num_copies: int  # samples equal to a training image
    num_compared: int  # first samples, for which the nearest training images were searched
    num_memorised: int  # compared samples much nearer to one training image than to any other: see MEMORISED
    nearest_distance: float  # median root-mean-square distance to the nearest training image; black to white is 1
    nearest_distance_held_out: float  # the same for held-out images; a much smaller value indicates copying
    frechet_classifier: float | None = None  # not FID
    frechet_classifier_floor: float | None = None  # distance of an equal number of training images
    classifier_accuracy: float | None = None  # on held-out images
    class_distance: float | None = None  # total variation distance of the class distributions
    fid: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None  # over ten parts of the samples
    fid_note: str | None = None  # sizes of the compared sets, or the reason why `fid` is None

    def as_dict(self) -> dict[str, Any]:
        """All fields, and the fractions of framed, distinct, copied and memorised samples."""
        return {
            **asdict(self),
            "framed": self.num_framed / self.num_samples,
            "distinct": self.num_distinct / self.num_samples,
            "copies": self.num_copies / self.num_samples,
            "memorised": self.num_memorised / self.num_compared,
        }


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
        cls, root: Path, split: str, *, work: Path, inception: Path | None = None, seed: int = 0, device: str = "cpu"
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
            ClassFeatures.make(root, split, manifest, train_NHWC, held_out_NHWC, work, seed, device)
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
        seed: int,
        device: str,
    ) -> ClassFeatures:
        """Load the classifier from `work`, or train it."""
        key = ClassifierKey(manifest.fingerprint(), train_NHWC.shape[3], len(manifest.labels), seed)
        classifier = trained_classifier(train_NHWC, read_labels(root, "train"), key, work, device=device)
        train_NF, _ = classify(classifier, train_NHWC[:: mirror_step(manifest)])
        features_NF, classes_N = classify(classifier, held_out_NHWC)
        accuracy = float((classes_N == read_labels(root, split)).mean())
        return cls(classifier, accuracy, Moments.of(features_NF), train_NF, _shares(classes_N, key.classes))

    def distance(self, images_NHWC: np.ndarray) -> tuple[float, float]:
        """Compute Frechet distance and total variation distance of classes, both to the held-out images."""
        features_NF, classes_N = classify(self.classifier, images_NHWC)
        gap_K = _shares(classes_N, len(self.classes_K)) - self.classes_K
        return frechet_distance(Moments.of(features_NF), self.moments), float(np.abs(gap_K).sum() / 2)

    def values(self, images_NHWC: np.ndarray) -> dict[str, SampleValues]:
        """Values for intervals of both distances."""
        features_NF, classes_N = classify(self.classifier, images_NHWC)
        features_NF = features_NF.astype(np.float64)

        def frechet(counts_N: np.ndarray) -> float:
            weighted_NF = features_NF * counts_N[:, None]
            moments = Moments(int(counts_N.sum()), weighted_NF.sum(0), weighted_NF.T @ features_NF)
            return frechet_distance(moments, self.moments)

        def classes(counts_N: np.ndarray) -> float:
            shares_K = np.bincount(classes_N, counts_N, len(self.classes_K)) / counts_N.sum()
            return float(np.abs(shares_K - self.classes_K).sum() / 2)

        return {
            "frechet_classifier": SampleValues.jackknife(frechet, len(images_NHWC)),
            "class_distance": SampleValues.jackknife(classes, len(images_NHWC)),
        }

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
        """Compute the fields of ImageMetrics that need Inception."""
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


def evaluate_images(ids_NL: np.ndarray, reference: ImageReference) -> ImageMetrics:
    """Compute all metrics of generated ids (N, L). Raises UserError for fewer than two samples."""
    if len(ids_NL) < 2:
        raise UserError(f"num={len(ids_NL)} is not possible; distances of images need at least 2 samples")
    tokenizer = reference.tokenizer
    images_NHWC, digests = tokenizer.pictures(ids_NL), _digests(tokenizer.pictures(ids_NL))
    compared = images_NHWC[:COMPARED]
    nearest_N2 = nearest_distances(compared, reference.train_NHWC, device=_device_of(reference))
    return ImageMetrics(
        num_samples=len(ids_NL),
        num_framed=sum(map(tokenizer.is_framed, ids_NL.tolist())),
        num_distinct=len(set(digests)),
        num_copies=sum(digest in reference.train_digests for digest in digests),
        num_compared=len(compared),
        num_memorised=int((nearest_N2[:, 0] < MEMORISED * nearest_N2[:, 1]).sum()),
        nearest_distance=float(np.median(nearest_N2[:, 0])),
        nearest_distance_held_out=reference.nearest_distance_held_out,
        **_in_classes(images_NHWC, reference),
        **(
            reference.inception.measure(images_NHWC)
            if reference.inception
            else {"fid_note": "metrics.inception is not set"}
        ),
    )


def image_values(ids_NL: np.ndarray, reference: ImageReference) -> dict[str, SampleValues]:
    """Values for intervals of the fractions and of distances in the classifier's features. FID has none."""
    images_NHWC = reference.tokenizer.pictures(ids_NL)
    return {
        "framed": SampleValues.mean([reference.tokenizer.is_framed(row) for row in ids_NL.tolist()]),
        "copies": SampleValues.mean([digest in reference.train_digests for digest in _digests(images_NHWC)]),
        **(reference.features.values(images_NHWC) if reference.features else {}),
    }


def _in_classes(images_NHWC: np.ndarray, reference: ImageReference) -> dict[str, Any]:
    if reference.features is None:
        return {}
    distance, class_distance = reference.features.distance(images_NHWC)
    return {
        "frechet_classifier": distance,
        "frechet_classifier_floor": reference.features.floor(len(images_NHWC)),
        "classifier_accuracy": reference.features.accuracy,
        "class_distance": class_distance,
    }


def _device_of(reference: ImageReference) -> str:
    return str(next(reference.features.classifier.parameters()).device) if reference.features else "cpu"


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
