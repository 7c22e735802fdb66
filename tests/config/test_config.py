"""Configuration: every mistake is named with the key, its value, what is allowed and the nearest name."""

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.fields import describe_keys
from scmdm.config.loading import flatten, load_config, read_config, to_yaml, with_overrides
from scmdm.config.preparation import PrepareConfig
from scmdm.config.run import RunConfig
from scmdm.config.sampling import SampleConfig
from scmdm.config.study import StudyConfig
from scmdm.domains.domain_registry import domain_of_tokenizer, load_domain, main_metric
from scmdm.errors import UserError
from scmdm.system.process_group import World
from scmdm.training.setup import resolve_engine
from tests.conftest import ROOT

REQUIRED = ["run_dir=r", "data.path=d", "train.steps=10"]
STUDY = ["title=t", "out=o", "prepare=p", "base=b", "base_config=c", "adapt_config=d", "arms.a.label=x"]


def load(*overrides):
    return load_config(RunConfig, None, [*REQUIRED, *overrides])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.lrr=1", ["unknown key `optimizer.lrr`", "did you mean `optimizer.lr`", "command line"]),
        ("optimiser.lr=1", ["unknown key `optimiser`", "did you mean `optimizer`"]),
        ("model.width=wide", ["model.width", "'wide'", "Integer"]),
        ("train.steps=1.5", ["train.steps", "1.5"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1.0", "between 0 and 10"]),
        ("self_conditioning.rate=1.5", ["self_conditioning.rate=1.5", "between 0 and 1"]),
        ("schedule.kind=step", ["schedule.kind='step'", "constant, cosine, linear"]),
        ("train.micro_batch_size=48", ["train.micro_batch_size=48", "divisor of train.global_batch_size = 64"]),
        ("model.heads=3", ["model.width=128", "model.heads=3"]),
        ("schedule.warmup_steps=11", ["schedule.warmup_steps=11", "at most train.steps = 10"]),
        ("no-equals-sign", ["not of the form key=value"]),
        ("optimizer=3", ["optimizer"]),
        ("optimizer.conditioner_lr=-1", ["optimizer.conditioner_lr=-1.0", "between 0 and 10"]),
        ("optimizer.conditioner_lr=nan", ["optimizer.conditioner_lr=nan", "between 0 and 10"]),
        ("train.steps=${oc.env:NO_SUCH_VARIABLE}", ["NO_SUCH_VARIABLE"]),
        ("optimizer.lr=${nowhere}", ["nowhere"]),
        ("train={", ["train={"]),
    ],
)
def test_mistakes_are_named(override, parts):
    with pytest.raises(UserError) as caught:
        load(override)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("keys", "needs"),
    [
        ("schedule.final_ratio=0.1", "schedule.kind=cosine"),
        ("schedule.initial_ratio=0.5", "schedule.warmup_steps=2"),
        ("diffusion.power=3", "diffusion.schedule=polynomial"),
        ("diffusion.eps=1e-3 diffusion.schedule=polynomial", "diffusion.schedule=cosine"),
        ("model.lora_alpha=32", "model.lora_rank=4"),
        ("model.lora_targets=[mlp]", "model.lora_rank=4"),
        ("train.pad_multiple=8", "train.padding=batch"),
        ("train.keep_best=true train.validate_every=0", "train.validate_every=10"),
        ("train.keep_best=true train.validate_every=3 train.checkpoint_every=5", "train.checkpoint_every=2"),
        ("train.profile_step=9", "train.steps=11"),
        ("deepspeed.stage=3", "engine=deepspeed"),
        ("deepspeed.param_persistence_threshold=7 engine=deepspeed", "deepspeed.stage=3"),
    ],
)
def test_a_key_that_would_have_no_effect_is_refused(keys, needs):
    with pytest.raises(UserError, match=f"^{keys.partition('=')[0]}=.* is not possible"):
        load(*keys.split())
    load(*keys.split(), needs)


def test_one_process_offloads_with_fsdp2_alone():
    with pytest.raises(UserError, match=r"fsdp\.offload=true .*engine=fsdp2"):
        resolve_engine(load("fsdp.offload=true"), World(0, 1, 0))
    assert resolve_engine(load("fsdp.offload=true", "engine=fsdp2"), World(0, 1, 0)).fsdp.offload


def test_an_adaptation_may_repeat_the_schedule_of_its_base():
    assert load("base=b", "diffusion.power=3").diffusion.power == 3


TEXTS = [
    *("[MASK][MASK]C", "[NH3+]CC", "*C", "NO", "yes", "ROMEO: ", " two", "", "${x}", "a=b", "???", "null", "~", "1e5"),
    *("{", "[", "'a'", '"', "# a", "a: b", "a #b", "\t", "&a *b", "!!python/none", "\ufdd0", "\ufdd0i", "1_000", "$"),
    *("${oc.env:HOME}", r"\${oc.env:HOME}", r"\\${oc.env:HOME}", r"\\\${a}\\", "${${", "a\nb", "\\", "[/red]", "???\n"),
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["prompt", "infill"])
def test_a_text_is_taken_as_it_stands(key, text):
    assert getattr(load_config(SampleConfig, None, [f"{key}={text}"]), key) == text


@settings(max_examples=40)
@given(st.text(st.sampled_from("\\${}?:[]'\"# ,ai1\n\ufdd0")))
def test_any_text_is_literal_everywhere_but_in_a_file(text):
    """On the command line, in a request, in a copy with overrides, and in the YAML of a launch."""
    assert load_config(SampleConfig, None, [f"prompt={text}"]).prompt == text
    found = read_config(SampleConfig, {"prompt": text}, "in the request")
    assert found.prompt == text and with_overrides(found, ["num=3"], "here").prompt == text
    study = load_config(StudyConfig, None, [*STUDY, f"title={text}"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "written.yaml")
        path.write_text(to_yaml(study, for_loading=True))
        assert load_config(StudyConfig, path) == study


def test_a_file_of_the_user_is_interpolated(tmp_path, monkeypatch):
    monkeypatch.setenv("SCMDM_TEST", "from the environment")
    (tmp_path / "x.yaml").write_text("prompt: ${oc.env:SCMDM_TEST}\n")
    assert load_config(SampleConfig, tmp_path / "x.yaml").prompt == "from the environment"


CONVERTED = [
    (SampleConfig, "prompt: no", "prompt"),
    (SampleConfig, "prompt: 1.50", "prompt"),
    (SampleConfig, "prompt: 0x10", "prompt"),
    (SampleConfig, "prompt: '???'", "prompt"),
    (SampleConfig, "num: '???'", "num"),
    (SampleConfig, "num: 010", "010"),
    (SampleConfig, "chat: 7", "chat"),
    (SampleConfig, "sampler: {label: off}", "sampler.label"),
    (SampleConfig, "sampler: {end_tokens: [C, no]}", "sampler.end_tokens[1]"),
    (SampleConfig, "sampler: {end_tokens: [[C]]}", "sampler.end_tokens"),
    (SampleConfig, "sampler: {end_tokens: C}", "sampler.end_tokens"),
    (RunConfig, "data: {streams: {a: {path: 2024}}}", "data.streams.a.path"),
    (StudyConfig, "arms: {a: {label: 1, overrides: []}}", "arms.a.label"),
]


@pytest.mark.parametrize(("schema", "content", "key"), CONVERTED)
def test_a_value_that_would_be_converted_without_a_word_is_refused(tmp_path, schema, content, key):
    (tmp_path / "x.yaml").write_text(content + "\n")
    with pytest.raises(UserError) as refused:
        load_config(schema, tmp_path / "x.yaml")
    assert key in str(refused.value) and "x.yaml" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("override", ["chat=7", "num=010", "sampler.end_tokens=[[MASK]]", "sampler.end_tokens=C"])
def test_an_override_that_would_be_converted_is_refused(override):
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load_config(SampleConfig, None, [override])


def test_quoted_text_is_taken_as_it_stands(tmp_path):
    (tmp_path / "x.yaml").write_text("prompt: 'no'\nchat: yes\nsampler: {label: '010', end_tokens: ['1.50', 'off']}\n")
    found = load_config(SampleConfig, tmp_path / "x.yaml")
    assert (found.prompt, found.chat, found.sampler.label) == ("no", True, "010")
    assert found.sampler.end_tokens == ["1.50", "off"]


def test_elements_of_a_list_of_texts_and_values_of_a_mapping():
    found = load_config(StudyConfig, None, [*STUDY, "overrides=[1e5, NO, 'a b', '${x}']", "metrics.scorer=1e5"])
    assert found.overrides == ["1e5", "NO", "a b", "${x}"] and found.metrics == {"scorer": "1e5"}
    texts = ["texts.a=2001-01-01", "texts.b=[x", "texts.c={path: y}"]
    assert load_config(EvaluateConfig, None, texts).texts == {"a": "2001-01-01", "b": "[x", "c": {"path": "y"}}


@pytest.mark.parametrize("path", ["", " ", "a\0b", "a\nb", "a\x1b[31mb", "\udcff", "x" * 5000, "x" * 256])
def test_what_cannot_be_a_path_is_refused(path):
    with pytest.raises(UserError, match="run_dir=") as refused:
        load(f"run_dir={path}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["a b", "日本", "a[/red]b", "${x}", "???", "1e5", "a'b", "~", "[x]", "-"])
def test_what_can_be_a_path(path):
    assert load(f"run_dir={path}").run_dir == path


def test_chains_of_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for index in range(1000):
        (tmp_path / f"{index}.yaml").write_text(f"extends: {index + 1}.yaml\n")
    for index, parent in enumerate(("fifo", ".", "/dev/zero", "bad0.yaml", "a/b", "x" * 5000, "'a\\0b'", "'\\ud800'")):
        (tmp_path / f"bad{index}.yaml").write_text(f"extends: {parent}\n")
    for name in ("0", *(f"bad{index}" for index in range(8))):
        with pytest.raises(UserError) as refused:
            load_config(RunConfig, tmp_path / f"{name}.yaml")
        assert "\n" not in str(refused.value)


def test_null_unsets_a_text_and_numbers_stay_numbers():
    assert load_config(SampleConfig, None, ["out=null", "num=3"]).out is None
    assert load_config(SampleConfig, None, ["sampler.kind=first_hitting"]).sampler.kind == "first_hitting"
    assert load("run_dir=1e3").run_dir == "1e3" and load("seed=7").seed == 7


def test_flash_attention_on_the_cpu_is_impossible():
    with pytest.raises(UserError, match=r"model\.attention='flash'.*auto or sdpa with device=cpu"):
        load("model.attention=flash", "device=cpu")


def test_mandatory_keys():
    with pytest.raises(UserError, match=r"key `data\.path` is not set"):
        load_config(RunConfig, None, ["run_dir=r", "train.steps=3"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"path": "d", "streams": {"a": {"path": "x", "proportion": 1}}},
            r"data\.path=d and data\.streams are both set",
        ),
        ({"streams": {"a": {"path": "x"}}}, r"key `data\.streams\.a\.proportion` is not set"),
        ({"streams": {"a": {"path": "x", "proportion": 0}}}, r"data\.streams\.a\.proportion=0\.0 is not possible"),
        ({"streams": {"a": {"path": "x", "weight": 0}}}, "weight"),
        ({"remote": "s3://x", "streams": {"a": {"path": "x", "proportion": 1}}}, r"give data\.streams\.NAME\.remote"),
        ({"path": "d", "cache_limit": "much"}, r"data\.cache_limit='much' is not possible; .* such as 10gb"),
        ({"path": "d", "shuffle_block": 0}, r"data\.shuffle_block=0 is not possible"),
        ({"path": "d", "validation_stream": "a"}, r"data\.validation_stream='a' is not possible"),
    ],
)
def test_what_a_run_trains_on(tmp_path, keys, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run_dir": "r", "train": {"steps": 3}, "data": keys}))
    with pytest.raises(UserError, match=message):
        load_config(RunConfig, path)


def test_streams_on_the_command_line():
    keys = ["a.path=x", "a.proportion=3", "b.path=y", "b.proportion=1", "b.remote=s3://bucket/y"]
    config = load_config(RunConfig, None, ["run_dir=r", "train.steps=3", *(f"data.streams.{key}" for key in keys)])
    assert (config.data.streams["a"].proportion, config.data.streams["b"].remote) == (3.0, "s3://bucket/y")
    assert yaml.safe_load(to_yaml(config))["data"]["streams"]["a"] == {"path": "x", "proportion": 3.0, "remote": None}
    assert config.data.label == "data.streams=a,b"


def test_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_config(RunConfig, tmp_path / "none.yaml")
    for name, content, message in (
        ("bad.yaml", "a: [1, 2", r"bad\.yaml.* line 1"),
        ("twice.yaml", "a: 1\nb: 2\na: 3", r"twice\.yaml.*'a'.*line 1.*line 3"),
        ("list.yaml", "- 1\n", "holds a list"),
        ("key.yaml", "trian:\n  steps: 3\n", r"unknown key `trian` .*key\.yaml; did you mean `train`"),
        ("extends.yaml", "extends: 3\n", "extends=3 in .*must be the name of one YAML file"),
        ("loop.yaml", "extends: loop.yaml\n", "forms a cycle"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            load_config(RunConfig, tmp_path / name)


def test_a_configuration_elsewhere_extends_a_shipped_one_by_name(tmp_path):
    for folder in (tmp_path, tmp_path / "sub"):
        folder.mkdir(exist_ok=True)
        (folder / "child.yaml").write_text("extends: configs/qm9/base.yaml\nrun_dir: mine\n")
        found = load_config(RunConfig, folder / "child.yaml", ["data.path=d"])
        shipped = load_config(RunConfig, ROOT / "configs/qm9/base.yaml", ["data.path=d", "run_dir=mine"])
        assert found == shipped


def test_extends_file_and_override_in_that_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "parent.yaml").write_text("run_dir: p\ndata: {path: d}\ntrain: {steps: 1, log_every: 1}\n")
    (tmp_path / "sub/child.yaml").write_text("extends: ../parent.yaml\ntrain: {steps: 2, keep_last: 5}\n")
    config = load_config(RunConfig, tmp_path / "sub/child.yaml", ["train.keep_last=7"])
    assert (config.run_dir, config.train.steps, config.train.log_every, config.train.keep_last) == ("p", 2, 1, 7)


@given(
    st.fixed_dictionaries(
        {
            "optimizer.lr": st.floats(0, 10),
            "self_conditioning.rate": st.floats(0, 1),
            "model.layers": st.integers(1, 1024),
            "model.time_conditioning": st.booleans(),
            "schedule.kind": st.sampled_from(["constant", "cosine", "linear"]),
            "optimizer.conditioner_lr": st.none() | st.floats(0, 1),
        }
    )
)
def test_the_resolved_copy_reads_back_the_same(values):
    overrides = [
        f"{key}={'null' if v is None else str(v).lower() if isinstance(v, bool) else v}" for key, v in values.items()
    ]
    config = load(*overrides)
    assert {key: flatten(dataclasses.asdict(config))[key] for key in values} == values
    content = flatten(yaml.safe_load(to_yaml(config)))
    assert content == flatten(dataclasses.asdict(config))


@example("[", "")
@given(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12), st.text(max_size=8))
def test_any_override_is_taken_or_refused_in_one_line(key, value):
    """Anything else that it raises fails the test."""
    with contextlib.suppress(UserError):
        assert load(f"{key}={value}").run_dir


@pytest.mark.parametrize("schema", [RunConfig, SampleConfig, EvaluateConfig])
def test_help_lists_every_key(schema):
    text = describe_keys(schema)
    instance = schema()
    for key in flatten(dataclasses.asdict(instance)):
        assert f"  {key}=" in text


def test_help_says_what_a_key_is_also_where_the_line_has_no_room():
    lines = {line.split("=")[0].strip(): line for line in describe_keys(PrepareConfig).splitlines()}
    assert "=64" in lines["shard_mb"] and "=required" in lines["out"]


def test_lengths_are_those_of_a_base():
    with pytest.raises(UserError, match="any_length=true"):
        load("any_length=true").check_command("train")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_shipped_configuration_loads(path):
    content = yaml.safe_load(path.read_text())
    schema = StudyConfig if "title" in content else PrepareConfig if path.parent.name == "data" else RunConfig
    # The model sizes are parts that a run's file extends.
    keys = {"model": REQUIRED}.get(path.parent.name, ["base=b"] if path.stem.endswith("adapt") else [])
    loaded = load_config(schema, path, keys)
    if isinstance(loaded, StudyConfig) and loaded.metric is not None:
        prepared = load_config(PrepareConfig, ROOT / loaded.prepare)
        assert main_metric(load_domain(domain_of_tokenizer(prepared.tokenizer.name)), loaded.metric)


@pytest.mark.parametrize("override", ["model.llama.kv_heads=2", "model.estimate_rank=8", "deepspeed.whole_below=0"])
def test_keys_of_earlier_versions_are_refused_with_a_remedy(override):
    key = override.partition("=")[0].removesuffix(".kv_heads")
    with pytest.raises(UserError, match=rf"`{key}`.*(write|leave it out)"):
        load_config(RunConfig, None, [*REQUIRED, override])


@pytest.mark.parametrize(
    "where", ["arms.a.sampler=[{}]", "arms.b={{label: y, samples_of: base, sampler: [{}]}}", "sampler.{}"]
)
@pytest.mark.parametrize("key", ["kind=first_hitting", "kind=confidence,threshold=0.9"])
def test_a_sampler_that_ignores_the_steps_of_a_study_has_one_number_of_them(where, key):
    given = [where.format(one) for one in key.split(",")] if where.startswith("sampler") else [where.format(key)]
    if where.startswith("arms.b"):
        given.append("only=[a,b]")
    load_config(StudyConfig, None, [*STUDY, *given, "steps=[32]"])
    with pytest.raises(UserError, match="steps"):
        load_config(StudyConfig, None, [*STUDY, *given, "steps=[32,64]"])
