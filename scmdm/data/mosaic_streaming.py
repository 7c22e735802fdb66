"""Names of mosaicml-streaming that scmdm uses, imported without the package's ready-made data sets.

`import streaming` also imports readers of C4, WebVid, ADE20K and others, and with them scikit-learn and torchvision. It
imports transformers for two classes of an `isinstance`. Both take seconds in every process. During the import, empty
modules stand in for the readers, and the base class of the two classes for these.

Streaming numbers what the processes of a data set share. It takes the first number that is free, so that two runs that
start at the same moment, or a run that ends meanwhile, can make it take one in use. Here, numbers are random; nodes
that share a machine in a test have different ones.
"""

# ruff: noqa: E402, F401 - the order of imports matters, and other modules import the names from here

from __future__ import annotations

import sys
import uuid
from collections import UserDict
from collections.abc import Sequence
from types import ModuleType

from scmdm.system.process_group import barrier, broadcast

_READERS = ("multimodal", "text", "vision")
_CLASSES = {
    "transformers.feature_extraction_utils": "BatchFeature",
    "transformers.tokenization_utils_base": "BatchEncoding",
}


def _stand_in(package: str, names: Sequence[str]) -> list[str]:
    """Put empty modules in the place of those of a package that is not imported yet, and return their names."""
    found = [] if package in sys.modules else list(names)
    sys.modules.update({name: ModuleType(name) for name in found})
    return found


_left_out = _stand_in("streaming", [f"streaming.{name}" for name in _READERS])
_left_out += _stand_in("transformers", ["transformers", *_CLASSES])
for _module, _name in _CLASSES.items():
    if _module in _left_out:
        setattr(sys.modules[_module], _name, UserDict)

import streaming
import streaming.base.dataset

for _module in _left_out:
    del sys.modules[_module]
    if _module.startswith("streaming."):
        delattr(streaming, _module.removeprefix("streaming."))

from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from streaming.base.constant import LOCALS, TICK
from streaming.base.dataset import _ShardState as ShardState
from streaming.base.format import FileInfo as StreamingFileInfo
from streaming.base.format import Reader
from streaming.base.format.mds.reader import MDSReader
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _get_path, _pack_locals
from streaming.base.storage import CloudDownloader, CloudUploader
from streaming.base.util import bytes_to_int
from streaming.base.world import World


def _take_number(
    streams_local: list[str], streams_remote: Sequence[str | None], world: World, retry: int = 0
) -> tuple[int, SharedMemory]:
    """Return the number that rank 0 has drawn, plus that of this node, with the shared memory that records it."""
    number = broadcast(uuid.uuid4().int >> 80) + world.node
    name, record = _get_path(number, LOCALS), _pack_locals(streams_local, number)
    if world.is_local_leader:
        memory = SharedMemory(name, create=True, size=len(record))
        memory.buf[: len(record)] = record
    barrier()
    return number, memory if world.is_local_leader else SharedMemory(name, create=False)


assert callable(streaming.base.dataset.get_shm_prefix)
streaming.base.dataset.get_shm_prefix = _take_number
