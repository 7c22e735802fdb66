"""A small convolutional classifier, trained on the data set, whose features replace those of Inception.

Legend: N images, B batch, H height, W width, C channels, K classes, F features.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from scmdm.errors import UserError
from scmdm.models.safetensors_headers import read_header, require_finite_all
from scmdm.system.files import atomic_write_bytes
from scmdm.system.untrusted import parse_json, reading

FEATURES = 64
_BATCH, _STEPS, _EPOCHS, _LR = 128, 400, 6, 3e-3
_FORWARD_BATCH = 1024
_REMEDY = "remove it to train the classifier again"


@dataclass(frozen=True)
class ClassifierKey:
    """Everything that a trained classifier depends on."""

    fingerprint: str  # of the data set
    channels: int
    classes: int
    seed: int
    version: int = 1  # of the training code below

    def file(self, work: Path) -> Path:
        """Path of the cached classifier."""
        return work / f"classifier-{self.fingerprint[:12]}-{self.seed}.safetensors"


class Classifier(nn.Module):
    """Three convolutions, global average pooling and a linear layer; accepts images of any size."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_layer(channels, 16, stride=1),
            *_layer(16, 32, stride=2),
            *_layer(32, FEATURES, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features (B, F) and logits (B, K) of uint8 images."""
        features_BF = self.trunk(images_BHWC.movedim(3, 1).float() / 127.5 - 1)
        return features_BF, self.head(features_BF)


def _layer(channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out_channels, 3, stride, 1), nn.GroupNorm(8, out_channels), nn.SiLU()


def trained_classifier(
    images_NHWC: np.ndarray, labels_N: np.ndarray, key: ClassifierKey, work: Path, *, device: str = "cpu"
) -> Classifier:
    """Load the classifier from `work`, or train and cache it. Training is deterministic given the seed.

    Raises UserError if the cached file is damaged.
    """
    path = key.file(work)
    if path.is_file():
        return _read(path, key).to(device)
    classifier = train_classifier(images_NHWC, labels_N, key, device=device)
    work.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous().cpu() for name, value in classifier.state_dict().items()}
    atomic_write_bytes(path, to_safetensors(weights, metadata={"key": json.dumps(asdict(key))}))
    return classifier


def train_classifier(
    images_NHWC: np.ndarray, labels_N: np.ndarray, key: ClassifierKey, *, device: str = "cpu"
) -> Classifier:
    """Train on uint8 images with AdamW and a one-cycle learning rate, `_EPOCHS` epochs but at least `_STEPS` steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key.seed)
        classifier = Classifier(key.channels, key.classes).to(device)
    steps = max(_STEPS, _EPOCHS * len(labels_N) // _BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps)
    generator = np.random.default_rng(key.seed)
    for _ in range(steps):
        rows_B = generator.integers(0, len(labels_N), _BATCH)
        _, logits_BK = classifier(torch.from_numpy(images_NHWC[rows_B]).to(device))
        loss = F.cross_entropy(logits_BK, torch.from_numpy(labels_N[rows_B].astype(np.int64)).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def classify(classifier: Classifier, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute features (N, F) and predicted classes (N,) of uint8 images."""
    device = next(classifier.parameters()).device
    features, classes = [], []
    with torch.no_grad():
        for images in torch.from_numpy(images_NHWC).split(_FORWARD_BATCH):
            features_BF, logits_BK = classifier(images.to(device))
            features.append(features_BF.cpu().numpy())
            classes.append(logits_BK.argmax(1).cpu().numpy())
    return np.concatenate(features), np.concatenate(classes)


def _read(path: Path, key: ClassifierKey) -> Classifier:
    classifier, header = Classifier(key.channels, key.classes), read_header(path)
    with reading(path, "classifier", _REMEDY):
        stored = parse_json(header.metadata["key"])
        classifier.load_state_dict(load_file(path))
    require_finite_all(classifier.named_parameters(), path)
    if stored != asdict(key):
        raise UserError(f"{path} belongs to another data set or version ({str(stored)[:200]}); {_REMEDY}")
    return classifier.eval()
