"""Preparation by several processes and machines, killed and resumed: the same bytes; memory that does not grow."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from scmdm.cli import main
from scmdm.data.manifest import Manifest
from scmdm.data.verification import verify_dataset
from tests.data.preparation.test_prepare import files
from tests.distributed.launching import are_gone, launch, wait_for_descendants
from tests.processes import popen, wait_until

KEYS = (
    "source.name=text",
    "tokenizer.name=characters",
    "length=64",
    "part_mb=1",
    "validation_fraction=0.2",
    "test_fraction=0.2",
)


def write_corpus(path, megabytes, seed=0):
    """Documents of some lines each, a few of them repeated, a few that cannot be used."""
    dice = random.Random(seed)
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(1, 9))) for _ in range(500)]
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as file:
        document = "first"
        while file.tell() < megabytes * 2**20:
            if dice.random() > 0.05:
                document = " ".join(dice.choices(words, k=dice.randint(5, 400)))
            file.write("no json\n" if dice.random() < 0.01 else json.dumps({"text": document}) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Of five parts: three of a large file, one, and one of small files."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "a.jsonl", 2.5)
    write_corpus(folder / "b.jsonl", 0.8, seed=1)
    for number in range(5):
        (folder / f"c{number}.txt").write_text("\n\n".join(f"{number} {i} " * 100 for i in range(50)))
    return folder


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """What one process makes of it."""
    yaml = tmp_path_factory.mktemp("yaml") / "empty.yaml"
    yaml.write_text("{}")
    out = tmp_path_factory.mktemp("alone") / "data"
    assert main(["prepare", str(yaml), *KEYS, f"source.path={corpus}", f"out={out}", "workers=1"]) == 0
    assert not verify_dataset(out)
    counts = Manifest.read(out).counts
    assert counts["dropped: duplicate"] > 50 and counts["dropped: malformed JSON"] > 5
    assert counts["read"] == counts["kept"] + counts["dropped: duplicate"]
    return out


def arguments(yaml, corpus, out, *keys):
    return ["prepare", yaml, *KEYS, f"source.path={corpus}", f"out={out}", *keys]


def command(*given):
    return [sys.executable, "-m", "scmdm", *arguments(*given)]


def prepare(*given):
    """Run to the end in a process of its own; returns the output."""
    status, output = launch(0, *arguments(*given))
    assert status == 0, output
    return output


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_make_the_same_bytes(corpus, alone, tmp_path, empty_yaml):
    prepare(empty_yaml, corpus, tmp_path / "data", "workers=2")
    assert files(tmp_path / "data") == files(alone) and os.listdir(tmp_path) == ["data"]


def test_one_machine_of_two_does_all_when_the_other_never_comes(corpus, alone, tmp_path, empty_yaml, capsys):
    keys = [*KEYS, f"source.path={corpus}", f"out={tmp_path / 'data'}", "workers=1"]
    assert main(["prepare", str(empty_yaml), *keys, "slice=1/2"]) == 0
    assert files(tmp_path / "data") == files(alone)
    assert main(["prepare", str(empty_yaml), *keys, "slice=0/2"]) == 0
    assert "is up to date" in capsys.readouterr().out and os.listdir(tmp_path) == ["data"]


@pytest.mark.slow
def test_four_machines_at_once_make_the_same_bytes(corpus, alone, tmp_path, empty_yaml):
    def take(index):
        prepare(empty_yaml, corpus, tmp_path / "data", "workers=1", f"slice={index}/4")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take, range(4)))
    assert files(tmp_path / "data") == files(alone) and os.listdir(tmp_path) == ["data"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", [pytest.param("scan", marks=pytest.mark.long), "encode"])
def test_killed_and_resumed_it_makes_the_same_bytes(corpus, alone, tmp_path, empty_yaml, phase):
    out = tmp_path / "data"
    process = popen(command(empty_yaml, corpus, out, "workers=2"), start_new_session=True)
    wait_until(lambda: list(tmp_path.glob(f".data.*.work/{phase}-?????")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() and len(list(tmp_path.glob(f".data.*.work/{phase}-?????"))) < 5
    assert "continuing from" in prepare(empty_yaml, corpus, out, "workers=1")
    assert files(out) == files(alone) and os.listdir(tmp_path) == ["data"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path, empty_yaml):
    peaks = []
    for megabytes in (2, 12):
        corpus = write_corpus(tmp_path / f"{megabytes}" / "a.jsonl", megabytes)
        process = subprocess.Popen(
            command(empty_yaml, corpus, tmp_path / f"{megabytes}-data", "workers=1", "shard_mb=1")
        )
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.slow
def test_a_killed_worker_is_told_and_the_other_makes_the_same(corpus, alone, tmp_path, empty_yaml):
    process = subprocess.Popen(
        command(empty_yaml, corpus, tmp_path / "data", "workers=2"), stderr=subprocess.PIPE, text=True
    )
    (worker,) = wait_for_descendants(process, "spawn_main")
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0 and "a worker was killed" in error, error
    assert files(tmp_path / "data") == files(alone)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "sent"), [(1, signal.SIGKILL), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_the_fit_of_a_tokenizer(tmp_path, empty_yaml, workers, sent):
    """Sentencepiece would go on for about a minute."""
    write_corpus(tmp_path / "corpus/a.jsonl", 2)
    letters = random.Random(0)
    text = "\n".join("".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=80)) for _ in range(150_000))
    (tmp_path / "corpus/b.txt").write_text(text)
    keys = ["tokenizer.name=sentencepiece", "tokenizer.vocab_size=8000", "source.unit=lines", f"workers={workers}"]
    # A shell's background jobs, and what they start, ignore SIGINT.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command(empty_yaml, tmp_path / "corpus", tmp_path / "data", *keys), preexec_fn=heard)
    try:
        (trainer,) = wait_for_descendants(process, "scmdm.data.tokenizers.sentencepiece_trainer")
        time.sleep(1)  # it has begun
        process.send_signal(sent)
        assert process.wait(timeout=25) != 0
    finally:
        process.kill()
    assert are_gone([trainer])
    (work,) = tmp_path.glob(".data.*.work")
    assert not list(work.glob("fit*")) and not (tmp_path / "data").exists()


def test_only_its_own_work_is_removed(corpus, tmp_path, empty_yaml, capsys):
    """`data.b` is another data set, which is being prepared; and a refusal leaves nothing of its own."""
    other = tmp_path / ".data.b.0123456789ab.work"
    other.mkdir()
    keys = [*KEYS, f"source.path={corpus}", f"out={tmp_path / 'data'}", "workers=1", "limit=200"]
    assert main(["prepare", str(empty_yaml), *keys]) == 0
    assert main(["prepare", str(empty_yaml), *keys, "length=32"]) == 1
    assert "made with other settings" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == [other.name, "data"]


def test_dirt_can_be_refused(corpus, tmp_path, empty_yaml, capsys):
    keys = [*KEYS, f"source.path={corpus}", f"out={tmp_path / 'data'}", "workers=1", "on_dirty=refuse"]
    assert main(["prepare", str(empty_yaml), *keys]) == 1
    printed, error = capsys.readouterr()
    (work,) = tmp_path.glob(".data.*.work")
    assert f"finished work is kept in {work}" in printed
    assert "a.jsonl at byte" in error and "malformed JSON" in error and "on_dirty=skip" in error
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "keys", [("slice=4/4",), ("slice=a/4",), ("slice=0/4", "overwrite=true"), ("workers=0",), ("source.flips=true",)]
)
def test_impossible_shares_are_refused(corpus, tmp_path, empty_yaml, capsys, keys):
    assert main(["prepare", str(empty_yaml), *KEYS, f"source.path={corpus}", f"out={tmp_path / 'data'}", *keys]) == 1
    assert keys[-1].split("=")[0] in capsys.readouterr().err
    assert not os.listdir(tmp_path)
