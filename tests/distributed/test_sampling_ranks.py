"""Real processes on gloo: samples and evaluations are those of one process, also after a kill and of shared weights."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from scmdm.cli import main
from scmdm.sampling.generation import SampleSet
from tests.distributed.launching import launch, start, workers
from tests.integrations.test_lm_eval import DOCS, TASK, TASKS
from tests.processes import wait_until
from tests.sampling.small_models import export

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("ranks") / "model", width=64, layers=3)


def sample(processes, model, out, *keys):
    arguments = ["sample", model, f"out={out}", "device=cpu", "precision=float32", "num=17", *keys]
    if processes:
        status, output = launch(processes, *arguments)
        assert status == 0, output
    else:
        assert main([str(argument) for argument in arguments]) == 0
    assert not list(out.parent.glob(".*.parts"))
    return out.read_bytes()


def test_the_file_of_samples_does_not_depend_on_ranks_batches_or_shards(exported, tmp_path):
    """The sampler's number of evaluations depends on the batch; with `shards` one rank has one batch more."""
    keys = ["sampler.kind=confidence", "sampler.threshold=0.2"]
    cases = {
        "alone": (0, []),
        "one": (1, ["batch_size=5"]),
        "three": (3, ["batch_size=4"]),
        "shared": (2, ["shards=2", "batch_size=8"]),
        "groups": (4, ["shards=2", "batch_size=2"]),
    }
    found = {}
    for name, (processes, own) in cases.items():
        found[name] = sample(processes, exported, tmp_path / f"{name}.jsonl", *keys, *own)
    assert len(found["alone"].splitlines()) == 17
    for name in cases:
        assert found[name] == found["alone"], name


def test_weights_in_bfloat16_are_shared_without_a_change(exported, tmp_path):
    keys = ["weights_dtype=bfloat16", "precision=bfloat16", "batch_size=3"]
    alone = sample(0, exported, tmp_path / "alone.jsonl", *keys)
    assert sample(3, exported, tmp_path / "shared.jsonl", *keys, "shards=3") == alone


def wait_for_parts(process, directory, files):
    wait_until(lambda: len(list(directory.glob("*.npz"))) >= files, process)


def kill_all(process):
    for pid in (process.pid, *workers(process)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.long
def test_killed_sampling_goes_on_with_another_number_of_ranks(exported, tmp_path, monkeypatch):
    keys = ["device=cpu", "precision=float32", "num=60", "batch_size=2", "sampler.steps=32"]
    out = tmp_path / "out.jsonl"
    parts = tmp_path / f".{out.name}.parts"
    process = start(2, "sample", exported, f"out={out}", *keys)
    wait_for_parts(process, parts, 4)
    kill_all(process)
    kept = {number for path in parts.glob("*.npz") for number in np.load(path)["numbers"].tolist()}
    assert not out.exists() and 8 <= len(kept) < 60
    copy = tmp_path / "other"
    copy.mkdir()
    shutil.copytree(parts, copy / parts.name)
    status, output = launch(3, "sample", exported, f"out={copy / out.name}", *keys)
    assert status == 0, output
    drawn, draw = [], SampleSet._draw_batch
    monkeypatch.setattr(SampleSet, "_draw_batch", lambda *own: drawn.extend(own[1].tolist()) or draw(*own))
    assert main(["sample", str(exported), f"out={out}", *keys]) == 0
    assert sorted(drawn) == sorted(set(range(60)) - kept)
    assert main(["sample", str(exported), f"out={tmp_path / 'whole.jsonl'}", *keys]) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() == (copy / out.name).read_bytes()
    assert not parts.exists() and not (copy / parts.name).exists()


def results(path):
    content = json.loads(path.read_text())
    for row in content["samples"]:
        del row["seconds"]
    return {key: content[key] for key in ("nelbo", "zero_shot", "samples", "intervals")}


def same(one, other):
    """Compare nested results, numbers to 1e-6."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return other == (pytest.approx(one, rel=1e-6) if isinstance(one, float) else one)


@pytest.mark.parametrize("killed", [False, True])
def test_an_evaluation_does_not_depend_on_ranks_and_kills(base, molecules, tmp_path, killed):
    """NELBO, perplexity of texts, metrics under the text domain's scorer, and their intervals."""
    (tmp_path / "texts.txt").write_text("CCO\nCCN\nCCC\nCO\n" * 8)
    keys = ["domain=text", "num=30", "seeds=[0,1]", "nelbo_samples=37", "nelbo_draws=2", "sampler.steps=8"]
    keys += ["device=cpu", "precision=float32", f"data={molecules}"]
    keys += [f"texts={{own: {{path: {tmp_path / 'texts.txt'}, unit: lines}}}}"]
    assert main(["evaluate", str(base), f"out={tmp_path / 'one.json'}", *keys]) == 0
    expected = results(tmp_path / "one.json")
    out, own = tmp_path / "ranks.json", ["batch_size=3"]
    if killed:
        process = start(2, "evaluate", base, f"out={out}", *keys, *own)
        wait_for_parts(process, tmp_path / f".{out.name}.parts", 15)
        kill_all(process)
        assert not out.exists()
    else:
        own += ["shards=3"]
    status, output = launch(3, "evaluate", base, f"out={out}", *keys, *own)
    assert status == 0, output
    assert same(results(out), expected)
    assert not list(tmp_path.glob(".*.parts"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "arguments", "ranks", "names"),
    [
        (None, "steps=4", 3, list(TASKS)),
        (4, "threshold=0.3,cache=blocks", 2, ["generation"]),
        (None, "steps=8,cache=dual,block_length=4", 2, ["generation"]),
    ],
    ids=["plain", "blocks", "dual"],
)
def test_the_harness_finds_the_same_on_several_ranks(tmp_path, size, arguments, ranks, names):
    """Two of the documents are equal: their draws are not, on whichever ranks they are."""
    exported = export(tmp_path / "model", width=64, layers=3, block_length=size)
    docs = [*DOCS, DOCS[0]]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name in names:
        *lines, metric = TASKS[name]
        more = "\n".join([*lines, f"metric_list: [{{{metric}}}]"])
        text = TASK.format(name=name, data=tmp_path / "docs.jsonl", cache=tmp_path / "cache", more=more)
        (tmp_path / f"{name}.yaml").write_text(text.replace("max_gen_toks: 4", "max_gen_toks: 4, temperature: 2.0"))
    model = f"path={exported},draws=7,precision=float32,escape_until=True,{arguments}"

    def responses(ranks, *more):
        place = tmp_path / f"results{ranks}"
        keys = ["--model", "scmdm", "--model_args", model, "--tasks", ",".join(names), "--include_path", tmp_path]
        keys += ["--output_path", place, "--log_samples", "--device", "cpu", *more]
        status, output = launch(ranks, *keys, module="scmdm.integrations.lm_eval", timeout=400)
        assert status == 0, output
        (file,) = place.rglob("results_*.json")
        logged = [json.loads(line) for path in sorted(place.rglob("samples_*")) for line in path.open()]
        by_doc = {(row["doc_id"], json.dumps(row["arguments"])): row["resps"] for row in logged}
        return json.loads(file.read_text())["results"], by_doc

    one, asked = responses(0)
    several, again = responses(ranks, "--batch_size", "auto")
    assert all(same(one[task], several[task]) for task in names)
    assert asked.keys() == again.keys()
    for key, value in asked.items():
        assert json.dumps(value)[:40] == json.dumps(again[key])[:40]
