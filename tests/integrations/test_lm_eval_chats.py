"""lm-eval with `--apply_chat_template`: conversations reach the model as the tokenizer's chat template writes them."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from scmdm.checkpoint.seal import seal
from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.sampling import SamplerConfig
from scmdm.data.tokenizers import HuggingFaceTokenizer
from scmdm.data.tokenizers.chat_template import Turn
from scmdm.errors import UserError
from scmdm.models.dit import DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.model_files import WEIGHTS_FILE, ModelSpec, allocate, write_model_files
from scmdm.sampling.generation import generate
from scmdm.sampling.model_loading import load
from scmdm.sampling.templates import make_model_template
from tests.chat_tokenizers import write_chat_tokenizer
from tests.evaluation.test_zero_shot import described

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from scmdm.integrations import lm_eval as harness

LENGTH = 256
ASKED = "is <|im_end|> or <|eot_id|> a token?"


def chat_model(tmp_path, kind, framing="chats"):
    """A random model, with a chat template or, as without `kind`, none."""
    folder = write_chat_tokenizer(tmp_path / "tokenizer", kind or "llada")
    tokenizer = HuggingFaceTokenizer.from_files(folder / "tokenizer.json" if kind else folder, padded=True)
    if not kind:
        tokenizer = HuggingFaceTokenizer(tokenizer._pipeline, tokenizer._specials)
    config = DiTConfig(width=16, layers=1, heads=2, condition_width=8, self_conditioned=False)
    spec = ModelSpec(config, DiffusionConfig(), tokenizer.vocab_size, tokenizer.mask_id, LENGTH)
    model = spec.build()
    allocate(model, torch.device("cpu"))
    init_weights(model, 0)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=dice)
    place = tmp_path / "model"
    place.mkdir()
    write_model_files(place, spec, described(tokenizer, framing=framing, length=LENGTH), tokenizer.save(tmp_path))
    save_file({name: value.detach().contiguous() for name, value in model.named_parameters()}, place / WEIGHTS_FILE)
    seal(place)
    return place, tokenizer


def history(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("kind", ["llada", "qwen", "llama"])
def test_ids_of_conversations(tmp_path, kind):
    place, tokenizer = chat_model(tmp_path, kind)
    model = harness.MaskedDiffusionLM(place, device="cpu")
    turns = [Turn("user", ASKED), Turn("assistant", "no"), Turn("user", "and [?")]
    rendered = model.apply_chat_template(history(ASKED, "no", "and [?"))
    wanted = tokenizer.chat.encode_prompt(turns)
    assert model.tok_encode(rendered) == wanted
    continuation = "yes <|im_end|><|eot_id|>"
    assert model.tok_encode(rendered + continuation) == wanted + tokenizer.encode(continuation)
    assert model._encode_pair(rendered, " b") == (wanted, tokenizer.encode(" b"))
    begun = model.apply_chat_template([*history(ASKED), {"role": "assistant", "content": "The"}], False)
    assert model.tok_encode(begun) == tokenizer.chat.encode_prompt(turns[:1]) + tokenizer.encode("The")
    assert model.chat_template(True) == tokenizer.chat_template and model.chat_template(False) is None
    assert model.tokenizer_name == load(place).manifest.tokenizer.sha256
    with pytest.raises(UserError):
        model.apply_chat_template(history("\ufdd1"))


@pytest.mark.parametrize("kind", ["llada", "qwen"])
def test_answers_are_those_of_the_sampler(tmp_path, kind):
    """Also where [EOS] ends the messages of the prompt, and with a prefix that the template places itself."""
    for framing, bos in (("chats", True), ("records", kind == "llada"), ("concatenate", kind == "llada")):
        (tmp_path / framing).mkdir()
        place, _ = chat_model(tmp_path / framing, kind, framing)
        keys = {"steps": 4, "tail": "none", "gen_length": 8, "precision": "float32", "device": "cpu"}
        model = harness.MaskedDiffusionLM(place, escape_until=True, add_bos_token=bos, **keys)
        request = (model.apply_chat_template(history(ASKED)), {"until": ["x"], "max_gen_toks": 2})
        instance = Instance(request_type="generate_until", doc={}, arguments=request, idx=0)
        (text,) = model.generate_until([instance], disable_tqdm=True)
        loaded = load(place, device="cpu")
        template = make_model_template(loaded, LENGTH, [Turn("user", ASKED)], gen_length=8)
        sampler = SamplerConfig(kind="confidence", steps=4, temperature=0.0)
        drawn = generate(loaded, sampler, num=1, seed=0, templates_PL=template[None], precision="float32", chats=True)
        assert text == drawn.texts[0] and text


def test_without_a_chat_template_it_is_refused(tmp_path):
    place, _ = chat_model(tmp_path, None, "records")
    model = harness.MaskedDiffusionLM(place, device="cpu")
    for wrong in (lambda: model.apply_chat_template(history("a")), lambda: model.chat_template(True)):
        with pytest.raises(UserError):
            wrong()


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: train
num_fewshot: 1
doc_to_text: "{{{{context}}}}"
description: "Answer."
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
{more}
"""


def test_tasks_of_the_harness(tmp_path):
    docs = [{"context": f"{i}?", "choices": ["yes", "no"], "right": i % 2, "text": "yes"} for i in range(3)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    kinds = {
        "choices": ["output_type: multiple_choice", "doc_to_choice: choices", "doc_to_target: right"],
        "generation": ["output_type: generate_until", "doc_to_target: text"],
    }
    for name, lines in kinds.items():
        metric = "acc" if name == "choices" else "exact_match"
        more = "\n".join([*lines, f"metric_list: [{{metric: {metric}}}]"])
        text = TASK.format(name=name, data=tmp_path / "docs.jsonl", cache=tmp_path / "cache", more=more)
        (tmp_path / f"{name}.yaml").write_text(text)
    place, _ = chat_model(tmp_path, "qwen")
    results = simple_evaluate(
        model="scmdm",
        model_args={"path": str(place), "draws": 4, "precision": "float32", "steps": 2},
        tasks=list(kinds),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
        log_samples=True,
    )
    for name in kinds:
        asked = results["samples"][name][0]["arguments"][0][0]
        assert asked.count("<|im_start|>") == 5, "system, a question and its answer, a question, and the answer"
    value = results["samples"]["choices"][0]["resps"][0][0][0]
    assert math.isfinite(float(value))
