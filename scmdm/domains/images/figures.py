"""Figure of images: a grid of samples.

Legend: N images, H height, W width, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from scmdm.system.files import atomic_write_bytes
from scmdm.system.package_data import optional

_CELL = 64  # pixels


def image_grid(images_NHWC: np.ndarray | Sequence[np.ndarray], path: Path, *, columns: int = 16, rows: int = 4) -> int:
    """Draw the first uint8 images, enlarged to about 64 pixels, as a PNG; returns the number drawn."""
    utils = optional("torchvision.utils", f"a figure of images ({path})", "images")
    shown = torch.from_numpy(np.stack(list(images_NHWC[: columns * rows]))).movedim(3, 1)
    factor = max(1, _CELL // max(shown.shape[2:]))
    enlarged = shown.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    buffer = io.BytesIO()
    utils.save_image(enlarged / 255, buffer, format="png", nrow=columns, padding=2, pad_value=0.5)
    atomic_write_bytes(path, buffer.getvalue())
    return len(shown)
