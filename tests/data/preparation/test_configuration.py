"""Configuration of `scmdm prepare`: sections by name, former spellings, data sets prepared before the sections."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scmdm.cli import main
from scmdm.config.loading import load_config
from scmdm.config.preparation import SOURCES, TOKENIZERS, PrepareConfig
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.prepare import recorded_options
from scmdm.errors import UserError

ROOT = Path(__file__).parents[3]
# Of the shipped configurations, as the code before the sections recorded them.
FORMER = json.loads((Path(__file__).parent / "recorded_options.json").read_text())


@pytest.mark.parametrize("name", FORMER)
def test_shipped_configurations_record_what_they_did(name):
    assert recorded_options(load_config(PrepareConfig, ROOT / f"configs/data/{name}.yaml")) == FORMER[name]


def test_a_data_set_of_the_flat_configuration_is_up_to_date(tmp_path, empty_yaml, capsys):
    """The description of the corpus in its manifest is that of the code before the sections."""
    corpus, out = tmp_path / "dialogue.jsonl", tmp_path / "data"
    rows = [{"q": f"ask {number}", "a": f"answer {number}"} for number in range(65)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["source.name=text", f"source.path={corpus}", "source.prompt_key=q", "source.response_key=a"]
    keys += ["source.split_by=names", "source.unit=documents", "tokenizer.name=bytes", "length=64", "workers=1"]
    keys += ["validation_fraction=0.2", "test_fraction=0.2", "part_mb=3"]
    assert main(["prepare", str(empty_yaml), *keys, f"out={out}"]) == 0
    source = Manifest.read(out).source
    (digest,) = source["files"].values()
    former = {
        "name": "dialogue.jsonl",
        "files": {"dialogue.jsonl": digest},
        "options": {
            "source": "text",
            "text_key": "text",
            "prompt_key": "q",
            "response_key": "a",
            "unit": "documents",
            "tokenizer": "bytes",
            "vocab_size": 2048,
            "length": 64,
            "pad_policy": "loss",
            "bos_policy": "given",
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
            "splits": "names",
            "limit": None,
            "shard_mb": 64,
            "part_mb": 3,
        },
    }
    assert source == former
    replace(Manifest.read(out), source=former).write(out)
    capsys.readouterr()
    assert main(["prepare", str(empty_yaml), *keys, f"out={out}"]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert main(["prepare", str(empty_yaml), *keys, f"out={out}", "source.unit=rows"]) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["source=text", "tokenizer.name=bytes"], "source: {name: text, ...}, or source.name=text"),
        (["source.name=text", "tokenizer=bytes"], "tokenizer: {name: bytes, ...}, or tokenizer.name=bytes"),
        (["source.name=text", "tokenizer.name=bytes", "path=x"], "write `source.path`"),
        (["source.name=text", "tokenizer.name=bytes", "splits=names"], "write `source.split_by`"),
        (["source.name=genomes", "tokenizer.name=dna", "stride=3"], "write `source.stride`"),
        (["source.name=smiles", "tokenizer.name=smiles", "smiles_column=S"], "write `source.column`"),
        (["source.name=text", "tokenizer.name=sentencepiece", "vocab_size=9"], "write `tokenizer.vocab_size`"),
        (["source.name=text", "tokenizer.name=characters", "tokenizer_path=x"], "write `tokenizer.path`"),
        (["source.name=text"], "key `tokenizer.name` is not set; it must be one of smiles, "),
        (["source.name=text", "tokenizer.name=bytes", "source.stride=3"], "unknown key `source.stride`"),
    ],
)
def test_former_and_unknown_keys_are_refused(tmp_path, empty_yaml, capsys, keys, message):
    assert main(["prepare", str(empty_yaml), *keys, "length=16", f"out={tmp_path / 'data'}"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_selecting_another_name_drops_the_keys_that_it_lacks(tmp_path):
    responses = ROOT / "configs/data/responses.yaml"
    assert load_config(PrepareConfig, responses, ["tokenizer.name=bytes"]).tokenizer.name == "bytes"
    path = tmp_path / "own.yaml"
    path.write_text(f"extends: {responses}\ntokenizer: {{name: characters}}\nsource: {{name: huggingface, split: x}}\n")
    source = load_config(PrepareConfig, path).source
    assert (source.path, source.prompt_key, source.split) == ("raw/dialogue.jsonl", "prompt", "x")
    with pytest.raises(UserError, match=r"unknown key `tokenizer\.vocab_size`"):
        load_config(PrepareConfig, responses, ["tokenizer.name=bytes", "tokenizer.vocab_size=9"])
    path.write_text(f"extends: {responses}\ntokenizer: {{name: bytes, vocab: 3}}\n")
    with pytest.raises(UserError, match=r"unknown key `tokenizer\.vocab`"):
        load_config(PrepareConfig, path)


def test_equal_configurations_compare_equal():
    first, second = (load_config(PrepareConfig, ROOT / "configs/data/qm9.yaml", ["limit=3"]) for _ in range(2))
    assert first == second != load_config(PrepareConfig, ROOT / "configs/data/qm9_selfies.yaml", ["limit=3"])


def test_a_flat_file_is_refused(tmp_path, capsys):
    path = tmp_path / "flat.yaml"
    path.write_text("out: data\nsource: genomes\npath: g\ntokenizer: dna\nlength: 16\n")
    assert main(["prepare", str(path)]) == 1
    assert "source: {name: genomes, ...}" in capsys.readouterr().err


WITHOUT_OPTIONAL_PACKAGES = """
import sys
for name in ("rdkit", "selfies", "PIL", "sklearn", "datasets", "pyarrow", "torchvision", "fcd", "qm9pack"):
    sys.modules[name] = None
from scmdm.config.preparation import SOURCES, TOKENIZERS, TokenizerConfig
for registry in (SOURCES, TOKENIZERS):
    for name in registry.names:
        registry.schema(name)
from scmdm.errors import UserError
def told(wants):
    try:
        wants()
    except UserError as error:
        return str(error)
Selfies = TOKENIZERS.load("selfies")
from data_prep.smiles import canonical_smiles
print(told(lambda: Selfies.split("CC")), told(lambda: canonical_smiles("CC")), sep="\\n")
"""


def test_all_keys_are_known_without_optional_packages():
    done = subprocess.run([sys.executable, "-c", WITHOUT_OPTIONAL_PACKAGES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("pip install 'scmdm[molecules]'" in line for line in lines)


def test_the_tokenizers_of_every_source_exist():
    for name in SOURCES.names:
        assert set(SOURCES.load(name).tokenizers) <= set(TOKENIZERS.names)
    for name in TOKENIZERS.names:
        assert TOKENIZERS.load(name).kind == name
