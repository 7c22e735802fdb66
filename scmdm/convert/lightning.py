"""Lightning checkpoints (`.ckpt`), read without running code that they name.

A checkpoint is a pickle. Those of MDLM contain hyper-parameters as OmegaConf and tokenizer objects, which
`torch.load(weights_only=True)` refuses. Here every class that torch does not trust is replaced by `Inert`, which stores
its arguments and state, or by a plain dictionary or list where its instances get items: hydra's resolvers fill a
`defaultdict` of OmegaConf. Nothing is imported, and nothing is called.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from scmdm.errors import UserError
from scmdm.models.torch_archives import PickledNames, check_archive
from scmdm.system.untrusted import reading

PREFIX = "backbone."
_WHAT, _REMEDY = "Lightning checkpoint", "give a zip file that torch.save wrote, or download it again"
# Modules that only a malicious file names. `Inert` would make them harmless, but such a file is refused.
_RUNS_CODE = frozenset(  # pickle's protocol 2 writes subprocess as "commands"
    [
        "os",
        "posix",
        "nt",
        "sys",
        "subprocess",
        "commands",
        "importlib",
        "runpy",
        "code",
        "pty",
        "socket",
        "ctypes",
        "shutil",
    ]
)
# What torch would construct, and may here: none of them takes memory beyond the file's.
_CONSTRUCTED = frozenset(
    [
        "_codecs.encode",
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.device",
        "torch.serialization._get_layout",
        *(str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
        *(
            f"torch.{name}"
            for name in vars(torch)
            if name.endswith("Storage") and not name.startswith(("Typed", "Unt"))
        ),
    ]
)
_MOST_SETTINGS = 100_000  # values of the hyper-parameters that are looked at
_BUILTINS_THAT_RUN = frozenset(("eval", "exec", "compile", "open", "getattr", "setattr", "__import__", "breakpoint"))


class Inert:
    """Stand-in for an object of an untrusted class."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments, self.state = arguments, None

    def __new__(cls, *arguments: Any, **_: Any) -> Inert:
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertMapping:
    """Stand-in for an untrusted class whose instances get items by key: makes an empty dictionary."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()  # torch sets items and attributes of it


class _InertSequence:
    """Stand-in for an untrusted class whose instances get items appended: makes an empty list."""

    def __new__(cls, *_: Any) -> Any:
        return []


def _stand_in(name: str, names: PickledNames) -> type:
    if name in names.mappings:
        return _InertMapping
    return _InertSequence if name in names.sequences else Inert


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the dictionary of a checkpoint; tensors are mapped from the file.

    Raises UserError when the file is damaged, is not one of torch's zip archives, or names code to run.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a checkpoint or a directory with a model")
    names = check_archive(path, _WHAT, _REMEDY)
    with reading(path, _WHAT, _REMEDY):
        unknown = get_unsafe_globals_in_checkpoint(str(path))
        for name in (*unknown, *sorted(names.all)):
            _refuse_code(path, name)
        for name in sorted(names.all - set(unknown) - _CONSTRUCTED):
            raise UserError(f"{path} would make a {name} when loaded, which a checkpoint of weights does not need")
        with safe_globals([(_stand_in(name, names), name) for name in unknown]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} has no `state_dict`; give a Lightning checkpoint")
    return content


def _refuse_code(path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    runs = module.split(".")[0] in _RUNS_CODE or (
        module in ("builtins", "__builtin__") and function in _BUILTINS_THAT_RUN
    )
    if runs:
        raise UserError(f"{path} would call {name} when loaded: it is malicious; do not use it")


def checkpoint_weights(path: Path, content: dict[str, Any], weights: str) -> dict[str, Tensor]:
    """Return the backbone's tensors: averaged weights if the file has them ("ema"), or weights as trained ("raw").

    Raises UserError when averages do not match the weights, or a tensor's shape exceeds its storage.
    """
    state = content["state_dict"]
    if not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: names in its `state_dict` are not text; {_REMEDY}")
    found = {name: value for name, value in state.items() if name.startswith(PREFIX)}
    if not found:
        raise UserError(f"{path} has no tensor named {PREFIX}*; give a checkpoint of MDLM, UDLM or Duo")
    for name, value in found.items():
        _check_tensor(path, name, value)
    average = content.get("ema")
    if weights == "raw" or not average:
        return found
    shadows = average.get("shadow_params") if isinstance(average, dict) else None
    # MDLM stores averages without names, in the order of the parameters.
    names = [name for name in found if not name.endswith("inv_freq")]
    if not isinstance(shadows, list) or len(shadows) != len(names):
        have = len(shadows) if isinstance(shadows, list) else "no"
        raise UserError(f"{path} has {have} averaged tensors for {len(names)} parameters; import with weights=raw")
    for name, value in zip(names, shadows, strict=True):
        _check_tensor(path, f"the average of {name}", value)
        if value.shape != found[name].shape:
            shapes = f"{tuple(value.shape)}, its parameter {tuple(found[name].shape)}"
            raise UserError(f"{path}: the average of {name} has shape {shapes}; import with weights=raw")
    return {**found, **dict(zip(names, shadows, strict=True))}


def _check_tensor(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        raise UserError(f"{path}: {name} is {_type_name(value)}, which is not a dense tensor; {_REMEDY}")
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        raise UserError(f"{path}: {name} is a tensor of {value.dtype}, which is not a type of weights; {_REMEDY}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(
            f"{path}: {name} has shape {tuple(value.shape)}, which exceeds its storage; the file is damaged"
        )


def _type_name(value: Any) -> str:
    return f"a {type(value).__name__} ({value.layout}, {value.device})" if isinstance(value, Tensor) else "no tensor"


def hyper_parameters(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration among MDLM's hyper-parameters as plain dictionaries; empty if there is none.

    Raises UserError for one of more values than any configuration has.
    """
    saved = content.get("hyper_parameters")
    with reading(path, _WHAT, _REMEDY):
        plain = _plain(saved.get("config"), [0]) if isinstance(saved, dict) else None
    return plain if isinstance(plain, dict) else {}


def _plain(value: Any, count: list[int], depth: int = 0) -> Any:
    """Replace inert OmegaConf nodes by their content, and other objects by None; `count` holds the values so far."""
    count[0] += 1
    if count[0] > _MOST_SETTINGS:
        raise ValueError(f"more than {_MOST_SETTINGS} values in its hyper-parameters")
    if depth > 16:
        return None
    if isinstance(value, Inert):
        state: dict[str, Any] = value.state if isinstance(value.state, dict) else {}
        return _plain(state.get("_content", state.get("_val")), count, depth + 1)
    if isinstance(value, dict):
        return {key: _plain(item, count, depth + 1) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list):
        return [_plain(item, count, depth + 1) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else None
