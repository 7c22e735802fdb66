"""FID and Inception Score by torch-fidelity, with a file of Inception's weights that the user has.

Nothing is downloaded, and nothing in the file is run. The weights are those that torch-fidelity names,
`weights-inception-2015-12-05-6726825d.pth`: FID's original network, which published figures are made with.

Legend: N pictures, H height, W width, C channels.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmdm.domains.frechet import Moments
from scmdm.errors import UserError

PROTOCOL = "50,000 samples at T = 128 against all training pictures"  # of CIFAR-10's published figures
PROTOCOL_SAMPLES = 50_000
_BATCH = 64
_FEATURES, _LOGITS = "2048", "logits_unbiased"


@dataclass(frozen=True)
class Activations:
    """What Inception makes of a set of pictures."""

    moments: Moments
    score: float  # Inception Score: mean of ten parts
    score_std: float


def check_inception(weights: Path) -> None:
    """UserError when FID cannot be had with this file: known before anything is sampled."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError(f"inception={weights} needs the package torch-fidelity; `pip install torch-fidelity`")
    if not weights.is_file():
        raise UserError(
            f"inception={weights} is missing; give torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or "
            "leave the key out and use frechet_classifier"
        )


def load_inception(weights: Path, device: str = "cpu") -> Any:
    """torch-fidelity's Inception with the weights of a file. Raises UserError when it holds something else."""
    check_inception(weights)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity would unpickle whatever the file holds: it gets a copy of the tensors alone.
        tensors = io.BytesIO()
        torch.save({name: torch.as_tensor(value) for name, value in state.items()}, tensors)
        tensors.seek(0)
        network = FeatureExtractorInceptionV3("inception", [_FEATURES, _LOGITS], tensors)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"inception={weights} holds no weights of torch-fidelity's Inception: {reason}") from error
    return network.to(device)


def activations(network: Any, pictures_NHWC: np.ndarray) -> Activations:
    """Moments of the 2048 features, and the Inception Score (Salimans et al. 2016), of uint8 pictures."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    device = next(network.parameters()).device
    features, logits = [], []
    with torch.no_grad():
        for pictures in torch.from_numpy(pictures_NHWC).split(_BATCH):
            in_colour = pictures.movedim(3, 1).expand(-1, 3, -1, -1)
            found, unbiased = network(in_colour.contiguous().to(device))
            features.append(found.cpu().numpy())
            logits.append(unbiased.cpu())
    score = isc_features_to_metric(torch.cat(logits), splits=min(10, len(pictures_NHWC)))
    return Activations(Moments.of(np.concatenate(features)), score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD])
