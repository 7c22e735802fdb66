"""Quality of generated pictures: Frechet distances, Inception Score, copies of training pictures.

FID needs a network that is not shipped (see inception.py). Without it the Frechet distance is taken in the features of
a small classifier that is trained here on the data set itself: that is *not* FID, and comparable only between models of
the same data set. It is called `frechet_classifier`, and stands beside its classifier's accuracy and beside the
distance that as many training pictures have. The classifier knows those: new pictures as good may come below them.

Legend: N pictures, M other pictures, L length, H height, W width, C channels, K classes, D values of a picture.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.utils import save_image

from scmdm.data.loader import read_labels, read_split, spread_rows
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import LevelTokenizer, load_tokenizer
from scmdm.domains.frechet import Moments, frechet_distance
from scmdm.domains.images.classifier import Classifier, ClassifierKey, classify, trained_classifier
from scmdm.domains.images.inception import PROTOCOL, PROTOCOL_SAMPLES, activations, load_inception
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_bytes

COMPARED = 1024  # pictures whose nearest training pictures are looked for: each costs a pass over all of those
MEMORISED = 1 / 3  # Yoon et al. 2023: so much nearer to one training picture than to the second nearest
_CHUNK = 128
_FLOOR_DRAWS = 8  # sets of training pictures whose distances are averaged: those of small sets scatter


@dataclass(frozen=True)
class ImageMetrics:
    """Of `num_samples` samples, all of them: what is not framed counts as the picture that it shows."""

    num_samples: int
    num_framed: int  # [BOS] and as many levels as a picture has; else there is black where no level is
    num_distinct: int
    num_copies: int  # equal to a training picture, value by value
    num_compared: int  # those whose nearest training pictures were looked for: the first
    num_memorised: int  # of those, at less than a third of the distance of the second nearest
    nearest_distance: float  # median of the root-mean-square distance to the nearest training picture; black-white is 1
    nearest_distance_held_out: float  # the same of held-out pictures: much below it is copying
    frechet_classifier: float | None = None  # not FID
    frechet_classifier_floor: float | None = None  # the same of as many training pictures
    classifier_accuracy: float | None = None  # of the classifier on the held-out pictures
    class_distance: float | None = None  # total variation between the classes of samples and of held-out pictures
    fid: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None  # over ten parts of the samples
    fid_note: str | None = None  # what `fid` was measured on, or why it is None

    def as_dict(self) -> dict[str, Any]:
        """Everything, the ratios too."""
        return {
            **asdict(self),
            "framed": self.num_framed / self.num_samples,
            "distinct": self.num_distinct / self.num_samples,
            "copies": self.num_copies / self.num_samples,
            "memorised": self.num_memorised / self.num_compared,
        }


@dataclass(frozen=True)
class ImageReference:
    """What samples are compared with; make it once for many evaluations."""

    tokenizer: LevelTokenizer
    train_NHWC: np.ndarray  # distinct ones, mirror images included: what a model may have learnt by heart
    originals_NHWC: np.ndarray  # of the training split, without mirror images
    train_digests: frozenset[bytes]
    nearest_distance_held_out: float
    features: ClassFeatures | None  # None: the data set has no labels
    inception: InceptionReference | None

    @classmethod
    def make(
        cls, root: Path, split: str, *, work: Path, inception: Path | None = None, seed: int = 0, device: str = "cpu"
    ) -> ImageReference:
        """Of the data set at `root`, `split` being what samples are measured against.

        The classifier is kept in `work`. `inception`: Inception's weights, for FID. Raises UserError when the data set
        holds no pictures, or when a file cannot be used.
        """
        manifest = Manifest.read(root)
        tokenizer = picture_tokenizer(root)
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
    """A classifier of the data set, and the held-out pictures in its features."""

    classifier: Classifier
    accuracy: float
    moments: Moments
    train_NF: np.ndarray  # features of the training split's originals
    classes_K: np.ndarray  # shares of the classes that it gives the held-out pictures

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
        """From `work`, or trained now."""
        key = ClassifierKey(manifest.fingerprint(), train_NHWC.shape[3], len(manifest.labels), seed)
        classifier = trained_classifier(train_NHWC, read_labels(root, "train"), key, work, device=device)
        train_NF, _ = classify(classifier, train_NHWC[:: mirror_step(manifest)])
        features_NF, classes_N = classify(classifier, held_out_NHWC)
        accuracy = float((classes_N == read_labels(root, split)).mean())
        return cls(classifier, accuracy, Moments.of(features_NF), train_NF, _shares(classes_N, key.classes))

    def distance(self, pictures_NHWC: np.ndarray) -> tuple[float, float]:
        """Frechet distance of pictures to the held-out ones, and total variation distance of their classes."""
        features_NF, classes_N = classify(self.classifier, pictures_NHWC)
        gap_K = _shares(classes_N, len(self.classes_K)) - self.classes_K
        return frechet_distance(Moments.of(features_NF), self.moments), float(np.abs(gap_K).sum() / 2)

    def floor(self, number: int) -> float:
        """Frechet distance of so many training pictures (all, if there are not so many), a mean over fixed draws.

        As many as the samples: the distance of few pictures is biased upwards.
        """
        dice, number = np.random.default_rng(0), min(number, len(self.train_NF))
        draws = (dice.choice(len(self.train_NF), number, replace=False) for _ in range(_FLOOR_DRAWS))
        return float(np.mean([frechet_distance(Moments.of(self.train_NF[rows]), self.moments) for rows in draws]))


@dataclass(frozen=True)
class InceptionReference:
    """Inception, and all training pictures in its features: the validation split came out of them."""

    network: Any
    moments: Moments
    pictures: int

    @classmethod
    def make(
        cls, root: Path, tokenizer: LevelTokenizer, originals_NHWC: np.ndarray, weights: Path, device: str
    ) -> InceptionReference:
        """Raises UserError when `weights` cannot be used."""
        network = load_inception(weights, device)
        both = np.concatenate([originals_NHWC, tokenizer.pictures(read_split(root, "validation"))])
        return cls(network, activations(network, both).moments, len(both))

    def measure(self, pictures_NHWC: np.ndarray) -> dict[str, Any]:
        """The fields of ImageMetrics that Inception gives."""
        found = activations(self.network, pictures_NHWC)
        note = f"{len(pictures_NHWC):,} samples against {self.pictures:,} training and validation pictures"
        published = "" if len(pictures_NHWC) >= PROTOCOL_SAMPLES else f"; not comparable with the published {PROTOCOL}"
        return {
            "fid": frechet_distance(found.moments, self.moments),
            "inception_score": found.score,
            "inception_score_std": found.score_std,
            "fid_note": note + published,
        }


def picture_tokenizer(root: Path) -> LevelTokenizer:
    """The tokenizer of a data set of pictures; UserError when it holds something else."""
    found = load_tokenizer(root / Manifest.read(root).tokenizer.file)
    if not isinstance(found, LevelTokenizer) or found.kind != "levels":
        raise UserError(f"{root} holds {found.kind}, not pictures; give a data set with tokenizer=levels")
    return found


def mirror_step(manifest: Manifest) -> int:
    """2 when every second record of the training split is the mirror image of the one before, else 1."""
    return 2 if manifest.source.get("options", {}).get("flips", False) else 1


def evaluate_images(ids_NL: np.ndarray, reference: ImageReference) -> ImageMetrics:
    """All metrics of generated ids, two samples or more. Raises UserError for sequences that are no pictures."""
    if len(ids_NL) < 2:
        raise UserError(f"num={len(ids_NL)} is not possible; the distances of pictures need 2 samples or more")
    tokenizer = reference.tokenizer
    pictures_NHWC, digests = tokenizer.pictures(ids_NL), _digests(tokenizer.pictures(ids_NL))
    compared = pictures_NHWC[:COMPARED]
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
        **_in_classes(pictures_NHWC, reference),
        **(reference.inception.measure(pictures_NHWC) if reference.inception else {"fid_note": "no inception=FILE"}),
    )


def _in_classes(pictures_NHWC: np.ndarray, reference: ImageReference) -> dict[str, Any]:
    if reference.features is None:
        return {}
    distance, class_distance = reference.features.distance(pictures_NHWC)
    return {
        "frechet_classifier": distance,
        "frechet_classifier_floor": reference.features.floor(len(pictures_NHWC)),
        "classifier_accuracy": reference.features.accuracy,
        "class_distance": class_distance,
    }


def _device_of(reference: ImageReference) -> str:
    return str(next(reference.features.classifier.parameters()).device) if reference.features else "cpu"


def nearest_distances(pictures_NHWC: np.ndarray, others_MHWC: np.ndarray, *, device: str = "cpu") -> np.ndarray:
    """Root-mean-square distances (N, 2) to the nearest and the second nearest of the others; black to white is 1.

    With fewer than two others what is missing is infinitely far.
    """
    others_MD = _flat(others_MHWC).to(device)
    found = []
    for chunk in _flat(pictures_NHWC).to(device).split(_CHUNK):
        # By matrix products, which are not exact for near pictures: those two are measured again.
        rows = torch.cdist(chunk, others_MD).topk(min(2, len(others_MD)), largest=False).indices
        exact = (others_MD[rows] - chunk[:, None]).square().mean(2).sqrt().sort(1).values
        found.append(torch.nn.functional.pad(exact, (0, 2 - exact.shape[1]), value=float("inf")).cpu().numpy())
    return np.concatenate(found)


def _flat(pictures_NHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures_NHWC.reshape(len(pictures_NHWC), -1)).float() / 255


def _digests(pictures_NHWC: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(picture.tobytes(), digest_size=16).digest() for picture in pictures_NHWC]


def _shares(classes_N: np.ndarray, classes: int) -> np.ndarray:
    shares_K: np.ndarray = np.bincount(classes_N, minlength=classes) / len(classes_N)
    return shares_K


def draw_pictures(
    pictures_NHWC: np.ndarray | Sequence[np.ndarray], path: Path, *, columns: int = 16, rows: int = 4, cell: int = 64
) -> int:
    """Draw the first uint8 pictures, enlarged to about `cell` pixels, as a PNG; returns how many were drawn."""
    shown = torch.from_numpy(np.stack(list(pictures_NHWC[: columns * rows]))).movedim(3, 1)
    times = max(1, cell // max(shown.shape[2:]))
    large = shown.repeat_interleave(times, 2).repeat_interleave(times, 3)
    buffer = io.BytesIO()
    save_image(large / 255, buffer, format="png", nrow=columns, padding=2, pad_value=0.5)
    atomic_write_bytes(path, buffer.getvalue())
    return len(shown)
