import dataclasses
import itertools
import pickle
from dataclasses import dataclass
from typing import Any

import pytest

from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.fields import describe_keys, key
from scmdm.config.loading import load_config, read_config, replace_sections, to_yaml, with_overrides
from scmdm.config.registry import Registry
from scmdm.config.run import RunConfig
from scmdm.config.study import StudyConfig
from scmdm.domains.domain_registry import DOMAINS
from scmdm.errors import UserError


@dataclass
class CircleConfig:
    name: str = key("circle", help="Shape.")
    radius: float = key(1.0, help="Radius.", above=0)


@dataclass
class SquareConfig:
    name: str = key("square", help="Shape.")
    side: str = key("a", help="Side.")


class Circle:
    Config = CircleConfig


class Square:
    Config = SquareConfig


SHAPES = Registry("shape.name", "tests.shapes", {name: f"{__name__}:{name.title()}" for name in ("circle", "square")})


@dataclass
class Drawing:
    shape: Any = key(help="What is drawn.", factory=CircleConfig, registry=SHAPES)


@dataclass
class Required:
    shape: Any = key(help="What is drawn.", registry=SHAPES)


def test_the_section_has_the_class_of_its_name(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("shape: {name: square, side: b}\n")
    found = load_config(Drawing, path, ["shape.side=[x"])
    assert isinstance(found, Drawing)
    assert found.shape == SquareConfig("square", "[x")
    assert load_config(Drawing, None).shape == CircleConfig()
    assert read_config(Drawing, {"shape": {"name": "square"}}, "here").shape == SquareConfig()
    assert with_overrides(found, ["shape.side=c"], "here").shape.side == "c"
    assert "side: '[x'" in to_yaml(found)


def test_an_override_selects_another_class_than_a_file_that_names_none(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("shape: {radius: 2}\n")
    assert load_config(Drawing, path, ["shape.name=square"]).shape == SquareConfig("square")
    with pytest.raises(UserError, match=r"shape\.radius"):
        load_config(Drawing, path, ["shape={name: square, radius: 2}"])


def test_a_section_is_replaced_by_one_of_another_class():
    circle, square = load_config(Drawing, None), load_config(Drawing, None, ["shape.name=square"])
    found = replace_sections(circle, shape=SquareConfig("square"))
    assert found == square
    assert to_yaml(found) == to_yaml(square)
    assert with_overrides(found, [], "here") == square


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed package with two kinds of shapes, one under a name of ours."""
    place = tmp_path / "plugin-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    entries = f"[tests.shapes]\nround = {__name__}:Circle\nsquare = {__name__}:Circle\n"
    (place / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(tmp_path)
    return Registry("shape.name", "tests.shapes", {"square": f"{__name__}:Square", "circle": f"{__name__}:Circle"})


def test_a_package_adds_names_but_cannot_replace_one(plugin):
    assert plugin.names == ("square", "circle", "round") and plugin.load("round") is Circle
    assert plugin.load("circle") is Circle
    with pytest.raises(UserError, match=rf"shape\.name='square'.*tests\.shapes.*{__name__}:Circle"):
        plugin.load("square")


def test_a_former_name_is_refused_with_the_present_one():
    with pytest.raises(UserError, match=r"model\.kind='llama'.*model\.kind=decoder"):
        load_config(RunConfig, None, ["run_dir=r", "train.steps=1", "model.kind=llama"])


@pytest.mark.parametrize(
    ("schema", "overrides", "named"),
    [
        (Drawing, ["shape.name=oval"], "shape.name='oval'"),
        (Drawing, ["shape.name=square", "shape.radius=2"], "shape.radius"),
        (Drawing, ["shape.radius=-1"], "shape.radius=-1"),
        (Drawing, ["shape=square"], "shape.name=square"),
        (Required, [], "shape.name"),
    ],
)
def test_mistakes_name_the_key(schema, overrides, named):
    with pytest.raises(UserError) as error:
        load_config(schema, None, overrides)
    assert named in str(error.value)


def test_help_has_the_keys_of_each_name():
    lines = [line.split()[0] if "with" not in line else line.strip() for line in describe_keys(Required).splitlines()]
    expected = ["shape.name=required", "with shape.name=circle:", "shape.radius=1.0"]
    assert lines == [*expected, "with shape.name=square:", "shape.side=a"]


@pytest.mark.parametrize("schema", [EvaluateConfig, StudyConfig])
def test_help_has_the_metrics_of_each_domain(schema):
    lines = describe_keys(schema).splitlines()
    for name in DOMAINS.names:
        keys = [field.name for field in dataclasses.fields(DOMAINS.schema(name))]
        title = f"  of the domain {name}:"
        assert (title in lines) == bool(keys)
        if keys:
            following = itertools.takewhile(lambda line: line.startswith("   "), lines[lines.index(title) + 1 :])
            shown = [line.split()[0].partition("=")[0] for line in following if line[4] != " "]
            assert shown == [f"metrics.{key}" for key in keys]


@pytest.mark.parametrize("name", ["circle", "square"])
def test_a_configuration_equals_its_resolved_copy(name, tmp_path):
    found = load_config(Drawing, None, [f"shape.name={name}"])
    (tmp_path / "copy.yaml").write_text(to_yaml(found))
    assert load_config(Drawing, tmp_path / "copy.yaml") == found
    assert load_config(Drawing, None, ["shape.name=circle"]) == load_config(Drawing, None)


def test_a_configuration_with_a_chosen_section_can_be_sent_to_another_process():
    found = load_config(Drawing, None, ["shape.name=square", "shape.side=z"])
    again = pickle.loads(pickle.dumps(found))
    assert again == found and type(again) is type(found) and again.shape.side == "z"
