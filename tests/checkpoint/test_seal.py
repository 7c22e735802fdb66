"""Seals: every change of a sealed directory is found, and the checkpoint before it is taken."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmdm.checkpoint.reader import list_checkpoints, newest_checkpoint, read_state
from scmdm.checkpoint.seal import SEAL, seal, verify_checkpoint
from scmdm.cli import main
from scmdm.errors import UserError
from tests.conftest import TINY

SMALL = 2**14  # bytes of a file whose every bit is flipped


@pytest.fixture
def run(base, tmp_path):
    """A copy of a run with checkpoints at steps 5 and 6."""
    shutil.copytree(base, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def checkpoint(run):
    return list_checkpoints(run / "checkpoints")[-1]


def assert_the_one_before_is_taken(checkpoint, *named):
    """`newest_checkpoint` is all that a resume, `find_model` and a study ask."""
    found, skipped = newest_checkpoint(checkpoint.parent)
    assert found is not None and found.name == "step_00000005"
    assert len(skipped) == 1 and checkpoint.name in skipped[0] and all(name in skipped[0] for name in named)
    assert verify_checkpoint(checkpoint)


def flips(data, every=1):
    for position in range(0, 8 * len(data), every):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        yield bytes(changed)


def test_every_flipped_bit_of_a_seal_is_found(sealed):
    path = sealed / SEAL
    for changed in flips(SEALED_TEXT):
        path.write_bytes(changed)
        assert verify_checkpoint(sealed, hashes=False)
    path.write_bytes(SEALED_TEXT)
    assert verify_checkpoint(sealed) == []


@pytest.mark.slow
def test_a_flipped_bit_in_each_byte_of_the_seal_of_a_checkpoint_is_found(checkpoint):
    """`test_every_flipped_bit_of_a_seal_is_found` flips all bits of a smaller one."""
    for changed in flips((checkpoint / SEAL).read_bytes(), every=7):
        (checkpoint / SEAL).write_bytes(changed)
        assert_the_one_before_is_taken(checkpoint, SEAL)


@pytest.mark.slow
@pytest.mark.long
def test_every_flipped_bit_of_every_small_file_is_found(checkpoint):
    before = newest_checkpoint(checkpoint.parent)[0]
    assert before == checkpoint
    shutil.rmtree(checkpoint.with_name("step_00000005"))
    small = [path for path in checkpoint.iterdir() if path.is_file() and path.stat().st_size < SMALL]
    assert {path.name for path in small} >= {SEAL, "model.json", "state.json", "config.yaml", "manifest.json"}
    for path in small:
        data = path.read_bytes()
        for changed in flips(data):
            path.write_bytes(changed)
            found, skipped = newest_checkpoint(checkpoint.parent)
            assert found is None and path.name in skipped[0]
        path.write_bytes(data)
    assert newest_checkpoint(checkpoint.parent)[0] == checkpoint


def test_a_flipped_bit_in_each_byte_of_state_and_configuration(checkpoint):
    """As above, with fewer bits."""
    for name in ("state.json", "config.yaml", "model.json"):
        data = (checkpoint / name).read_bytes()
        for position in range(0, len(data), 97):
            (checkpoint / name).write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
            assert_the_one_before_is_taken(checkpoint, name)
        (checkpoint / name).write_bytes(data)


def rewritten(change):
    """A damage that changes the parsed seal."""

    def damage(path):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content), indent=2) + "\n")

    return damage


def listing(name):
    return rewritten(lambda c: {"files": {**c["files"], name: {"bytes": 0, "sha256": "0" * 64}}})


SEALS = {
    "empty": lambda path: path.write_bytes(b""),
    "null": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[]"),
    "no files key": lambda path: path.write_text("{}"),
    "files null": lambda path: path.write_text('{"files": null}'),
    "no files": lambda path: path.write_text('{\n  "files": {}\n}\n'),
    "a number": lambda path: path.write_text("1" + "0" * 400),
    "no number": lambda path: path.write_text("1e400"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "NUL": lambda path: path.write_bytes(bytes(100)),
    "another key": rewritten(lambda c: {**c, "more": 1}),
    "no digest of the list": rewritten(lambda c: {**c, "sha256": "0" * 64}),
    "digest null": rewritten(lambda c: {**c, "sha256": None}),
    "size as text": rewritten(lambda c: {"files": {n: {**f, "bytes": str(f["bytes"])} for n, f in c["files"].items()}}),
    "a file without a hash": rewritten(lambda c: {"files": {n: {"bytes": f["bytes"]} for n, f in c["files"].items()}}),
    "a file less": rewritten(lambda c: {"files": {n: f for n, f in c["files"].items() if n != "state.json"}}),
    "above": listing("../../../x"),
    "absolute": listing("/etc/passwd"),
    "dot": listing("./model.json"),
    "itself": listing(SEAL),
    "a folder": listing("tensors"),
    "NUL in a name": listing("a\0b"),
    "a long name": listing("a" * 5000),
    "no name": listing(""),
    "twice": lambda path: path.write_text(path.read_text().replace('"state.json"', '"model.json"')),
    "a folder in its place": lambda path: (path.unlink(), path.mkdir()),
    "a FIFO in its place": lambda path: (path.unlink(), os.mkfifo(path)),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize("damage", SEALS)
def test_a_seal_that_no_save_wrote_is_refused(checkpoint, damage):
    SEALS[damage](checkpoint / SEAL)
    assert_the_one_before_is_taken(checkpoint)


def outside(path):
    elsewhere = path.parents[3] / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


FILES = {
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "a link out": outside,
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize("name", ["state.json", "model.json", "config.yaml"])
def test_what_is_not_a_file_of_the_checkpoint_is_damage(checkpoint, name, damage):
    FILES[damage](checkpoint / name)
    assert_the_one_before_is_taken(checkpoint, name)


ADDED = {
    "tensors/extra.safetensors": lambda path: path.write_bytes(b"x"),
    "tensors/.metadata": lambda path: path.write_bytes(b"x"),
    "weights.safetensors": lambda path: path.write_bytes(b"x"),
    ".env": lambda path: path.write_bytes(b"x"),
    "more/of/it": lambda path: (path.parent.mkdir(parents=True), path.write_bytes(b"x")),
    "fifo": os.mkfifo,
    "link": lambda path: path.symlink_to("/etc"),
    "evaluations": lambda path: path.symlink_to("/etc"),
}


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_the_seal_does_not_list_is_damage(checkpoint, name):
    ADDED[name](checkpoint / name)
    assert_the_one_before_is_taken(checkpoint, name)


def test_added_tensors_do_not_win_in_an_export(base, tmp_path, capsys):
    """`tensors/` of another model beside the sealed weights of an export was read in their place."""
    out = tmp_path / "export"
    assert main(["export", str(base), str(out)]) == 0
    shutil.copytree(list_checkpoints(base / "checkpoints")[0] / "tensors", out / "tensors")
    assert main(["sample", str(out), "num=1"]) == 1
    error = capsys.readouterr().err
    assert "tensors/" in error and error.count("\n") == 1


def test_what_other_programs_leave_is_no_damage(checkpoint):
    for name in (".git/config", ".cache/huggingface/x", "evaluations/step6.json", ".gitattributes", ".DS_Store"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("x")
    assert verify_checkpoint(checkpoint) == []


def test_a_seal_of_an_earlier_version_is_read_and_named(checkpoint, caplog):
    """It had no hash of its own."""
    content = json.loads((checkpoint / SEAL).read_text())
    (checkpoint / SEAL).write_text(json.dumps({"files": content["files"]}, indent=2) + "\n")
    with caplog.at_level(logging.INFO, "scmdm"):
        assert newest_checkpoint(checkpoint.parent)[0] == checkpoint
    assert any(SEAL in record.getMessage() for record in caplog.records)
    (checkpoint / "model.json").write_text("{}")
    assert_the_one_before_is_taken(checkpoint, "model.json")


def test_a_sealed_folder_that_is_no_checkpoint_is_not_resumed_from(checkpoint, base, tmp_path):
    shutil.rmtree(checkpoint)
    assert main(["export", str(base), str(checkpoint)]) == 0
    assert verify_checkpoint(checkpoint) == []
    found, skipped = newest_checkpoint(checkpoint.parent)
    assert found.name == "step_00000005" and "state.json" in skipped[0]


@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(0, 40))
@settings(max_examples=150)
def test_any_bytes_in_a_seal(sealed, data, start, length):
    (sealed / SEAL).write_bytes(SEALED_TEXT[:start] + data + SEALED_TEXT[start + length :])
    changed = (sealed / SEAL).read_bytes() != SEALED_TEXT
    assert bool(verify_checkpoint(sealed)) == changed


SEALED_TEXT = b""


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    global SEALED_TEXT
    place = tmp_path_factory.mktemp("sealed")
    (place / "a").mkdir()
    (place / "a" / "b").write_bytes(bytes(100))
    seal(place)
    SEALED_TEXT = (place / SEAL).read_bytes()
    return place


STATES = ["null", "[]", "{}x", '{"step": "5"}', '{"step": 5.5}', '{"step": 1, "more": 2}', '{"step": NaN}', "[" * 9999]


@pytest.mark.parametrize("text", STATES)
def test_a_state_that_no_run_wrote_is_refused(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json"):
        read_state(tmp_path)


def arguments(run, molecules, empty_yaml, *overrides):
    return ["train", str(empty_yaml), f"run_dir={run}", f"data.path={molecules}", *TINY, *overrides]


def test_a_checkpoint_that_was_moved_and_linked_back(run, checkpoint, molecules, empty_yaml, tmp_path, capsys):
    """It is resumed from, shown by status, and retired by removing the link alone."""
    shutil.move(checkpoint, tmp_path / "other-disk")
    checkpoint.symlink_to(tmp_path / "other-disk")
    assert main(["status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoint"]
    assert found["step"] == 6 and found["damaged"] == []
    keys = ("train.steps=9", "train.keep_last=1", "train.checkpoint_every=1")
    assert main(arguments(run, molecules, empty_yaml, *keys)) == 0
    assert "step_00000006" in (run / "train.log").read_text()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000009"]
    assert verify_checkpoint(tmp_path / "other-disk") == []


def test_a_damaged_checkpoint_behind_a_link_is_replaced(run, checkpoint, molecules, empty_yaml, tmp_path):
    shutil.move(checkpoint, tmp_path / "other-disk")
    checkpoint.symlink_to(tmp_path / "other-disk")
    (tmp_path / "other-disk" / "model.json").write_text("{}")
    assert main(arguments(run, molecules, empty_yaml, "train.steps=6")) == 0
    assert not checkpoint.is_symlink() and verify_checkpoint(checkpoint) == []
    assert (tmp_path / "other-disk" / "model.json").read_text() == "{}"


def test_a_link_to_nothing_and_a_file_are_damaged_checkpoints(run, checkpoint, molecules, empty_yaml):
    (checkpoint.parent / "step_00000007").symlink_to("nothing")
    (checkpoint.parent / "step_00000008").write_text("x")
    assert main(arguments(run, molecules, empty_yaml, "train.steps=8")) == 0
    kept = list_checkpoints(run / "checkpoints")
    assert [path.name for path in kept] == ["step_00000006", "step_00000008"]
    assert [problem for path in kept for problem in verify_checkpoint(path)] == []


def newest_for_nobody(run):
    """Names of the newest checkpoint and of those that were skipped, for a user without any rights."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(run)  # the folders above belong to root alone
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            found, skipped = newest_checkpoint(Path("checkpoints"))
            os.write(writing, json.dumps([found and found.name, skipped]).encode())
        finally:  # an exception would go on with the tests in the child
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        return json.loads(answer.read())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("name", ["state.json", "checkpoint.json", "tensors", "."])
def test_a_file_without_permission_makes_the_checkpoint_damaged(run, checkpoint, name):
    run.chmod(0o755)
    assert newest_for_nobody(run) == ["step_00000006", []]
    (checkpoint / name).chmod(0)
    found, skipped = newest_for_nobody(run)
    (checkpoint / name).chmod(0o755)
    assert found == "step_00000005" and len(skipped) == 1


def test_what_a_killed_run_left_is_removed_at_the_next_start(run, checkpoint, molecules, empty_yaml):
    left = [".config.yaml.x.tmp", ".metrics.jsonl.x.tmp", ".environment.json.x.tmp", "checkpoints/.latest.x.tmp"]
    for name in left:
        (run / name).write_text("x")
    (run / ".report.html.x.tmp").write_text("another command may be writing it")
    assert main(arguments(run, molecules, empty_yaml, "train.steps=7")) == 0
    assert [name for name in left if (run / name).exists()] == []
    assert (run / ".report.html.x.tmp").exists()
