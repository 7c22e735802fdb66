"""The configuration that a run stored: plain values, strictly read, with paths that are found again."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmdm.config.stored import read_stored_config
from scmdm.errors import UserError


def stored(place, text):
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_stored_config(place)


def test_interpolations_stay_text(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "42")
    config = stored(tmp_path, "base: ${oc.env:SECRET}\ndata: {path: '${base}', n: '???'}\n")
    assert config.get("base", str) == "${oc.env:SECRET}" and config.get("data.path", str) == "${base}"
    assert config.get("data.n", str) == "???"


BAD = [
    "",
    "- a\n",
    "a",
    "a: 1\na: 2\n",
    "a: &x [*x]\n",
    "[" * 500,
    "a: \0",
    b"\xff",
    "!!python/object/new:os.system [ls]",
    "a: &a [1,1]\nb: &b [*a,*a]\n" * 2,
    "1: 2\n",
    "a: {b: 1, b: 2}",
]


@pytest.mark.parametrize("text", BAD)
def test_what_no_run_stored_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        stored(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_file_of_megabytes_is_refused_unread(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml"):
        stored(tmp_path, "a: 1\n" + "#" * 2**23)


@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "stored"
    try:
        config = stored(place, data)
    except UserError:
        return
    assert isinstance(config.content, dict)


def test_values_have_the_type_that_is_asked_for(tmp_path):
    config = stored(tmp_path, "a: {n: 1, x: 0.5, t: text, flag: true, none: null}\n")
    assert config.get("a.n", int) == 1 and config.get("a.n", float) == 1.0 and config.need("a.x", float) == 0.5
    assert config.get("a.none", str) is None and config.get("b.c", str) is None
    for key, kind in (("a.n", str), ("a.t", int), ("a.x", int), ("a.flag", int), ("a.n.m", int), ("a", str)):
        with pytest.raises(UserError, match=key.rpartition(".")[0] or key):
            config.get(key, kind)
    with pytest.raises(UserError, match=r"a\.none"):
        config.need("a.none", str)


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step_00000004"])
def test_a_path_is_found_where_it_was_or_beside_the_moved_run(tmp_path, monkeypatch, place):
    (tmp_path / "tree" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for root in ("tree", str(tmp_path / "tree")):
        text = f"run_dir: {root}/run\ndata: {{path: {root}/data}}\n"
        assert os.path.samefile(stored(tmp_path / "tree" / place, text).find("data.path"), tmp_path / "tree" / "data")
        os.rename("tree", "moved")
        assert os.path.samefile(read_stored_config(tmp_path / "moved" / place).find("data.path"), "moved/data")
        os.rename("moved/data", "moved/gone")
        assert read_stored_config(tmp_path / "moved" / place).find("data.path") is None
        os.rename("moved/gone", "moved/data")
        os.rename("moved", "tree")
    assert stored(tmp_path / "tree" / place, "data: {path: 'a\\0'}").find("base") is None
