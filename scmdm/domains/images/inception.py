"""FID and Inception Score, computed with torch-fidelity and a local file of Inception's weights.

Nothing is downloaded, and no code in the file is run. The file is torch-fidelity's
`weights-inception-2015-12-05-6726825d.pth`, the original network of FID that published values use.

Legend: N images, H height, W width, C channels.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmdm.domains.frechet import Moments
from scmdm.errors import UserError
from scmdm.models.safetensors_headers import require_finite_all
from scmdm.models.torch_archives import check_archive
from scmdm.system.package_data import optional, package_folder
from scmdm.system.untrusted import reading

PROTOCOL = "50,000 samples at T = 128 against all training images"  # of published values on CIFAR-10
PROTOCOL_SAMPLES = 50_000
_BATCH = 64
_COUNTER = "num_batches_tracked"  # the only tensors that are not weights
_FEATURES, _LOGITS = "2048", "logits_unbiased"


@dataclass(frozen=True)
class Activations:
    """Moments of Inception's features of a set of images, and its Inception Score."""

    moments: Moments
    score: float  # mean over ten parts
    score_std: float


def check_inception(weights: Path) -> None:
    """Raise UserError if the file or the package that FID needs is missing."""
    package_folder("torch_fidelity", f"metrics.inception={weights}", "images")
    if not weights.is_file():
        raise UserError(
            f"metrics.inception={weights} does not exist; give weights-inception-2015-12-05-6726825d.pth of "
            "torch-fidelity, or leave the key out and use frechet_classifier"
        )


def load_inception(weights: Path, device: str = "cpu") -> Any:
    """Load torch-fidelity's Inception. Raises UserError if the file does not contain its weights."""
    check_inception(weights)
    inception = optional("torch_fidelity.feature_extractor_inceptionv3", f"metrics.inception={weights}", "images")
    what = f"metrics.inception={weights}"
    remedy = "give weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
    if zipfile.is_zipfile(weights):
        check_archive(weights, "file of Inception's weights", remedy)
    with reading(what, "file of Inception's weights", remedy):
        state = torch.load(weights, map_location="cpu", weights_only=True)
        require_finite_all(((name, value) for name, value in state.items() if not name.endswith(_COUNTER)), what)
        # torch-fidelity unpickles the whole file, so pass it a copy that contains only tensors.
        tensors = io.BytesIO()
        torch.save({name: torch.as_tensor(value) for name, value in state.items()}, tensors)
        tensors.seek(0)
        network = inception.FeatureExtractorInceptionV3("inception", [_FEATURES, _LOGITS], tensors)
    return network.to(device)


def activations(network: Any, images_NHWC: np.ndarray) -> Activations:
    """Compute moments of the 2048 features, and Inception Score (Salimans et al. 2016), of uint8 images."""
    isc = optional("torch_fidelity.metric_isc", "the Inception Score", "images")
    device = next(network.parameters()).device
    features, logits = [], []
    with torch.no_grad():
        for images in torch.from_numpy(images_NHWC).split(_BATCH):
            in_colour = images.movedim(3, 1).expand(-1, 3, -1, -1)
            found, unbiased = network(in_colour.contiguous().to(device))
            features.append(found.cpu().numpy())
            logits.append(unbiased.cpu())
    score = isc.isc_features_to_metric(torch.cat(logits), splits=min(10, len(images_NHWC)))
    return Activations(
        Moments.of(np.concatenate(features)), score[isc.KEY_METRIC_ISC_MEAN], score[isc.KEY_METRIC_ISC_STD]
    )
