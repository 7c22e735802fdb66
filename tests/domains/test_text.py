"""Text metrics: n-gram model by hand and by enumeration, perplexity under a real causal model, entropy."""

import math

import numpy as np
import pytest
import torch

from scmdm.data.manifest import Manifest
from scmdm.domains.interface import EvaluationSettings, GeneratedSamples
from scmdm.domains.text.causal_scorer import load_scorer
from scmdm.domains.text.config import PlainTextMetricKeys
from scmdm.domains.text.domain import TextDomain
from scmdm.domains.text.metrics import (
    NgramScorer,
    distinct_n,
    evaluate_text,
    generative_perplexity,
    known_words,
    text_perplexity,
    text_values,
    unigram_entropies,
    whole_words,
)
from scmdm.domains.text.ngram import NgramModel
from scmdm.errors import UserError
from tests.data.sets import write_texts

TEXTS = ["the cat sat on the mat and the dog sat on the cat", "a dog and a cat sat on a mat"] * 2 + ["the end of it"]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("split", [list, str.split])
def test_probabilities_sum_to_one_in_every_context(order, split):
    model = NgramModel.fit(TEXTS, order=order, split=split)
    units = list(dict.fromkeys(u for text in TEXTS for u in split(text)))
    contexts = [tuple(units[i : i + order - 1]) for i in range(6)] + [("never", "seen", "before", "here")[: order - 1]]
    contexts += [tuple(split(TEXTS[0])[: order - 1]), ("<s>",) * (order - 1)]
    for context in contexts:
        assert sum(model.probability(u, context) for u in model.vocabulary) == pytest.approx(1.0)
        assert all(model.probability(u, context) > 0 for u in model.vocabulary)


def test_bigram_by_hand():
    """Corpus "a b a b a c": with counts of counts that are too few, the discounts are 0.5, 1 and 1.5.

    Bigrams <s>a 1, ab 2, ba 2, ac 1. Continuations of a: 2 (<s>, b), b: 1, c: 1; total 4.
    p1(b) = (1 - 0.5 + freed * 1/4) / 4 with freed = 0.5 * 2 + 1 * 1 = 2 and four units (a, b, c, <unk>).
    p(b | a) = (2 - 1 + freed * p1(b)) / 3 with freed = 1 (for ab) + 0.5 (for ac).
    """
    model = NgramModel.fit(["ababac"], order=2)
    unigram = (1 - 0.5 + 2 * 0.25) / 4
    assert model.probability("b", ()) == pytest.approx(unigram)
    assert model.probability("b", ("a",)) == pytest.approx((2 - 1 + 1.5 * unigram) / 3)
    assert model.probability("z", ("a",)) == pytest.approx(1.5 * (2 * 0.25 / 4) / 3)
    assert model.log_prob("ab")[1] == 2


def test_familiar_text_is_less_surprising():
    model = NgramModel.fit(TEXTS, order=5)
    likely, unlikely = (model.log_prob(text) for text in ("the dog sat on the mat", "tam eht no tas god eht"))
    assert likely[0] > unlikely[0] and likely[1] == unlikely[1] == 22
    assert model.log_prob("") == (0.0, 0)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A small random GPT-2 with a word tokenizer, saved as anyone would."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = sorted({w for text in TEXTS for w in text.split()})
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{w: i + 1 for i, w in enumerate(words)}}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("scorer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words) + 1, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def test_generative_perplexity_equals_a_plain_loop(scorer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(scorer).eval(), AutoTokenizer.from_pretrained(scorer)
    nll, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:8]])
        with torch.no_grad():
            nll += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    ours = generative_perplexity([*TEXTS, "", "cat"], load_scorer(scorer), batch_size=2, max_length=8)
    assert ours.value() == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert ours.array[1].tolist()[-2:] == [0, 0]


def test_a_scorer_reads_no_more_than_it_has_positions_for(scorer):
    scorer = load_scorer(scorer)
    long = " ".join(TEXTS * 3)
    cut = " ".join(long.split()[:32])
    both = [generative_perplexity([text], scorer).value() for text in (long, cut)]
    assert both[0] == pytest.approx(both[1])
    values = text_values([long], np.array([[5, 6]]), 0, text_perplexity([long], scorer))
    assert "the first 32 tokens" in evaluate_text(values, scorer)["scorer"]


@pytest.mark.parametrize("policy", ["loss", "eos"])
def test_the_entropy_leaves_out_what_the_data_set_is_padded_with(tmp_path, policy):
    root = write_texts(tmp_path / "data", 100, pad_policy=policy)
    manifest = Manifest.read(root)
    tokens = torch.full((1, manifest.length), manifest.padding_id)
    tokens[0, :4] = torch.tensor([manifest.bos_id, 5, 6, manifest.eos_id])
    drawn = GeneratedSamples(tokens, ["bc"], [True], [1], 1.0)
    found = TextDomain(root, manifest, PlainTextMetricKeys(), EvaluationSettings()).measure(drawn).metrics
    assert found["entropy"] == pytest.approx(math.log(3 if policy == "eos" else 4))


def test_scorers_that_are_not(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_scorer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_scorer(tmp_path)


def test_entropy_and_distinct():
    ids = np.array([[5, 5, 5, 5], [5, 6, 0, 0], [5, 6, 7, 8]])
    assert unigram_entropies(ids, pad_id=0) == pytest.approx([0, math.log(2), math.log(4)])
    found = distinct_n(["a b a b", "a b"], 2)
    assert found.value() == pytest.approx(2 / 4) and found.array.tolist() == [[1.5, 0.5], [3, 1]]
    assert distinct_n(["one"], 2).value() is None


def test_known_words_by_hand():
    """Whole words alone: the first and the last may be cut. An apostrophe within a word belongs to it."""
    assert whole_words("king, The KING'S men went. An") == ["the", "king's", "men", "went"]
    assert whole_words(" The king ") == ["the", "king"] and whole_words("king") == whole_words("") == []
    assert whole_words("1 Grüße 2 d\u2019Arc x2y 'tis' ") == ["grüße", "d\u2019arc", "x", "y", "tis"]
    found = known_words([" the king ", " the the qing ", "x"], {"the", "king"})
    assert found.array.tolist() == [[2, 2, 0], [2, 3, 0]] and found.value() == pytest.approx(4 / 5)


def test_the_scorer_is_always_named(scorer):
    for own, named in ((load_scorer(scorer), "transformers"), (NgramScorer.fit(TEXTS, "a"), "not a neural scorer")):
        values = text_values(TEXTS, np.array([[5, 6]]), 0, text_perplexity(TEXTS, own))
        assert named in evaluate_text(values, own)["scorer"]
