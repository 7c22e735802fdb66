"""What is attacked: files as strangers give them, and the command that reads them."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from scmdm.cli import main
from tests.conftest import ADAPTED, ROOT, TINY, small_base
from tests.convert.published import write_lightning, write_mdlm, write_tokenizer

GIVEN, OUT, EMPTY = "{given}", "{out}", "{given}/empty.yaml"


@dataclass(frozen=True)
class Subject:
    """Files below `given`, those of them that are changed, and a command with places for both directories."""

    name: str
    build: Callable[[Path, Path], None]  # (given, directory of the shared base)
    files: tuple[str, ...]  # patterns below `given`
    command: tuple[str, ...]
    keeps: tuple[str, ...] = field(default=())  # names below `given` that the command may add or change

    def arguments(self, given: Path, out: Path) -> list[str]:
        return [word.replace(GIVEN, str(given)).replace(OUT, str(out)) for word in self.command]


def make_shared(place: Path) -> Path:
    """The data set, run and export that several subjects copy."""
    small_base(place)
    assert main(["export", str(place / "base"), str(place / "export")]) == 0
    return place


def _copy(*names: str) -> Callable[[Path, Path], None]:
    def build(given: Path, shared: Path) -> None:
        for name in names:
            source, target = shared / name, given / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, target, **({"symlinks": True} if source.is_dir() else {}))

    return build


def _write(name: str, content: bytes) -> Callable[[Path, Path], None]:
    return lambda given, shared: (given / name).write_bytes(content) and None


TEXT = "".join(f"Line {number}.\nAnother one, longer, with é.\n\nA second passage.\n" for number in range(20))
ROWS = "".join(json.dumps({"text": f"row {number} of text", "label": number % 2}) + "\n" for number in range(20))
SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "CN", "C1CC1", "OCC#N", "CCCl", "[NH4+]"]
MOLECULES = [atoms + smiles for atoms in ("", "C", "CC", "CCC") for smiles in SMILES[:-1]]
LETTERS = [format(number * 7919 % 65536, "016b").replace("0", "AC").replace("1", "gT") for number in range(60)]
FASTA = "".join(
    f">chromosome{number} of something\n{'ACGTTGCA' * 3}\n{letters}\n" for number, letters in enumerate(LETTERS)
)


def _table(given: Path, shared: Path) -> None:
    with open(given / "t.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "SMILES"])
        rows.writerows([f"a, quoted\n{number}", smiles] for number, smiles in enumerate(MOLECULES))


def _pictures(given: Path, shared: Path) -> None:
    for label in ("a", "b"):
        (given / "p" / label).mkdir(parents=True)
        for number in range(3):
            picture = Image.fromarray(np.full((8, 8, 3), 40 * number + (label == "b"), np.uint8))
            picture.save(given / "p" / label / f"{number}.{'jpg' if number == 2 else 'png'}")


def _parquet(given: Path, shared: Path) -> None:
    pq.write_table(
        pa.table({"text": [f"row {number}" for number in range(60)]}), given / "t.parquet", row_group_size=10
    )


def _codes(given: Path, shared: Path) -> None:
    np.save(given / "c.npy", np.arange(60, dtype=np.int64).reshape(10, 6) % 16)


def _prompts(given: Path, shared: Path) -> None:
    (given / "p.jsonl").write_text(json.dumps({"prompt": "CC"}) + "\n" + json.dumps({"prompt": "c1"}) + "\n")


def _published(given: Path, shared: Path) -> None:
    write_mdlm(given / "mdlm")


def _lightning(given: Path, shared: Path) -> None:
    write_lightning(given / "last.ckpt")


def _tokenizer(given: Path, shared: Path) -> None:
    write_tokenizer(given / "tokenizer.json")
    (given / "t.txt").write_text(
        "\n".join("abcdefghijk"[start:end] for start in range(9) for end in range(start + 1, 11))
    )


def _config(given: Path, shared: Path) -> None:
    (given / "c.yaml").write_text((ROOT / "configs/data/qm9.yaml").read_text())


def _prepare(source: str, tokenizer: str, file: str, *keys: str) -> tuple[str, ...]:
    common = (f"source.name={source}", f"source.path={GIVEN}/{file}", f"tokenizer.name={tokenizer}", f"out={OUT}")
    return ("prepare", EMPTY, *common, "workers=1", "length=16", "validation_fraction=0.3", "test_fraction=0.3", *keys)


_TRAIN = ("train", EMPTY, f"run_dir={OUT}", f"data.path={GIVEN}/qm9", "train.steps=2", *TINY)
_RESUME = ("train", EMPTY, f"run_dir={GIVEN}/base", f"data.path={GIVEN}/qm9", "train.steps=6", *TINY)
_SAMPLE = ("num=1", "sampler.steps=1", "device=cpu")
_RUN_OUTPUT = ("base/report.html", "base/losses.png", "base/progress.png")


def _subjects() -> Iterator[Subject]:
    yield from _run_subjects()
    yield from _dataset_subjects()
    yield from _model_subjects()
    yield from _corpus_subjects()


def _run_subjects() -> Iterator[Subject]:
    """A run and its checkpoints, as they are resumed, sampled from and shown."""
    checkpoint = tuple(f"base/checkpoints/step_00000006/{name}" for name in ("*.json", "*.yaml", "tensors/*"))
    logs = tuple(f"base/{name}" for name in ("*.jsonl", "environment.json", "config.yaml", "train.log"))
    yield Subject("checkpoint", _copy("base"), checkpoint, ("sample", f"{GIVEN}/base", *_SAMPLE))
    yield Subject("checkpoints", _copy("base"), checkpoint, ("checkpoint", "list", f"{GIVEN}/base"))
    yield Subject("resume", _copy("base", "qm9"), (*checkpoint, *logs), _RESUME, keeps=("base/",))
    yield Subject("status", _copy("base"), (*logs, *checkpoint), ("status", f"{GIVEN}/base"))
    yield Subject("report", _copy("base"), logs, ("report", f"{GIVEN}/base"), keeps=_RUN_OUTPUT)


def _dataset_subjects() -> Iterator[Subject]:
    """A prepared data set: verified, trained on, fetched from a store."""
    files = ("qm9/*.json", "qm9/*/*")
    remote = (f"run_dir={OUT}/run", f"data.path={OUT}/cache", f"data.remote={GIVEN}/qm9")
    yield Subject("verify", _copy("qm9"), files, ("prepare", "--verify", f"{GIVEN}/qm9"))
    yield Subject("train", _copy("qm9"), files, _TRAIN)
    yield Subject("remote", _copy("qm9"), files, ("train", EMPTY, *remote, "train.steps=2", *TINY))


def _model_subjects() -> Iterator[Subject]:
    """Models: ours, published ones, and what is given to them."""
    adapt = (f"base={GIVEN}/export", f"run_dir={OUT}", f"data.path={GIVEN}/qm9", "train.steps=2", *ADAPTED)
    prompts = _both(_copy("export"), _prompts)
    yield Subject("export", _copy("export"), ("export/*",), ("sample", f"{GIVEN}/export", *_SAMPLE))
    yield Subject("adapt", _copy("export", "qm9"), ("export/*",), ("adapt", EMPTY, *adapt))
    yield Subject("import", _published, ("mdlm/*",), ("import", f"{GIVEN}/mdlm", OUT))
    yield Subject("lightning", _lightning, ("last.ckpt",), ("import", f"{GIVEN}/last.ckpt", OUT))
    sample = ("sample", f"{GIVEN}/export", *_SAMPLE, f"prompts={GIVEN}/p.jsonl")
    yield Subject("prompts", prompts, ("p.jsonl",), sample)


def _corpus_subjects() -> Iterator[Subject]:
    """Files of a corpus, by format; a tokenizer; a configuration."""
    yield Subject("config", _config, ("c.yaml",), ("prepare", f"{GIVEN}/c.yaml", f"out={OUT}", "limit=200"))
    vocabulary = (f"tokenizer.path={GIVEN}/tokenizer.json", "source.unit=lines")
    command = _prepare("text", "huggingface", "t.txt", *vocabulary)
    yield Subject("vocabulary", _tokenizer, ("tokenizer.json",), command)
    texts = {"t.txt": TEXT.encode(), "t.jsonl": ROWS.encode(), "t.jsonl.gz": gzip.compress(ROWS.encode())}
    for name, content in texts.items():
        command = _prepare("text", "characters", name, "source.unit=lines")
        yield Subject(name, _write(name, content), (name,), command)
    smiles = _write("t.smi", "\n".join(MOLECULES).encode())
    fasta = _write("t.fa", FASTA.encode())
    yield Subject("t.parquet", _parquet, ("t.parquet",), _prepare("text", "characters", "t.parquet"))
    yield Subject("t.csv", _table, ("t.csv",), _prepare("smiles", "smiles", "t.csv"))
    yield Subject("t.smi", smiles, ("t.smi",), _prepare("smiles", "smiles", "t.smi"))
    yield Subject("t.fa", fasta, ("t.fa",), _prepare("genomes", "dna", "t.fa", "source.block_windows=1"))
    pictures = ("source.image_size=4", "length=49")
    yield Subject("pictures", _pictures, ("p/*/*",), _prepare("images", "levels", "p", *pictures))
    codes = ("source.levels=16", "length=7")
    yield Subject("codes", _codes, ("c.npy",), _prepare("codes", "codes", "c.npy", *codes))


def _both(*builders: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def build(given: Path, shared: Path) -> None:
        for builder in builders:
            builder(given, shared)

    return build


SUBJECTS = tuple(_subjects())
