import math
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from scmdm.config.fields import describe_keys, key, validate_keys, walk_keys
from scmdm.config.loading import load_config
from scmdm.errors import UserError


@dataclass
class Section:
    rate: float = key(0.5, help="Probability.", at_least=0, at_most=1)
    name: str | None = key(None, help="Name.", choices=("a", "b"))


@dataclass
class Config:
    steps: list[int] = key(factory=lambda: [8, 16], help="Denoiser evaluations.", at_least=1)
    width: int = key(4, help="Width.", above=0)
    section: Section = field(default_factory=Section)
    named: dict[str, Section] = field(default_factory=dict)


def test_defaults_are_allowed_and_every_key_is_walked():
    config = Config(named={"x": Section()})
    validate_keys(config)
    names = [name for name, _, _ in walk_keys(config)]
    assert names == ["steps", "width", "section.rate", "section.name", "named.x.rate", "named.x.name"]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Config(steps=[8, 0]), "steps"),
        (Config(width=0), "width"),
        (Config(section=Section(rate=1.5)), "section.rate"),
        (Config(section=Section(rate=math.nan)), "section.rate"),
        (Config(section=Section(rate=-math.inf)), "section.rate"),
        (Config(section=Section(name="c")), "section.name"),
        (Config(named={"x": Section(rate=-1)}), "named.x.rate"),
    ],
)
def test_a_value_out_of_range_is_named(config, name):
    with pytest.raises(UserError, match=f"^{name}="):
        validate_keys(config)


def test_help_has_every_key_with_its_default():
    lines = describe_keys(Config).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["width=4", "section.rate=0.5", "section.name=null", "named={}"]
    assert "a | b" in lines[3]


@dataclass
class _Metrics:
    fcd: bool = key(False, help="Frechet ChemNet distance", formerly=("fcd", "old.fcd"))


@dataclass
class _Renamed:
    removed_keys: ClassVar[dict[str, str]] = {"model.rank": "leave it out: the head is fast enough"}
    metrics: _Metrics = field(default_factory=_Metrics)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("fcd=true", "write `metrics.fcd`"),
        ("old.fcd=true", "write `metrics.fcd`"),
        ("model.rank=8", "leave it out"),
        ("model={rank: 8}", "leave it out"),
    ],
)
def test_earlier_names_of_a_key_are_refused_with_the_present_one(override: str, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        load_config(_Renamed, None, [override])
    assert load_config(_Renamed, None, ["metrics.fcd=true"]).metrics.fcd
