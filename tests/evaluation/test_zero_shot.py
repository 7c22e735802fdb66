"""Zero-shot perplexity: sequences as the data has them, and a model whose likelihood is known."""

import hashlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from scmdm.cli import main
from scmdm.config.diffusion import DiffusionConfig
from scmdm.data.manifest import Manifest, TokenizerRef
from scmdm.data.tokenizers import ByteTokenizer, CharacterTokenizer
from scmdm.diffusion.likelihood import Nelbo
from scmdm.errors import UserError
from scmdm.evaluation.divided_nelbo import NelboSettings
from scmdm.evaluation.zero_shot import ZeroShot, frame_texts, read_texts, zero_shot
from scmdm.models.dit import DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.model_files import LoadedModel, ModelSpec, allocate
from scmdm.sampling.model_loading import load

TOKENIZER = CharacterTokenizer("ab ")  # ids 4 to 6


def described(tokenizer, framing="records", pad_policy="ignore", bos_policy="given", length=8):
    with tempfile.TemporaryDirectory() as folder:
        digest = hashlib.sha256(tokenizer.save(Path(folder)).read_bytes()).hexdigest()
    return Manifest(
        version=2,
        name="test",
        tokenizer=TokenizerRef(tokenizer.kind, "tokenizer.json", digest),
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        length=length,
        dtype="uint16",
        pad_policy=pad_policy,
        bos_policy=bos_policy,
        splits={},
        framing=framing,
    )


def uniform(tmp_path, tokenizer, **options):
    """A fresh model: its output layer is zero, so that every token but the mask has the same probability."""
    manifest = described(tokenizer, **options)
    config = DiTConfig(width=16, layers=1, heads=2, condition_width=8)
    spec = ModelSpec(config, DiffusionConfig(), tokenizer.vocab_size, tokenizer.mask_id, manifest.length)
    model = spec.build()
    allocate(model, torch.device("cpu"))
    init_weights(model, 0)
    return LoadedModel(spec, tokenizer, manifest, tmp_path, model.eval())


def test_sequences_by_hand():
    texts = ["ab", "a b aba"]
    records = frame_texts(texts, TOKENIZER, described(TOKENIZER))
    assert records.tolist() == [[1, 4, 5, 2, 0, 0, 0, 0], [1, 4, 6, 5, 6, 4, 5, 2], [1, 4, 2, 0, 0, 0, 0, 0]]
    assert np.array_equal(records, frame_texts(texts, TOKENIZER, described(TOKENIZER, "packed")))
    blocks = frame_texts(texts, TOKENIZER, described(TOKENIZER, "concatenate", "loss"))
    assert blocks.tolist() == [[1, 4, 5, 2, 4, 6, 5, 2]]
    with pytest.raises(UserError, match="shorter than one block of 8"):
        frame_texts(["ab"], TOKENIZER, described(TOKENIZER, "concatenate", "loss"))
    with pytest.raises(UserError, match="unknown symbol 'c'"):
        frame_texts(["abc"], TOKENIZER, described(TOKENIZER))


WIKITEXT = " \n = Title = \n\n It is ( so ) , the 1 @,@ 000 boys ' . \n\n = = Part = = \n\n More ; it 's so . \n"
DETOKENIZED = ["", " = Title =\n", "", " It is (so), the 1,000 boys'.\n", "", " == Part ==\n", "", " More; it's so.\n"]


def published_blocks(rows, tokenizer, length, *, end_marks=True, group=1000):
    """MDLM's wrapping: each row and an end mark, joined by groups, cut, and framed by the two marks."""
    blocks = []
    for first in range(0, len(rows), group):
        stream = []
        for row in rows[first : first + group]:
            stream += tokenizer.encode(row) + ([tokenizer.eos_id] if end_marks else [])
        size = length - 2
        starts = range(0, len(stream) // size * size, size)
        blocks += [[tokenizer.bos_id, *stream[at : at + size], tokenizer.eos_id] for at in starts]
    return blocks


@pytest.mark.parametrize("end_marks", [True, False])
@pytest.mark.parametrize("group", [None, 1000, 3, 1])
def test_wikitext_as_published(tmp_path, end_marks, group):
    """Rows with their line feeds, an end mark behind each, empty ones included; or none, as in Duo's script."""
    path = tmp_path / "wiki.valid.raw"
    path.write_text(WIKITEXT)
    texts = read_texts(path, unit="rows", detokenize="wikitext")
    assert texts == DETOKENIZED
    manifest = described(ByteTokenizer(), "concatenate", "loss", "loss", length=10)
    found = frame_texts(texts, ByteTokenizer(), manifest, end_marks=end_marks, group=group)
    wanted = published_blocks(DETOKENIZED, ByteTokenizer(), 10, end_marks=end_marks, group=group or 10**9)
    assert found.tolist() == wanted


def test_end_marks_and_groups_belong_to_blocks():
    for keys in ({"end_marks": False}, {"group": 2}):
        with pytest.raises(UserError):
            frame_texts(["ab"], TOKENIZER, described(TOKENIZER), **keys)


def test_texts_are_padded_as_the_data():
    """With [EOS] where padding is [EOS]."""
    for policy, padding in (("eos", 2), ("masked", 0), ("loss", 0)):
        assert frame_texts(["ab"], TOKENIZER, described(TOKENIZER, pad_policy=policy))[0, 4:].tolist() == [padding] * 4


@pytest.mark.parametrize("policy", ["ignore", "masked", "loss"])
def test_padding_counts_as_in_the_data(tmp_path, policy):
    found = zero_shot(uniform(tmp_path, TOKENIZER, pad_policy=policy), ["ab"] * 3)
    assert found.nelbo.tokens == 3 * (7 if policy == "loss" else 3)


@pytest.mark.parametrize("policy", ["ignore", "loss"])
def test_perplexity_per_word_is_that_of_all_that_counts(tmp_path, policy):
    """Padding that counts enlarges the number of tokens and lowers the mean: their product is the text's likelihood."""
    found = zero_shot(uniform(tmp_path, TOKENIZER, pad_policy=policy), ["ab", "a b", "ab a"])
    assert math.log(found.word_perplexity) == pytest.approx(found.nelbo.mean * found.nelbo.tokens / 5)


@pytest.mark.parametrize("framing", ["records", "concatenate"])
def test_a_uniform_model_has_the_entropy_of_its_vocabulary(tmp_path, framing):
    """Every token costs log(V - 1) whatever is masked: the estimate's error is that of how much is masked."""
    pad_policy = "loss" if framing == "concatenate" else "ignore"
    loaded = uniform(tmp_path, TOKENIZER, framing=framing, pad_policy=pad_policy, length=34)
    texts = ["ab ba " * 20] * 40
    found = zero_shot(loaded, texts, NelboSettings(draws=8))
    assert found.nelbo.mean == pytest.approx(math.log(TOKENIZER.vocab_size - 1), abs=max(4 * found.nelbo.stderr, 0.02))
    counted = 121 if framing == "concatenate" else 124  # each of the four pieces of a record has an [EOS]
    assert found.tokens_per_word == counted / 40
    assert found.word_perplexity == pytest.approx(found.perplexity ** (counted / 40))
    valid = frame_texts(texts, TOKENIZER, loaded.manifest) != TOKENIZER.pad_id
    assert found.nelbo.tokens == valid.sum() - len(valid), "padding and the given beginning do not count"


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a @-@ b"}) + "\n")
    assert read_texts(tmp_path) == ["one\n\ntwo", "a @-@ b"]
    assert read_texts(tmp_path / "a.txt", unit="lines") == ["one", "two"]
    assert read_texts(tmp_path / "b.jsonl", detokenize="wikitext") == ["a-b"]
    with pytest.raises(UserError, match=r"no key body"):
        read_texts(tmp_path / "b.jsonl", key="body")


def test_bytes_need_no_vocabulary(tmp_path):
    found = zero_shot(uniform(tmp_path, ByteTokenizer(), length=32), ["Grüße, 世界! " * 9] * 9, NelboSettings(draws=4))
    assert found.nelbo.mean == pytest.approx(math.log(259), rel=0.1)


def test_texts_each_with_its_own_keys(tmp_path):
    """By the command line: rows of a column, detokenized, beside a plain path."""
    rows = (json.dumps({"line": f"they did n't sell {i}"}) + "\n" for i in range(9))
    (tmp_path / "ptb.jsonl").write_text("".join(rows))
    (tmp_path / "plain.txt").write_text("".join(f"they didn't sell {i}\n" for i in range(60)))
    (tmp_path / "empty.yaml").write_text("{}")
    empty, data, run, out = (tmp_path / name for name in ("empty.yaml", "data", "run", "found.json"))
    keys = [
        "source.name=text",
        f"source.path={tmp_path / 'plain.txt'}",
        "tokenizer.name=bytes",
        "length=32",
        "source.unit=lines",
    ]
    fractions = ["validation_fraction=0.2", "test_fraction=0.2", "deduplicate=false"]
    assert main(["prepare", str(empty), *keys, *fractions, f"out={data}", "workers=1"]) == 0
    small = ["model.width=16", "model.layers=1", "model.heads=2", "train.steps=1", "train.global_batch_size=8"]
    micro = "train.micro_batch_size=8"
    assert main(["train", str(empty), f"data.path={data}", f"run_dir={run}", *small, micro]) == 0
    own = f"{{path: {tmp_path / 'ptb.jsonl'}, key: line, detokenize: ptb, end_marks: true, group: null}}"
    texts = f"texts={{ptb: {own}, plain: {tmp_path / 'plain.txt'}}}"
    assert main(["evaluate", str(run), "num=0", "nelbo_samples=0", f"out={out}", texts]) == 0
    found = json.loads(out.read_text())["zero_shot"]
    expected = zero_shot(load(run), [f"they didn't sell {i}" for i in range(9)], NelboSettings(draws=4, t_min=1e-4))
    assert found["ptb"]["null"]["perplexity"] == pytest.approx(expected.perplexity)
    assert set(found) == {"ptb", "plain"}


def test_padding_of_texts_counts_as_that_of_held_out_data(tmp_path, capsys):
    """`ab` is [BOS] a b [EOS], of which three tokens are predicted, and 28 of padding follow."""
    (tmp_path / "plain.txt").write_text("".join(f"line {i}\n" for i in range(60)))
    (tmp_path / "ab.txt").write_text("ab")
    (tmp_path / "empty.yaml").write_text("{}")
    empty, data, run, out = (tmp_path / name for name in ("empty.yaml", "data", "run", "found.json"))
    keys = ["source.name=text", f"source.path={tmp_path / 'plain.txt'}", "source.unit=lines", "tokenizer.name=bytes"]
    assert main(["prepare", str(empty), *keys, "length=32", "pad_policy=loss", f"out={data}", "workers=1"]) == 0
    small = ["model.width=16", "model.layers=1", "model.heads=2", "train.steps=1", "train.global_batch_size=8"]
    own = ["train.micro_batch_size=8", "train.padding=batch", "train.pad_multiple=8"]
    assert main(["train", str(empty), f"data.path={data}", f"run_dir={run}", *small, *own]) == 0

    def counted(*more):
        texts = f"texts={{a: {tmp_path / 'ab.txt'}}}"
        assert main(["evaluate", str(run), "num=0", "nelbo_samples=0", f"out={out}", texts, *more]) == 0
        return json.loads(out.read_text())["zero_shot"]["a"]["null"]["nelbo"]["tokens"]

    keyed = f"texts={{a: {{path: {tmp_path / 'ab.txt'}, key: body}}}}"
    capsys.readouterr()
    assert main(["evaluate", str(run), "num=0", "nelbo_samples=0", f"out={out}", keyed]) == 1
    error = capsys.readouterr().err
    assert "texts.a.key=body" in error and str(tmp_path / "ab.txt") in error and "source." not in error
    assert counted() == 7 and counted("pad_multiple=4") == 3 and counted("padding=length") == 31
    assert counted("padding=length", "nelbo_padding=false") == 3


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("{a: {path: x, detokenise: ptb}}", "detokenise"),
        ("{a: {path: x, detokenize: penn}}", "must be one of none, wikitext, lm1b, ptb"),
        ("{a: {key: x}}", "path"),
        ("{a: 3}", "texts.a=3 is not possible"),
    ],
)
def test_mistakes_in_texts(tmp_path, capsys, texts, message):
    assert main(["evaluate", str(tmp_path), f"texts={texts}"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_perplexity_beyond_floating_point_is_infinite():
    nelbo = Nelbo(2.0, 0.1, 400, 1)
    assert ZeroShot(nelbo, 400.0).word_perplexity == math.inf and Nelbo(800.0, 0.1, 1, 1).perplexity == math.inf
    assert ZeroShot(nelbo, 2.0).word_perplexity == pytest.approx(math.exp(4))
