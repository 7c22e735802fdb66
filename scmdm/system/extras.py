"""The extras of the distribution, as in `pip install 'scmdm[molecules]'`, and the packages of each.

The lists repeat `pyproject.toml`, because the metadata of an installed distribution is absent or stale when scmdm runs
from its source tree. A test compares them.
"""

from __future__ import annotations

import functools
import importlib.metadata

EXTRAS: dict[str, tuple[str, ...]] = {
    "molecules": ("rdkit", "selfies", "fcd", "qm9pack"),
    "images": ("torchvision", "pillow", "scikit-learn", "torch-fidelity"),
    "text": ("pyarrow", "mauve-text"),
    "huggingface": ("datasets",),
    "demo": ("flask",),
    "lm-eval": ("lm-eval",),
    "flash": ("flash-attn",),
    "docs": ("mkdocs", "mkdocs-material", "mkdocstrings"),
}
PURPOSES = {
    "molecules": "QM9, MOSES, SELFIES, and metrics of molecules",
    "images": "image data sets, FID, and figures of images",
    "text": "Parquet files, MAUVE",
    "huggingface": "data sets of the Hugging Face datasets library",
    "demo": "scmdm demo",
    "lm-eval": "tasks of the lm-evaluation-harness",
    "flash": "FlashAttention on GPUs",
    "docs": "building the documentation",
}
_MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "mauve-text": "mauve"}  # where the names differ


def module_of(package: str) -> str:
    """Return the top-level module of a package of an extra."""
    return _MODULES.get(package, package.replace("-", "_"))


def extra_of_module(module: str) -> str | None:
    """Return the extra that installs the package of a module, such as `rdkit.Chem`, or None."""
    top = module.partition(".")[0]
    return next((extra for extra, packages in EXTRAS.items() if top in map(module_of, packages)), None)


def missing_packages(extra: str) -> list[str]:
    """List the packages of an extra that are not installed."""
    return [package for package in EXTRAS[extra] if installed_version(package) is None]


@functools.cache  # finding it takes milliseconds
def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
