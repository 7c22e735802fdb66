"""MDLM's and Duo's generative perplexity and entropy, against a plain implementation of their rule."""

import json
import math

import numpy as np
import pytest
import torch

from scmdm.cli import main
from scmdm.config.evaluation import EvaluateConfig
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from scmdm.domains.domain_registry import metrics_config
from scmdm.domains.interface import EvaluationSettings, GeneratedSamples
from scmdm.domains.text.causal_scorer import load_scorer
from scmdm.domains.text.config import PlainTextMetricKeys
from scmdm.domains.text.domain import TextDomain
from scmdm.domains.text.metrics import generative_perplexity, mdlm_perplexity, mdlm_text, unigram_entropies
from scmdm.errors import UserError

END = "<|endoftext|>"
CORPUS = "the dog's tail , it is said . was long ! did n't the cat ' s ? yes , they 've seen it we 're told I 'm sure "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random GPT-2 of 12 positions with a byte-level tokenizer, which is also that of the model."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("gpt2")
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([CORPUS] * 3, vocab_size=300, special_tokens=[END], show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, bos_token=END, eos_token=END, unk_token=END
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=12, initializer_range=0.5, bos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def plain(samples, folder, length):
    """The published rule: decode everything, tokenize again, truncate, pad, score chunks, leave out ends of text.

    MDLM's code pads all samples with the end of text to the longest; here each is alone, so that none has padding.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    nll, count = 0.0, 0
    for sample in samples:
        text = tokenizer.decode(sample, clean_up_tokenization_spaces=True)
        ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        for chunk in torch.split(ids, 12, dim=-1):
            with torch.no_grad():
                log_p = model(chunk).logits[:, :-1].log_softmax(-1)
            is_end = chunk == tokenizer.eos_token_id
            kept = ((is_end.cumsum(-1) == 1) | ~is_end)[:, 1:]
            nll -= float((log_p.gather(2, chunk[:, 1:, None])[..., 0] * kept).sum())
            count += int(kept.sum())
    return math.exp(nll / count)


def samples_of(tokenizer):
    """Samples with a leading end of text, one inside, at the end, several, and none at all."""
    text = tokenizer.encode(CORPUS)
    end = [tokenizer.eos_id]
    return [
        [*end, *text[:18], *end],
        [*end, *text[5:12], *end, *text[20:30], *end],
        [*text[3:11], *end, *text[:11]],
        [*text[:20]],
        [*end, *end, *text[10:14], *end, *end, *text[:12]],
    ]


def rows(samples):
    """Equal lengths, with what a model may draw."""
    longest = max(map(len, samples))
    return np.array([[*row, *([row[1]] * (longest - len(row)))] for row in samples])


@pytest.mark.parametrize("length", [8, 12, 20])
def test_generative_perplexity_equals_the_published_rule(folder, length):
    tokenizer = HuggingFaceTokenizer.from_files(folder, padded=False)
    ids = rows(samples_of(tokenizer))[:, :length]
    found = mdlm_perplexity(ids, tokenizer, load_scorer(folder), batch_size=2)
    assert found.value() == pytest.approx(plain(ids.tolist(), folder, length), rel=1e-5)
    assert len(found.array[1]) == len(ids)


def test_what_counts_by_hand(folder):
    """The first real token after a leading end of text counts, later ends of text do not, an inner first one does."""
    tokenizer, scorer = HuggingFaceTokenizer.from_files(folder, padded=False), load_scorer(folder)
    word, end = tokenizer.encode(" the")[:1], [tokenizer.eos_id]
    counts = mdlm_perplexity(np.array([end + word * 3 + end, word * 3 + end + word, end * 5]), tokenizer, scorer)
    assert counts.array[1].tolist() == [3, 4, 0]
    text = tokenizer.decode(word * 3)
    assert generative_perplexity([text], scorer).array[1].tolist() == [2], "a text alone has its first token unscored"


def test_spaces_that_decoding_removes(folder):
    tokenizer = HuggingFaceTokenizer.from_files(folder, padded=False)
    ids = tokenizer.encode("a , b . c ! d ? it ' s 's did n't I 'm they 've we 're")
    found = mdlm_text([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.eos_id], tokenizer, END)
    assert found == f"{END}a, b. c! d? it's's didn't I'm they've we're{END}{END}"


def test_padding_is_left_out_of_the_text_but_not_of_the_entropy():
    ids = np.array([[1, 5, 5, 2, 0, 0, 0, 0]])
    shares = [1 / 8, 2 / 8, 1 / 8, 4 / 8]
    assert unigram_entropies(ids, pad_id=-1) == pytest.approx([-sum(p * math.log(p) for p in shares)])
    assert unigram_entropies(np.array([[7, 7, 8, 9]]), pad_id=-1) == pytest.approx([1.5 * math.log(2)])


def test_the_entropy_of_the_protocol_is_that_of_the_whole_sample(folder, tmp_path, empty_yaml):
    keys = ["source.name=text", f"source.path={tmp_path / 'plain.txt'}", f"tokenizer.path={folder}", "length=12"]
    keys += ["tokenizer.name=huggingface", "workers=1", "held_out_last=1", "source.unit=lines"]
    (tmp_path / "plain.txt").write_text("".join(f"the dog{end}\n" for end in ("", "'s tail", " , it is said")))
    assert main(["prepare", str(empty_yaml), *keys, f"out={tmp_path / 'data'}"]) == 0
    manifest = Manifest.read(tmp_path / "data")
    text = load_tokenizer(tmp_path / "data" / manifest.tokenizer.file).encode("the dog")
    ids = [manifest.bos_id, *text, manifest.eos_id]
    ids += [manifest.pad_id] * (12 - len(ids))
    drawn = GeneratedSamples(torch.tensor([ids]), ["the dog"], [True], [1], 1.0)
    for protocol, pad_id in (("mdlm", -1), ("text", manifest.pad_id)):
        config = PlainTextMetricKeys(scorer=str(folder), protocol=protocol)
        found = TextDomain(tmp_path / "data", manifest, config, EvaluationSettings()).measure(drawn).metrics
        assert found["entropy"] == pytest.approx(unigram_entropies(np.array([ids]), pad_id=pad_id)[0])


def test_the_setting(folder, tmp_path):
    assert metrics_config("text", {"scorer": str(folder), "protocol": "mdlm"}).protocol == "mdlm"
    with pytest.raises(UserError):
        metrics_config("text", {"protocol": "mdlm"})
    with pytest.raises(UserError):
        metrics_config("text", {"scorer": str(folder), "protocol": "published"})
    assert EvaluateConfig().metrics == {}


@pytest.mark.slow
def test_the_command_reports_it(folder, tmp_path, empty_yaml):
    """A model of blocks, evaluated by both protocols: other figures, and the protocol in the scorer's label."""
    data, run = tmp_path / "data", tmp_path / "run"
    keys = ["source.name=text", f"source.path={tmp_path / 'plain.txt'}", "source.unit=lines", "deduplicate=false"]
    keys += [f"tokenizer.path={folder}", "tokenizer.name=huggingface", "framing=concatenate", "length=12", "workers=1"]
    keys += ["held_out_last=20", "bos_policy=given"]  # samples begin with an end of text
    (tmp_path / "plain.txt").write_text(f"{CORPUS}\n" * 60)
    assert main(["prepare", str(empty_yaml), *keys, f"out={data}"]) == 0
    small = ["model.width=16", "model.layers=1", "model.heads=2", "train.steps=1", "train.global_batch_size=8"]
    train = ["train", str(empty_yaml), f"data.path={data}", f"run_dir={run}", *small, "train.micro_batch_size=8"]
    assert main(train) == 0
    values = {}
    for protocol in ("text", "mdlm"):
        out = tmp_path / f"{protocol}.json"
        own = ["num=8", "nelbo_samples=0", "sampler.steps=4", "split=validation", f"metrics.scorer={folder}"]
        assert main(["evaluate", str(run), *own, f"metrics.protocol={protocol}", f"out={out}"]) == 0
        values[protocol] = json.loads(out.read_text())["samples"][0]["metrics"]
    assert values["text"]["perplexity"] != values["mdlm"]["perplexity"]
    assert values["text"]["entropy"] == values["mdlm"]["entropy"], "blocks have no padding"
    assert "protocol mdlm" in values["mdlm"]["scorer"] and "protocol" not in values["text"]["scorer"]
