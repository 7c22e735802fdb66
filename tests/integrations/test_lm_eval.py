"""lm-eval on models of ours: tasks in its own format, on a model whose likelihood is known and on random ones."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file

import scmdm
from scmdm.checkpoint.seal import seal
from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.sampling import SamplerConfig
from scmdm.data.tokenizers import CharacterTokenizer
from scmdm.diffusion.state import State
from scmdm.errors import UserError
from scmdm.models.dit import DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.model_files import WEIGHTS_FILE, ModelSpec, allocate, write_model_files
from scmdm.sampling.generation import generate
from scmdm.sampling.templates import make_template
from tests.evaluation.test_zero_shot import described

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from scmdm.integrations import lm_eval as harness

TOKENIZER = CharacterTokenizer("ab ")
LENGTH = 16
LOG_P = {"a": math.log(0.6), "b": math.log(0.3), " ": math.log(0.1)}


def export(tmp_path, name, *, known=False, self_conditioned=False, spread=0.3, length=LENGTH):
    """A model directory. `known`: every token is one of `LOG_P`, whatever is around it; else random weights."""
    place = tmp_path / name
    place.mkdir()
    manifest = described(TOKENIZER, length=length)
    config = DiTConfig(width=16, layers=1, heads=2, condition_width=8, self_conditioned=self_conditioned)
    spec = ModelSpec(config, DiffusionConfig(), TOKENIZER.vocab_size, TOKENIZER.mask_id, length)
    model = spec.build()
    allocate(model, torch.device("cpu"))
    init_weights(model, 0)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if known:
            model.head()[1].copy_(torch.tensor([*[-40.0] * 4, *LOG_P.values()]))
        for parameter in () if known else model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=dice)
    write_model_files(place, spec, manifest, TOKENIZER.save(tmp_path))
    save_file({key: value.detach().contiguous() for key, value in model.named_parameters()}, place / WEIGHTS_FILE)
    seal(place)
    return place


def asked(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)]


def log_p(text):
    return sum(LOG_P[symbol] for symbol in text)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{context}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["b"], max_gen_toks: 4}}
{more}
"""
TASKS = {
    "choices": ["output_type: multiple_choice", "doc_to_choice: choices", "doc_to_target: right", "metric: acc"],
    "generation": ["output_type: generate_until", "doc_to_target: text", "metric: exact_match"],
    "rolling": ["output_type: loglikelihood_rolling", "doc_to_target: text", "metric: byte_perplexity"],
}
DOCS = [  # "a" is likelier than "b", "ab" than "bb" and "b "
    {"context": "ab ", "choices": ["b", "a"], "right": 1, "text": "aaaa"},
    {"context": "b" * 40, "choices": ["ab", "bb", "b "], "right": 0, "text": "aaab"},
    {"context": "a", "choices": ["a", "aa"], "right": 1, "text": "aaaa"},
]


def test_tasks_of_the_harness(tmp_path):
    """By its own evaluation: two of three right, for a model without any context and a context that is cut."""
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, (*lines, metric) in TASKS.items():
        more = "\n".join([*lines, f"metric_list: [{{{metric}}}]"])
        text = TASK.format(name=name, data=tmp_path / "docs.jsonl", cache=tmp_path / "cache", more=more)
        (tmp_path / f"{name}.yaml").write_text(text)
    results = simple_evaluate(
        model="scmdm",
        model_args={"path": str(export(tmp_path, "known", known=True)), "draws": 15, "precision": "float32"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size="2",  # as the command line gives it
        device=None if torch.cuda.is_available() else "cuda:0",  # what the command line asks for
        bootstrap_iters=0,
    )["results"]
    assert results["choices"]["acc,none"] == pytest.approx(2 / 3)
    assert results["generation"]["exact_match,none"] == pytest.approx(2 / 3)
    mean = sum(log_p(doc["text"]) for doc in DOCS) / sum(len(doc["text"]) for doc in DOCS)
    assert results["rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-4)


@pytest.mark.parametrize("tail", ["masked", "none"])
def test_likelihoods_and_greediness_that_are_known(tmp_path, tail):
    model = harness.MaskedDiffusionLM(
        export(tmp_path, "known", known=True), draws=30, tail=tail, precision="float32", device="cpu"
    )
    pairs = [("", "aa"), ("ab", "b a"), ("b" * 99, "aaa"), ("a", "ab" * 20), ("b", "a" * 15)]
    found = model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    # Of 15 tokens 30 states are drawn: their numbers of masks are stratified, each twice, so that they add up exactly
    # only in the mean of which tokens are masked.
    for (_, text), (value, greedy) in zip(pairs, found, strict=True):
        exact = len(text) < 5 or set(text) == {"a"}
        assert value == pytest.approx(log_p(text), rel=1e-5 if exact else 0.2)
        assert greedy == (set(text) == {"a"})
    rolling = model.loglikelihood_rolling(asked("loglikelihood_rolling", ("aaaa",), ("a" * 40,)), disable_tqdm=True)
    assert rolling == pytest.approx([log_p("aaaa"), log_p("a" * 40)], rel=1e-5)


def test_a_request_has_the_same_result_in_any_batch(tmp_path):
    """A self-conditioned model with random weights; and what it is conditioned on makes a difference."""
    place = export(tmp_path, "random", self_conditioned=True)
    pairs = [("ab", "ba ab ba"), ("ab", "ba ab bb"), ("a", "b"), ("ba b", "ba ab ba"), ("", "ab" * 20)]
    prompts = [(text, {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 3.0}) for text in ("a", "b a")]
    prompts.append(prompts[0])

    def results(pairs, prompts, **options):
        model = harness.MaskedDiffusionLM(place, draws=16, precision="float32", device="cpu", steps=5, **options)
        scores = model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
        return scores, model.generate_until(asked("generate_until", *prompts), disable_tqdm=True)

    for tail in ("masked", "none"):
        scores, texts = results(pairs, prompts, tail=tail)
        again, same = results(pairs[::-1], prompts[1:], tail=tail, batch_size=4)
        assert [greedy for _, greedy in again[::-1]] == [greedy for _, greedy in scores]
        assert [score for score, _ in again[::-1]] == pytest.approx([score for score, _ in scores], rel=1e-4)
        assert same == [texts[1], texts[0]]
        assert texts[2] != texts[0], "a request that is repeated is another draw"
        plain, _ = results(pairs, [], tail=tail, carry="never")
        assert all(abs(a[0] - b[0]) > 1e-4 for a, b in zip(scores, plain, strict=True))


def test_windows_by_hand():
    assert harness.windows([1, 2, 3], [4, 5], 4) == [([2, 3], [4, 5])]
    assert harness.windows([1], [2, 3, 4], 2) == [([], [2, 3]), ([3], [4])]
    assert harness.windows([1], [], 2) == []


def test_mistakes_end_with_a_reason(tmp_path, monkeypatch, capsys):
    place = export(tmp_path, "known", known=True)
    for options, reason in (
        ({"tail": "long"}, "tail='long' is not possible"),
        ({"draws": 0}, "draws=0 is not possible"),
        ({"batch_size": "many"}, "batch_size='many' in the arguments"),
        ({"stepz": 3}, "unknown key `stepz`"),
        ({"carry": "always"}, "carry=always, but the model is not self-conditioned"),
        ({"path": tmp_path / "nothing"}, "nothing does not exist"),
    ):
        with pytest.raises(UserError, match=reason):
            harness.MaskedDiffusionLM(**{"path": place, "device": "cpu", **options})
    model = harness.MaskedDiffusionLM(place, device="cpu")
    with pytest.raises(UserError, match="unknown symbol 'c'"):
        model.loglikelihood(asked("loglikelihood", ("a", "c")), disable_tqdm=True)
    monkeypatch.setattr(sys, "argv", ["harness"])
    monkeypatch.setattr(harness, "cli_evaluate", lambda: harness.MaskedDiffusionLM(tmp_path / "nothing"))
    assert harness.main() == 1
    assert capsys.readouterr().err.startswith("scmdm: error: ")
    assert scmdm.load(place, device="cpu").spec.length == LENGTH


@torch.no_grad()
def cross_entropy(model, z, x, at, estimates=(None, None), *, guidance=1.0, plain_z=None):
    """Plain likelihood of the tokens `x` at positions `at`, of the guided distribution if there is a plain input."""
    logits = []
    for row, estimate in zip((z, plain_z), estimates, strict=True):
        if row is not None:
            state = State(torch.tensor([row]), torch.ones(1), estimate)
            logits.append(model.logits(model.hidden(state)[0]).double()[at])
    mixed = logits[0] if plain_z is None else logits[1] + guidance * (logits[0] - logits[1])
    mixed[:, TOKENIZER.mask_id] = -math.inf
    return float(-mixed.log_softmax(1).gather(1, torch.tensor(x)[at][:, None]).sum())


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("cfg", [0.0, 0.5])
def test_likelihoods_with_and_without_bos_and_guidance(tmp_path, cfg, bos):
    """Against the sum over all masked states in plain code, as LLaDA is evaluated."""
    place = export(tmp_path, "random")
    model = harness.MaskedDiffusionLM(
        place, draws=7, tail="none", cfg=cfg, add_bos_token=bos, precision="float32", device="cpu"
    )
    network = model._loaded.model
    context, continuation = TOKENIZER.encode("ab a"), TOKENIZER.encode("bab")
    prompt = [TOKENIZER.bos_id, *context] if bos else context
    x, mask, expected = [*prompt, *continuation], TOKENIZER.mask_id, 0.0
    for chosen in range(1, 8):
        at = [len(prompt) + i for i in range(3) if chosen >> i & 1]
        z = [mask if i in at else token for i, token in enumerate(x)]
        plain = [mask] * len(prompt) + z[len(prompt) :] if cfg else None
        nll = cross_entropy(network, z, x, at, guidance=cfg + 1, plain_z=plain)
        expected -= nll / (len(at) * math.comb(3, len(at)))
    found = model.loglikelihood(asked("loglikelihood", ("ab a", "bab")), disable_tqdm=True)
    assert found[0][0] == pytest.approx(expected, rel=1e-4)
    assert model.max_length == LENGTH - bos


def test_a_guided_likelihood_of_a_self_conditioned_model_has_its_own_estimates(tmp_path):
    model = harness.MaskedDiffusionLM(
        export(tmp_path, "random", self_conditioned=True),
        draws=1, tail="none", cfg=1.0, precision="float32", device="cpu",
    )  # fmt: skip
    network, mask = model._loaded.model, TOKENIZER.mask_id
    x = [TOKENIZER.bos_id, *TOKENIZER.encode("aba")]
    z, plain = [*x[:3], mask], [mask] * 4
    estimates = [network.estimate(State(torch.tensor([row]), torch.ones(1))) for row in (z, plain)]
    expected = cross_entropy(network, z, x, [3], estimates, guidance=2.0, plain_z=plain)
    found = model.loglikelihood(asked("loglikelihood", ("ab", "a")), disable_tqdm=True)
    assert found[0][0] == pytest.approx(-expected, rel=1e-4)


def test_greedy_decoding_can_be_left_out(tmp_path):
    place = export(tmp_path, "known", known=True)
    for check in (True, False):
        model = harness.MaskedDiffusionLM(place, is_check_greedy=check, draws=7, precision="float32", device="cpu")
        found = model.loglikelihood(asked("loglikelihood", ("b", "aa"), ("", "b")), disable_tqdm=True)
        assert [greedy for _, greedy in found] == [check, False]
        assert [value for value, _ in found] == pytest.approx([log_p("aa"), log_p("b")], rel=1e-5)


LLADA = {"transfer": "even", "block_start": "prompt", "block_length": 3, "steps": 4, "tail": "none", "draws": 1}


@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize("bos", [True, False])
def test_generation_has_a_fixed_length_and_the_settings_of_llada(tmp_path, cfg, bos):
    """Prompts of different lengths in one batch are decoded as each is alone by the sampler."""
    place = export(tmp_path, "random", self_conditioned=True, spread=1.0)
    keys = {**LLADA, "gen_length": 6, "cfg": cfg, "add_bos_token": bos, "precision": "float32", "device": "cpu"}
    prompts = [(text, {"until": ["b"], "max_gen_toks": 2}) for text in ("a", "b a b", "aab ", "a" * 40)]
    model = harness.MaskedDiffusionLM(place, batch_size=4, escape_until=True, **keys)
    texts = model.generate_until(asked("generate_until", *prompts), disable_tqdm=True)
    loaded = scmdm.load(place, device="cpu")
    sampler = SamplerConfig(
        kind="confidence", temperature=0.0, guidance=cfg + 1, guided_by="prompt",
        **{key: LLADA[key] for key in ("transfer", "block_start", "block_length", "steps")},
    )  # fmt: skip
    for (context, _), text in zip(prompts, texts, strict=True):
        shown = context[-(LENGTH - bos - 6) :]
        template = make_template(TOKENIZER, LENGTH, shown, None, bos_given=False, add_bos=bos, gen_length=6)
        drawn = generate(loaded, sampler, num=1, seed=0, templates_PL=template[None], precision="float32")
        assert (shown + text) == drawn.texts[0]
    assert len({symbol for text in texts for symbol in text}) > 1
    stopped = harness.MaskedDiffusionLM(place, batch_size=1, **keys)
    found = stopped.generate_until(asked("generate_until", *prompts), disable_tqdm=True)
    assert found == [text.partition("b")[0] for text in texts]


def test_what_does_not_fit_is_counted(tmp_path, capsys):
    place = export(tmp_path, "random", spread=1.0)
    model = harness.MaskedDiffusionLM(place, steps=2, precision="float32", device="cpu")
    prompts = [("a", 2), ("b", 3), ("a" * 60, 2), ("a", LENGTH)]
    requests = [(text, {"until": [], "max_gen_toks": most}) for text, most in prompts]
    model.generate_until(asked("generate_until", *requests), disable_tqdm=True)
    lines = capsys.readouterr().err.splitlines()
    assert ["1 of 4" in line for line in lines] == [True, True] and "max_gen_toks" in lines[1]
    model.generate_until(asked("generate_until", *requests[:2]), disable_tqdm=True)
    assert capsys.readouterr().err == ""


def test_an_answer_ends_at_any_end_token(tmp_path):
    place = export(tmp_path, "random", spread=1.0)
    keys = {"steps": 6, "precision": "float32", "device": "cpu", "gen_length": 8}
    prompts = [(text, {"until": []}) for text in ("a", "b a", "ba")]
    free = harness.MaskedDiffusionLM(place, **keys).generate_until(asked("generate_until", *prompts), disable_tqdm=True)
    end = free[0][3]
    model = harness.MaskedDiffusionLM(place, end_tokens=[end], **keys)
    ended = model.generate_until(asked("generate_until", *prompts), disable_tqdm=True)
    assert ended == [text.partition(end)[0] for text in free] != free


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"gen_length": 99}, "gen_length=99"),
        ({"cfg": -1}, "cfg=-1"),
        ({"guidance": 2.0}, "guidance=2.0"),
        ({"guided_by": "prompt"}, "guided_by="),
        ({"end_tokens": ["<|im_end|>"]}, "<|im_end|>"),
        ({"add_bos_token": "perhaps"}, "add_bos_token="),
    ],
)
def test_arguments_that_are_not_possible(tmp_path, options, name):
    with pytest.raises(UserError) as caught:
        harness.MaskedDiffusionLM(export(tmp_path, "known", known=True), device="cpu", **options)
    assert name in str(caught.value)
