"""Lightning checkpoints (`.ckpt`), read without running code that they name.

A checkpoint is a pickle. Those of MDLM contain hyper-parameters as OmegaConf and tokenizer objects, which
`torch.load(weights_only=True)` refuses. Here every class that torch does not trust is replaced by `Inert`, which stores
its arguments and state: nothing is imported, and nothing is called.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from scmdm.errors import UserError

PREFIX = "backbone."
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the dictionary of a checkpoint; tensors are mapped from the file.

    Raises UserError when the file is damaged, is not one of torch's zip archives, or names code to run.
    """
    try:
        names = get_unsafe_globals_in_checkpoint(str(path))
        for name in names:
            _refuse_code(path, name)
        with safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give a checkpoint or a directory with a model") from error
    except (pickle.UnpicklingError, ValueError, TypeError, RuntimeError, EOFError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read safely as a checkpoint ({reason}); give another file") from error
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
    found = {name: value for name, value in content["state_dict"].items() if str(name).startswith(PREFIX)}
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
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        raise UserError(f"{path}: {name} is not a dense floating-point tensor; the file is damaged")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(
            f"{path}: {name} has shape {tuple(value.shape)}, which exceeds its storage; the file is damaged"
        )


def hyper_parameters(content: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration among MDLM's hyper-parameters as plain dictionaries; empty if there is none."""
    saved = content.get("hyper_parameters")
    plain = _plain(saved.get("config")) if isinstance(saved, dict) else None
    return plain if isinstance(plain, dict) else {}


def _plain(value: Any, depth: int = 0) -> Any:
    """Replace inert OmegaConf nodes by their content, and other objects by None."""
    if depth > 16:
        return None
    if isinstance(value, Inert):
        state: dict[str, Any] = value.state if isinstance(value.state, dict) else {}
        return _plain(state.get("_content", state.get("_val")), depth + 1)
    if isinstance(value, dict):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else None
