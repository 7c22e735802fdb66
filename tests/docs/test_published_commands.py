"""The page of published decoders: our commands are possible, and have the settings that the identity tests hold."""

import dataclasses
import re
import shlex

import pytest

from scmdm.config.loading import load_config
from scmdm.config.sampling import SampleConfig
from tests.diffusion.test_published_samplers import DREAM, FAST, LLADA, RANKED
from tests.docs.test_docs import ROOT, commands, fenced_blocks

PAGE = ROOT / "docs/guides/published.md"
SAMPLES = [words[2:] for words in commands(PAGE)]
NUMBERS = {
    "steps",
    "top_p_first",
    "block_length",
    "temperature",
    "top_k",
    "top_p",
    "guidance",
    "alg_temp",
    "remask_eta",
    "eps",
}
RULES = {  # settings of the identity tests, by what a command of the page has
    "transfer=even": LLADA,
    "transfer=ratio": RANKED,
    "threshold=": FAST,
    "factor=": FAST,
    "eps=1e-3": DREAM,
}


def sections():
    """Content of each section of the page, by its heading."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_there_are_commands_for_every_published_one():
    assert len(SAMPLES) >= 10
    assert {"LLaDA", "Dream and DiffuCoder", "Fast-dLLM", "MDLM, ReMDM and Duo", "lm-eval"} == set(sections())


@pytest.mark.parametrize("overrides", SAMPLES, ids=" ".join)
def test_a_command_has_the_settings_that_are_tested(overrides):
    sampler = load_config(SampleConfig, None, overrides).sampler
    held = [rule for sign, rule in RULES.items() if any(sign in override for override in overrides)]
    for rule in held:
        for name, value in rule.items():
            own = getattr(sampler, name)
            assert name in NUMBERS or own == value or name == "kind", f"sampler.{name}={own}, tested: {value}"
    assert held or sampler.eps == 1e-5 or sampler.remask != "never"


def published_names(content):
    """Names of the arguments in the published commands of a section."""
    text = "\n".join(re.findall(r"^```(?:python|console)\n(.*?)^```", content, re.MULTILINE | re.DOTALL))
    return set(re.findall(r"(?<![\w.])((?:sampling\.)?[a-z_]+)=", text)) - {"mode", "model_args"}


@pytest.mark.parametrize("heading", sections())
def test_every_published_argument_is_in_the_tables(heading):
    """In that of its own section, or, for arguments that it shares with an earlier one, in that of any."""
    tables = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("|"))
    names = published_names(sections()[heading])
    assert names
    for name in names:
        assert re.search(rf"`[^`]*(?<!\w){re.escape(name)}\b", tables), f"{heading}: {name} has no row"


def test_no_setting_of_the_sampler_is_unknown_to_the_tables():
    """Each key that the tables name is one of ours."""
    keys = {f"sampler.{field.name}" for field in dataclasses.fields(SampleConfig().sampler)}
    named = set(re.findall(r"sampler\.[a-z_]+", PAGE.read_text()))
    assert named <= keys


def harness_commands():
    blocks = [re.sub(r"\\\n", "", block) for block in fenced_blocks(PAGE, "bash")]  # as a shell joins lines
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [words[words.index("--model_args") + 1] for words in lines if "--model_args" in words]


RECIPES = [
    found.replace("path=RUN", "path=MODEL")
    for found in re.findall(r"`(path=RUN,[^`]*)`", (ROOT / "docs/guides/models.md").read_text())
]


@pytest.mark.parametrize("arguments", [*harness_commands(), *RECIPES], ids=lambda text: text[:60])
def test_arguments_of_the_harness_make_a_model(tmp_path, arguments):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.utils import simple_parse_args_string

    from scmdm.integrations.lm_eval import MaskedDiffusionLM
    from tests.integrations.test_lm_eval import export

    given = simple_parse_args_string(arguments)
    assert given.pop("path") == "MODEL"
    model = MaskedDiffusionLM(export(tmp_path, "random", length=2048), device="cpu", **given)
    assert model.max_length == 2048 - given.get("add_bos_token", True)
