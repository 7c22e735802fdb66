"""Names of mosaicml-streaming that scmdm uses, imported without the package's ready-made data sets.

`import streaming` also imports readers of C4, WebVid, ADE20K and others, and with them transformers, scikit-learn and
torchvision, which takes seconds in every process. Here, empty modules stand in for these readers during the import.
"""

# ruff: noqa: E402 - the order of imports matters

from __future__ import annotations

import sys
from types import ModuleType

_READERS = ("multimodal", "text", "vision")
_left_out = () if "streaming" in sys.modules else _READERS
for _name in _left_out:
    sys.modules[f"streaming.{_name}"] = ModuleType(f"streaming.{_name}")

import streaming

for _name in _left_out:
    del sys.modules[f"streaming.{_name}"]
    delattr(streaming, _name)

from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK
from streaming.base.dataset import _ShardState as ShardState
from streaming.base.format import FileInfo as StreamingFileInfo
from streaming.base.format import Reader
from streaming.base.format.mds.reader import MDSReader
from streaming.base.storage import CloudDownloader, CloudUploader
from streaming.base.util import bytes_to_int

LOCK_FILES = (CACHE_FILELOCK, BARRIER_FILELOCK)  # suffixes of their names

__all__ = [
    "LOCK_FILES",
    "CloudDownloader",
    "CloudUploader",
    "MDSReader",
    "MDSWriter",
    "Reader",
    "ShardState",
    "Stream",
    "StreamingDataLoader",
    "StreamingDataset",
    "StreamingFileInfo",
    "bytes_to_int",
]
