"""Tokenizers and data sets of Hugging Face's libraries, made here: ids of specials, round trips, splits."""

import json
import re
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from scmdm.cli import main
from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    block_text,
    is_block,
    is_framed,
    load_tokenizer,
    text_ids,
)
from scmdm.data.tokenizers.huggingface_tokenizer import HuggingFaceConfig, SpecialIds
from scmdm.data.tokenizers.sentencepiece_tokenizer import SentencePieceConfig
from scmdm.data.verification import verify_dataset
from scmdm.errors import UserError
from scmdm.sampling.templates import make_template
from tests.data.preparation.test_prepare import decoded, files

CORPUS = ["The quick brown fox jumps over the lazy dog.\n", "Pack my box with five dozen liquor jugs! "] * 20
END = "<|endoftext|>"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def byte_pairs(specials=(END,), size=300):
    """A pipeline as GPT-2's: byte-level pairs, the end mark behind them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(list(specials))
    return made


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder as `save_pretrained` writes it for GPT-2."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2") / "gpt2"
    made = PreTrainedTokenizerFast(tokenizer_object=byte_pairs(), bos_token=END, eos_token=END, unk_token=END)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def end(gpt2):
    """The id of the end mark: the last of the vocabulary, as 50256 is."""
    return tokenizers.Tokenizer.from_file(str(gpt2 / "tokenizer.json")).get_vocab_size() - 1


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_gpt2_gets_the_layout_of_mdlm(gpt2, end, name):
    """There: bos = eos = 50256, mask = 50257, 50258 ids in all."""
    tokenizer = HuggingFaceTokenizer.from_files(gpt2 / name, padded=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (end, end, end + 1)
    assert tokenizer.vocab_size == end + 2 and tokenizer.pad_id == end
    padded = HuggingFaceTokenizer.from_files(gpt2 / name, padded=True)
    assert (padded.mask_id, padded.pad_id, padded.vocab_size) == (end + 1, end + 2, end + 3)
    assert padded.tokens([end, end + 1, end + 2]) == [END, "[MASK]", "[PAD]"]


def test_a_file_of_another_name_is_read_itself(gpt2, tmp_path):
    """Beside it is the folder's own tokenizer, with its settings."""
    folder = shutil.copytree(gpt2, tmp_path / "tokenizer")
    assert (folder / "tokenizer_config.json").is_file()
    byte_pairs(size=280).save(str(folder / "tokenizer-v2.json"))

    def size(name):
        return HuggingFaceTokenizer.from_files(folder / name, padded=False).vocab_size

    assert size("") == size("tokenizer.json") > size("tokenizer-v2.json")


def test_other_files_of_a_checkpoint_are_not_read(gpt2, tmp_path):
    folder = shutil.copytree(gpt2, tmp_path / "checkpoint-10")
    (folder / "trainer_state.json").write_text('{"log_history": [{"loss": NaN}]}')
    opened = HuggingFaceTokenizer.from_files(folder, padded=False)
    assert opened.encode("ab") == HuggingFaceTokenizer.from_files(gpt2, padded=False).encode("ab")


def test_ids_are_those_of_the_library(gpt2):
    tokenizer = HuggingFaceTokenizer.from_files(gpt2, padded=False)
    theirs = tokenizers.Tokenizer.from_file(str(gpt2 / "tokenizer.json"))
    assert tokenizer.encode(CORPUS[0]) == theirs.encode(CORPUS[0]).ids


@given(ANY_TEXT)
def test_byte_pairs_round_trip_any_text(text):
    tokenizer = load(byte_pairs_json())
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer.eos_id not in ids and tokenizer.mask_id not in ids


_JSON = []


def byte_pairs_json():
    if not _JSON:
        _JSON.append(json.loads(byte_pairs().to_str()))
    return _JSON[0]


def load(pipeline):
    end = max(pipeline["model"]["vocab"].values()) + 1
    specials = {"mask": end + 1, "bos": end, "eos": end, "pad": end + 2}
    return HuggingFaceTokenizer(pipeline, SpecialIds(**specials))


def test_specials_cannot_be_typed(gpt2):
    tokenizer = HuggingFaceTokenizer.from_files(gpt2, padded=True)
    for text in (END, f"a{END}b", "[MASK]", "[PAD]"):
        assert not {tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id} & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_with_specials_of_its_own_keeps_them(tmp_path):
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    made = byte_pairs(names)
    made.save(str(tmp_path / "tokenizer.json"))
    ids = [made.token_to_id(name) for name in names]
    for path in (tmp_path / "tokenizer.json", bert_folder(made, tmp_path / "bert")):
        tokenizer = HuggingFaceTokenizer.from_files(path, padded=True)
        assert [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id] == ids[:4]
        assert tokenizer.vocab_size == made.get_vocab_size()


def bert_folder(made, folder):
    from transformers import PreTrainedTokenizerFast

    roles = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **roles).save_pretrained(folder)
    return folder


def test_padding_that_is_the_end_mark_is_none(tmp_path):
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=byte_pairs(), bos_token=END, eos_token=END, pad_token=END)
    made.save_pretrained(tmp_path)
    tokenizer = HuggingFaceTokenizer.from_files(tmp_path, padded=True)
    assert len({tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id}) == 3


def test_its_file_says_all(gpt2, tmp_path):
    tokenizer = HuggingFaceTokenizer.from_files(gpt2, padded=True)
    again = load_tokenizer(tokenizer.save(tmp_path))
    for name in ("kind", "vocab_size", "pad_id", "bos_id", "eos_id", "mask_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])
    (tmp_path / "again").mkdir()
    assert again.save(tmp_path / "again").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pipeline"]["model"]["type"] = "none"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape("tokenizer.json")):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "name",
    ["none.json", "bad.json", "empty"],
)
def test_what_is_no_tokenizer(tmp_path, name):
    (tmp_path / "bad.json").write_text('{"version": 1}')
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"tokenizer.path=.*{name}"):
        HuggingFaceTokenizer.open(HuggingFaceConfig(path=str(tmp_path / name)), padded=True)
    with pytest.raises(UserError, match=f"tokenizer.path=.*{name}"):
        SentencePieceTokenizer.open(SentencePieceConfig(path=str(tmp_path / name)), padded=True)


def test_one_id_for_beginning_and_end(gpt2):
    t = HuggingFaceTokenizer.from_files(gpt2, padded=True)
    e, a, b = t.eos_id, *t.encode("ab")[:2]
    assert text_ids([e, a, b, e, t.pad_id], t) == [a, b] and text_ids([e, a], t) == [a] and text_ids([e, e], t) == []
    assert text_ids([a, e, b], t) == [a]
    for ids in ([e, a, b, e], [e, a, b, e, t.pad_id], [e, a, b], [e, e]):
        assert is_framed(ids, t, t.pad_id)
    for ids in ([a, b, e], [e, a, e, b], [e, a, t.mask_id, e], [e, a, t.pad_id, e]):
        assert not is_framed(ids, t, t.pad_id)
    assert is_block([e, a, e, b, e], t) and block_text([e, a, e, b, e], t) == f"{t.decode([a])}{END}{t.decode([b])}"
    row = make_template(t, 6, "ab", None, bos_given=True).tolist()
    assert row[: len(t.encode("ab")) + 1] == [e, *t.encode("ab")] and row[-1] == t.mask_id


def test_a_sentencepiece_model_of_others_keeps_its_ids(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "m"), vocab_size=40, minloglevel=2
    )  # as LLaMA's: <unk> 0, <s> 1, </s> 2, neither padding nor mask
    tokenizer = SentencePieceTokenizer.open(SentencePieceConfig(path=str(tmp_path / "m.model")), padded=True)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id) == (1, 2, 40, 41)
    assert tokenizer.vocab_size == 42 and tokenizer.tokens([1, 40, 41]) == ["<s>", "[MASK]", "[PAD]"]
    text = "The lazy dog jumps."
    ids = tokenizer.encode(text)
    assert tokenizer.decode([1, *ids, 40, 2, 41]) == text
    ours = SentencePieceTokenizer.fit(CORPUS, 300)
    assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.mask_id, ours.vocab_size) == (0, 1, 2, 3, 300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    place = tmp_path_factory.mktemp("saved")
    texts = [f"{number:04} some words to read" for number in range(900)]
    whole = datasets.Dataset.from_dict({"number": list(range(900)), "body": texts})
    whole.save_to_disk(place / "one", num_shards=3)
    parts = {"train": whole.select(range(700)), "validation": whole.select(range(700, 800))}
    datasets.DatasetDict({**parts, "test": whole.select(range(800, 900))}).save_to_disk(place / "three")
    datasets.DatasetDict({"train": whole, "test": whole.filter(lambda _: False)}).save_to_disk(place / "empty")
    (place / "local").mkdir()
    whole.to_parquet(place / "local" / "a.parquet")
    return place


def prepared(path, out, empty_yaml, *keys):
    options = [
        "source.name=huggingface",
        f"source.path={path}",
        f"out={out}",
        "source.text_key=body",
        "source.unit=documents",
        "length=40",
    ]
    assert main(["prepare", str(empty_yaml), "tokenizer.name=bytes", *options, *keys]) == 0
    assert not verify_dataset(out)
    return Manifest.read(out)


def numbers(root, split):
    return [int(text[:4]) for text in decoded(root, split)]


def test_a_saved_data_set(saved, tmp_path, empty_yaml):
    manifest = prepared(saved / "one", tmp_path / "a", empty_yaml, "held_out_last=100", "workers=1")
    assert manifest.counts["kept"] == 900 and len(manifest.source["files"]) == 3
    assert numbers(tmp_path / "a", "train") == list(range(800))
    assert numbers(tmp_path / "a", "validation") == list(range(800, 900))


def test_other_columns_are_not_decoded(tmp_path, empty_yaml):
    """As of a data set of pictures with captions, where one is damaged."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    damaged = [{"bytes": b"no picture", "path": None}] * 3
    rows = {"body": ["0000 some words", "0001 more words", "0002 words"], "picture": damaged}
    features = datasets.Features({"body": datasets.Value("string"), "picture": datasets.Image()})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "raw")
    manifest = prepared(tmp_path / "raw", tmp_path / "out", empty_yaml, "held_out_last=1", "workers=1")
    assert manifest.counts == {"read": 3, "kept": 3}
    assert numbers(tmp_path / "out", "train") == [0, 1]


def test_a_data_set_with_splits_of_its_own(saved, tmp_path, empty_yaml):
    keys = ["source.split_by=names", "validation_fraction=0.0", "test_fraction=0.0", "workers=1"]
    prepared(saved / "three", tmp_path / "a", empty_yaml, *keys)
    assert numbers(tmp_path / "a", "train") == list(range(700))
    assert numbers(tmp_path / "a", "test") == list(range(800, 900))
    manifest = prepared(
        saved / "three", tmp_path / "b", empty_yaml, "source.split=validation", "validation_fraction=0.3"
    )
    assert manifest.counts["kept"] == 100


def test_a_local_folder_through_load_dataset(saved, tmp_path, empty_yaml, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    manifest = prepared(saved / "local", tmp_path / "a", empty_yaml, "source.split=train[:50%]", "workers=1")
    assert manifest.counts["kept"] == 450


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["source.path={}/one", "source.text_key=text"], "text is not a column of split train"),
        (["source.path={}/three", "source.split=dev"], "source.split=dev is not in source.path="),
        (["source.path={}/nothing"], "cannot be loaded as a data set"),
        (["source.path={}/empty", "source.split=test"], "/empty has no rows in split test"),
        (["source.path={}/empty", "source.split=test", "limit=10"], "/empty has no rows in split test"),
    ],
)
def test_mistakes(saved, tmp_path, empty_yaml, capsys, keys, message):
    keys = [key.format(saved) for key in ["source.text_key=body", *keys]]
    options = ["source.name=huggingface", "tokenizer.name=bytes", "length=40", f"out={tmp_path / 'a'}", "workers=1"]
    assert main(["prepare", str(empty_yaml), *options, *keys]) == 1
    assert message in capsys.readouterr().err


def test_mdlm_data_end_to_end(gpt2, end, saved, tmp_path, empty_yaml):
    """As configs/data/owt.yaml; the tokenizer's file is in the data set, and where it came from makes no difference."""
    keys = ["tokenizer.name=huggingface", "framing=concatenate", "held_out_last=100", "bos_policy=loss", "workers=1"]
    manifest = prepared(saved / "one", tmp_path / "a", empty_yaml, f"tokenizer.path={gpt2}", *keys)
    assert (manifest.vocab_size, manifest.mask_id, manifest.bos_id, manifest.eos_id) == (end + 2, end + 1, end, end)
    ids_NL = read_split(tmp_path / "a", "train")
    assert manifest.splits["train"].tokens == ids_NL.size and ids_NL.shape[1] == 40
    text = "".join(f"{block_text(row, load_tokenizer(tmp_path / 'a/tokenizer.json'))}|" for row in ids_NL.tolist())
    assert f"0000 some words to read{END}0001 some" in text
    again = prepared(saved / "one", tmp_path / "b", empty_yaml, f"tokenizer.path={gpt2 / 'tokenizer.json'}", *keys)
    assert again == manifest and files(tmp_path / "a") == files(tmp_path / "b")
    assert np.issubdtype(ids_NL.dtype, np.uint16)


def test_a_broken_line_of_a_folder_is_named(tmp_path, empty_yaml, capsys, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    keys = ["source.name=huggingface", f"source.path={tmp_path / 'folder'}", "tokenizer.name=bytes", "length=16"]
    assert main(["prepare", str(empty_yaml), *keys, f"out={tmp_path / 'data'}"]) == 1
    error = capsys.readouterr().err
    assert "cannot be loaded as a data set" in error and "JSON" in error.upper()
    assert "Traceback" not in error
