"""Write a safetensors file tensor by tensor, hashed while it is written, without a second copy in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from scmdm.models.safetensors_headers import header_bytes
from scmdm.system.hashing import FileHash, HashingFile


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileHash:
    """Write tensors of any device to a new file, flush it to the disk, and return its hash.

    Raises OSError when there is no room.
    """
    # Larger elements first, as the format's alignment wants; then by name, which keeps weights, averages and moments
    # of a checkpoint together, so that a reader of one kind verifies few chunks.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    ordered = {name: tensors[name] for name in names}
    with HashingFile(path) as file:
        file.write(header_bytes(ordered, metadata))
        for tensor in ordered.values():
            file.write(_bytes_of(tensor))
    return file.result()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a view of a tensor's bytes; a copy if it is on a device or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
