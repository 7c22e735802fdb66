"""One module per corpus: raw files -> parts -> clean records. The machinery is `scmdm.data`."""

from __future__ import annotations

from pathlib import Path

from scmdm.config.preparation import DEBIAN, PrepareConfig
from scmdm.data.preparation.records import Source


def make_source(config: PrepareConfig) -> Source:
    """The corpus that a configuration names."""
    return _SOURCES[config.source](config)


def _qm9(_config: PrepareConfig) -> Source:
    from data_prep.qm9 import Qm9

    return Qm9()


def _text(config: PrepareConfig) -> Source:
    from data_prep.text import TextFolder, Units, shakespeare

    units = Units(config.unit, config.detokenize)
    if config.path is None:
        return shakespeare(units)
    split_by_name = config.splits == "names"
    return TextFolder(Path(config.path), config.keys, config.pattern, units=units, split_by_name=split_by_name)


def _moses(_config: PrepareConfig) -> Source:
    from data_prep.moses import Moses, moses_folder

    return Moses(moses_folder())


def _smiles(config: PrepareConfig) -> Source:
    from data_prep.smiles import SmilesFiles

    assert config.path is not None
    return SmilesFiles(Path(config.path), config.smiles_column)


def _genomes(config: PrepareConfig) -> Source:
    from data_prep.debian import DEFAULT, debian_genomes
    from data_prep.genomes import Genomes, Labels, Windows

    windows = Windows(
        letters=config.length - 2,
        stride=config.stride,
        per_block=config.block_windows,
        max_unknown=config.max_unknown,
        soft_masked_unknown=config.soft_masked == "unknown",
        reverse_complement=config.reverse_complement,
    )
    if config.path is None or config.path.startswith(DEBIAN):
        return debian_genomes((config.path or DEFAULT).removeprefix(DEBIAN), windows)
    table = Path(config.species_table) if config.species_table else None
    return Genomes(Path(config.path), windows, Labels(config.species_from, table))


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


def _huggingface(config: PrepareConfig) -> Source:
    from data_prep.huggingface import HuggingFace
    from data_prep.text import Units

    assert config.path is not None
    splits = None if config.splits == "names" else config.hf_split
    units = Units(config.unit, config.detokenize)
    return HuggingFace(config.path, config.hf_config, splits, config.keys, units)


def _text8(config: PrepareConfig) -> Source:
    from data_prep.text8 import Text8

    assert config.path is not None
    return Text8(Path(config.path), config.length - 2)


_SOURCES = {
    "qm9": _qm9,
    "moses": _moses,
    "smiles": _smiles,
    "text": _text,
    "huggingface": _huggingface,
    "text8": _text8,
    "genomes": _genomes,
    "cifar10": _cifar10,
    "images": _images,
    "digits": _digits,
    "codes": _codes,
}
