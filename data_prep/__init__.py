"""One module per corpus: raw files -> parts -> clean records. The machinery is `scmdm.data`."""

from __future__ import annotations

from pathlib import Path

from scmdm.config.prepare import PrepareConfig
from scmdm.data.records import Source


def make_source(config: PrepareConfig) -> Source:
    """The corpus that a configuration names."""
    return _SOURCES[config.source](config)


def _qm9(_config: PrepareConfig) -> Source:
    from data_prep.qm9 import Qm9

    return Qm9()


def _text(config: PrepareConfig) -> Source:
    from data_prep.text import TextFolder, shakespeare

    return shakespeare() if config.path is None else TextFolder(Path(config.path), config.text_key)


def _cifar10(config: PrepareConfig) -> Source:
    from data_prep.images import Cifar10

    return Cifar10.of(config)


def _images(config: PrepareConfig) -> Source:
    from data_prep.images import ImageFolder

    return ImageFolder.of(config)


def _digits(config: PrepareConfig) -> Source:
    from data_prep.images import Digits

    return Digits.of(config)


def _codes(config: PrepareConfig) -> Source:
    from data_prep.codes import Codes

    return Codes.of(config)


_SOURCES = {
    "qm9": _qm9,
    "text": _text,
    "cifar10": _cifar10,
    "images": _images,
    "digits": _digits,
    "codes": _codes,
}
