import contextlib
import json
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmdm.errors import UserError
from scmdm.system.untrusted import name_inside, parse_as, parse_json, parse_yaml, read_json, read_yaml, reading


@dataclass
class Inner:
    samples: int


@dataclass
class Outer:
    splits: dict[str, Inner]
    rate: float = 1.0
    names: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"splits": {"train": {"samples": "1"}}}, "splits.train.samples"),
        ({"splits": {"train": {"samples": True}}}, "splits.train.samples"),
        ({"splits": {"train": {"samples": 1, "more": 2}}}, "splits.train.more"),
        ({"splits": {}, "rates": 2}, "rates"),
        ({"splits": {}, "names": [1]}, "names.0"),
        ({}, "splits"),
        ([], "the file as a whole"),
        (None, "the file as a whole"),
    ],
)
def test_the_place_of_a_wrong_value_is_named(content, place):
    with pytest.raises(UserError) as error:
        parse_as(Outer, content, "file.json")
    assert str(error.value).startswith(f"file.json: {place}=")


def test_a_right_value_becomes_the_dataclass():
    assert parse_as(Outer, {"splits": {"a": {"samples": 1}}, "rate": 2}, "f") == Outer({"a": Inner(1)}, 2.0)


@pytest.mark.parametrize(
    "text",
    ['{"a":1,"a":2}', "[NaN]", "[-Infinity]", "1e999", "[" * 100 + "]" * 100, "[" * 10**6, '"\\ud800"', "9" * 5000],
)
def test_json_that_is_refused(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.json") as error:
        read_json(path)
    assert "\n" not in str(error.value)


MULTIPLYING = "x0: &a0 [1, 2]\n" + "\n".join(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2\n",
        "a: {<<: {b: 1}, <<: {b: 2}}",
        "a: {<<: {b: 1, b: 2}}",
        "a: &a {<<: *a}",
        "<<: 3",
        "a: &x [*x]",
        "a: {b: " * 5000,
        MULTIPLYING,
        "? [a]\n: b",
        "a: \0",
        "a: " + "9" * 6000,
        '"\\ud800"',
        "a: 1:30",
        "a: -1:30.5",
    ],
)
def test_yaml_that_is_refused(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml") as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  steps: 1\n  lr: 2\n  steps: 3\n")
    with pytest.raises(UserError, match=r"'steps'.*line 2.*line 4"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "merged"),
    [
        ("a: &a {b: 1}\nx: {<<: *a, c: 2}", {"b": 1, "c": 2}),
        ("a: &a {b: 1}\nx: {<<: *a, b: 2}", {"b": 2}),
        ("a: &a {b: 1}\nc: {d: &d {<<: *a, b: 2}}\nx: {<<: *d}", {"b": 2}),
        ("x: {<<: [{b: 1}, {b: 2, c: 3}]}", {"b": 1, "c": 3}),
        ("x: {'<<': 1}", {"<<": 1}),
    ],
)
def test_merged_mappings_are_no_keys_that_stand_twice(text, merged):
    assert parse_yaml(text)["x"] == merged


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_no_regular_file_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    for read in (read_json, read_yaml):
        with pytest.raises(UserError, match="x"):
            read(path)


def test_a_file_above_the_limit_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, 2, 3]")
    with pytest.raises(UserError, match="9 bytes"):
        read_json(path, limit=8)


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../a", "a/../../b", "a//b", "./a", "a\\b", "a\nb", "a\0b", 3, None, ["a"], "out/x", "a/"],
)
def test_names_that_leave_the_root(name, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/out").symlink_to(tmp_path)
    with pytest.raises(UserError, match="manifest"):
        name_inside(tmp_path / "root", name, "manifest.json")


def test_names_inside(tmp_path):
    assert name_inside(tmp_path, "train/shard.00000.mds", "m") == tmp_path / "train/shard.00000.mds"


def test_any_exception_becomes_one_line_and_interrupts_pass():
    with pytest.raises(UserError, match=r"x\.bin"), reading("x.bin", "thing"):
        raise ZeroDivisionError("a\nb")
    with pytest.raises(KeyboardInterrupt), reading("x.bin", "thing"):
        raise KeyboardInterrupt


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("ab\x00é"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab"), inner),
)


@given(JSON)
def test_plain_json_is_read_as_the_standard_library_reads_it(content):
    assert parse_json(json.dumps(content)) == content


@given(st.binary(max_size=60) | st.text("[]{}:,\"'&*!?-\n ab1.e\\", max_size=60).map(str.encode))
def test_no_text_makes_another_exception(data):
    for parse in (parse_json, parse_yaml):
        try:
            with reading("f", "file"):
                parse(data.decode())
        except UserError:
            pass


@given(JSON)
def test_no_content_makes_another_exception(content):
    with contextlib.suppress(UserError):
        parse_as(Outer, content, "f")
