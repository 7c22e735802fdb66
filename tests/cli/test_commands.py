"""The commands as a user runs them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

import scmdm
from scmdm.cli import main
from scmdm.data.loader import read_split
from scmdm.data.tokenizers import SmilesTokenizer, is_framed, load_tokenizer
from scmdm.domains.interface import GeneratedSamples
from scmdm.errors import UserError
from scmdm.models.compilation import cpp_compiler
from scmdm.sampling.templates import make_template
from tests.conftest import ADAPTED, ROOT, TINY

EXPERTS = ["model.kind=decoder", "model.experts=4", "model.experts_per_token=2"]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_help_is_there_for_every_command(capsys):
    for arguments in (
        [],
        ["train"],
        ["adapt"],
        ["sample"],
        ["evaluate"],
        ["demo"],
        ["moses"],
        ["prepare"],
        ["report"],
        ["study"],
        ["doctor"],
        ["launch", "slurm"],
        ["launch", "local"],
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert len(text) > 100
        if arguments and arguments[0] in ("train", "adapt"):
            assert "self_conditioning.rate=0.0" in text


def test_help_needs_no_torch():
    code = "import sys, scmdm.cli\ntry: scmdm.cli.main(['-h'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.slow
def test_module_and_script_are_the_same_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "scmdm", "report", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("scmdm: error: ") and done.stderr.count("\n") == 1


def test_doctor(capsys, tmp_path):
    assert main(["doctor", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for subject in ("python", "cpu", "precision", "attention", "disk", "deepspeed", "molecules", "scmdm[flash]"):
        assert subject in text


def test_sampling_is_reproducible_and_batch_free(base, tmp_path):
    outs = [tmp_path / f"{n}.jsonl" for n in range(3)]
    common = ["sample", str(base), "num=10", "sampler.steps=6", "precision=float32"]
    assert main([*common, f"out={outs[0]}"]) == 0
    assert main([*common, f"out={outs[1]}", "batch_size=3"]) == 0
    assert main([*common, f"out={outs[2]}", "seed=1"]) == 0
    first, second, third = (rows(path) for path in outs)
    assert first == second != third
    assert len(first) == 10 and all(row["evaluations"] == 6 for row in first)
    manifest = scmdm.load(base).manifest
    assert manifest.bos_policy == "given" and all(row["tokens"][0] == manifest.bos_id for row in first)
    tokenizer = scmdm.load(base).tokenizer
    assert all(row["framed"] == is_framed(row["tokens"], tokenizer, manifest.padding_id) for row in first)


@pytest.mark.slow
@pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_draws_the_same_samples(base, molecules, empty_yaml, tmp_path, monkeypatch):
    """For a base, whose batches shrink when sequences skip a step, and for a model that carries its estimate."""
    adapted, compiled = tmp_path / "adapted", []
    keys = [f"base={base}", f"run_dir={adapted}", f"data.path={molecules}", "train.steps=2", *ADAPTED]
    assert main(["adapt", str(empty_yaml), *keys]) == 0
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **keys: compiled.append(self) or whole(self, **keys))
    for model in (base, adapted):
        outs = [tmp_path / f"{model.name}-{what}.jsonl" for what in ("none", "block")]
        for out, what in zip(outs, ("none", "block"), strict=True):
            keys = ["num=10", "sampler.steps=30", "precision=float32", f"compile={what}", f"out={out}"]
            assert main(["sample", str(model), *keys]) == 0
        assert rows(outs[0]) == rows(outs[1])
    assert len(compiled) == 2 * len(scmdm.load(base).model.blocks)


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_shared_model_is_not_compiled(base, capsys, command):
    assert main([command, str(base), "compile=block", "shards=2"]) == 1
    assert "compile='block' is not possible" in capsys.readouterr().err


def test_samples_go_to_the_terminal(base, tmp_path, capsys):
    sample, out = ["sample", str(base), "num=3", "sampler.kind=first_hitting"], tmp_path / "samples.jsonl"
    assert main([*sample, f"out={out}"]) == 0
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    capsys.readouterr()
    assert main(sample) == 0
    captured = capsys.readouterr()
    assert len(texts) == 3 and captured.out == "".join(f"{text}\n" for text in texts)
    assert "23 denoiser evaluations each" in captured.err, "the beginning is given, 23 of 24 are drawn"


def test_prompts_of_a_file_and_the_formats_of_samples(base, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("CC\nN\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "CC"}\n{"prompt": "N"}\n')
    common = ["sample", str(base), "num=3", "sampler.steps=4"]
    rows = []
    for suffix in ("txt", "jsonl"):
        out = tmp_path / f"{suffix}.jsonl"
        assert main([*common, f"prompts={tmp_path / f'prompts.{suffix}'}", f"out={out}"]) == 0
        rows.append([json.loads(line) for line in out.read_text().splitlines()])
    assert rows[0] == rows[1] and "6 samples, 4 denoiser evaluations each" in capsys.readouterr().err
    assert all(
        row["text"].startswith("CC" if i < 3 else "N") and row["evaluations"] == 4 for i, row in enumerate(rows[0])
    )
    for suffix, lines in {
        "txt": [row["text"] for row in rows[0]],
        "smi": [row["text"] for row in rows[0] if row["framed"]],
        "fasta": [x for i, r in enumerate(rows[0]) for x in (_fasta_head(i, r), r["text"])],
    }.items():
        out = tmp_path / f"samples.{suffix}"
        assert main([*common, f"prompts={tmp_path / 'prompts.txt'}", f"out={out}"]) == 0
        assert out.read_text().splitlines() == lines
    assert main([*common, f"out={tmp_path / 'grid.png'}"]) == 0
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def _fasta_head(number, row):
    return f">sample_{number} evaluations=4 framed={str(row['framed']).lower()}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["prompts=nowhere.txt"], "nowhere.txt"),
        (["prompts={tmp}/none.jsonl"], "none.jsonl"),
        (["prompts={tmp}/empty.txt"], "holds no prompt"),
        (["prompts={tmp}/empty.txt", "prompt=C"], "prompt and prompts are both set"),
        (["out={tmp}/a.docx"], "a name that ends in one of .jsonl"),
        (["sampler.block_length=2", "sampler.steps=3"], "has 12 blocks"),
        (["sampler.kind=entropy", "sampler.remask=cap"], "sampler.remask='cap' is not possible"),
        (["sampler.top_k=0"], "sampler.top_k=0 is not possible"),
    ],
)
def test_mistakes_about_samples(base, tmp_path, capsys, keys, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "none.jsonl").write_text("{}\n")
    assert main(["sample", str(base), *(key.format(tmp=tmp_path) for key in keys)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys",
    [["sampler.kind=margin"], ["sampler.block_length=6", "sampler.top_k=3"], ["sampler.remask=rescale"]],
    ids=lambda keys: keys[0],
)
def test_samplers_by_name(base, tmp_path, keys):
    out = tmp_path / "a.jsonl"
    assert main(["sample", str(base), "num=4", "sampler.steps=6", *keys, f"out={out}"]) == 0
    assert [json.loads(line)["evaluations"] for line in out.read_text().splitlines()] == [6] * 4


def test_prompt_and_infill(base, tmp_path):
    out = tmp_path / "a.jsonl"
    assert main(["sample", str(base), "num=5", "prompt=CC(=O)", f"out={out}"]) == 0
    assert all(row["text"].startswith("CC(=O)") for row in rows(out))
    assert main(["sample", str(base), "num=5", "infill=CC[MASK][MASK]O", f"out={out}"]) == 0
    manifest = scmdm.load(base).manifest
    for row in rows(out):
        assert row["tokens"][0] == manifest.bos_id and manifest.mask_id not in row["tokens"]
        assert row["tokens"][6] == manifest.eos_id and row["tokens"][7:] == [manifest.pad_id] * 17


def test_templates():
    t = SmilesTokenizer(["C", "N", "O"])
    c, n, _ = t.encode("CNO")
    m = t.mask_id
    assert make_template(t, 5, None, None, bos_given=False).tolist() == [m] * 5
    assert make_template(t, 5, None, None, bos_given=True).tolist() == [t.bos_id, m, m, m, m]
    for bos_given in (False, True):
        prompted, infilled = (
            make_template(t, 6, *texts, bos_given=bos_given) for texts in (("CN", None), (None, "[MASK]N"))
        )
        assert prompted.tolist() == [t.bos_id, c, n, m, m, m]
        assert infilled.tolist() == [t.bos_id, m, n, t.eos_id, t.pad_id, t.pad_id]
    with pytest.raises(UserError, match="prompt has 6 tokens"):
        make_template(t, 5, "CCCCC", None, bos_given=True)
    with pytest.raises(UserError, match=r"prompt='CX'.*'X'"):
        make_template(t, 5, "CX", None, bos_given=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["sampler.carry=always"], "not self-conditioned"),
        (["prompt=C", "infill=C"], "prompt and infill are both set"),
        (["sampler.top_p=0"], "sampler.top_p=0"),
        (["num=0"], "num=0"),
        (["threads=-1"], "threads=-1 is not possible"),
        (["length=0"], "length=0 is not possible"),
        (["out=/proc/nope/x.jsonl"], "out=/proc/nope/x.jsonl cannot be written"),
        (["sampler.kind=magic"], "one of ancestral, first_hitting"),
        (["device=cuda"], "torch finds no CUDA device"),
    ],
)
def test_sampling_mistakes(base, capsys, keys, message):
    if keys == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert main(["sample", str(base), *keys]) == 1
    assert message in capsys.readouterr().err


def test_evaluate_molecules(base, molecules, tmp_path, capsys):
    out = tmp_path / "e.json"
    keys = ["nelbo_samples=40", "nelbo_draws=2", "num=24", "seeds=[0,1]", "sampler.steps=4", f"out={out}"]
    assert main(["evaluate", str(base), *keys]) == 0
    result = json.loads(out.read_text())
    assert result["domain"] == "molecules" and result["step"] == 6
    assert result["nelbo"]["null"]["mean"] > 0 and "conditioned" not in result["nelbo"]
    assert [row["seed"] for row in result["samples"]] == [0, 1]
    assert result["samples"][0]["evaluations"] == 4 and result["samples"][0]["metrics"]["num_samples"] == 24
    assert "NELBO null" in capsys.readouterr().out
    for name in ("validity", "published_validity", "published_uniqueness", "published_novelty"):
        assert 0 <= result["samples"][0]["metrics"][name] <= 1
    assert "published_validity" in result["intervals"]


def test_the_nelbo_without_padding(base, molecules, tmp_path):
    """The published perplexity of QM9: padding is masked, as in training, but does not count."""
    rows, tokens = read_split(molecules, "test"), {}
    for counted in ("true", "false"):
        out = tmp_path / f"{counted}.json"
        keys = [f"nelbo_samples={len(rows)}", "num=0", "nelbo_draws=1", f"nelbo_padding={counted}", f"out={out}"]
        assert main(["evaluate", str(base), *keys]) == 0
        tokens[counted] = json.loads(out.read_text())["nelbo"]["null"]["tokens"]
    given = len(rows)  # [BOS] of each
    assert tokens == {"true": rows.size - given, "false": int((rows != SmilesTokenizer.pad_id).sum()) - given}


def cells(printed, name):
    """Of the row of a printed table."""
    (line,) = (line.split("│")[1:-1] for line in printed.splitlines() if f" {name} " in line)
    return [cell.strip() for cell in line[1:]]


def test_moses_of_a_file(published_moses, tmp_path, capsys):
    """As `scmdm sample` writes it, and as MOSES does; the fourth sample is not framed, the fifth no molecule."""
    texts = ["COc1ccccc1OC(=O)c1ccccc1OC(C)=O", "CCO", "OCC", "CCN", "C(("]
    rows = [{"text": text, "framed": text != "CCN", "tokens": []} for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("\n".join(["SMILES", *texts[:3], "CC=O", "C(("]))
    found = {}
    for name in ("a.jsonl", "a.csv"):
        out = tmp_path / f"{name}.json"
        assert main(["moses", str(tmp_path / name), "fcd=false", f"out={out}"]) == 0
        found[name] = json.loads(out.read_text())
        printed = capsys.readouterr().out
        assert cells(printed, "SNN/Test") == [f"{found[name]['metrics']['SNN/Test']:.5f}", "0.64192"]
        assert "FCD" not in printed and "estimated" not in printed
    assert [found[name]["metrics"]["valid"] for name in found] == [0.6, 0.8]
    assert found["a.jsonl"]["metrics"]["Novelty"] == 0.5, "CCO is in the training set"
    assert found["a.csv"]["metrics"]["Filters"] == 0.75


def test_moses_of_part_of_the_training_set(published_moses, tmp_path, capsys):
    """Always the same molecules, beside an estimate of the whole set; statistics are kept."""
    out = tmp_path / "out.json"
    for _ in range(2):
        assert main(["moses", "train", "num=3", "detailed=2", "fcd=false", f"out={out}"]) == 0
        result, printed = json.loads(out.read_text()), capsys.readouterr().out
        kept = {path: path.stat().st_mtime_ns for path in (published_moses / "scmdm/moses").iterdir()}
        assert (result["metrics"]["valid"], result["metrics"]["Novelty"], result["of"]) == (1, 0, 4)
        assert set(result["whole"]) == {"Frag/Test", "Frag/TestSF", "Scaf/Test", "Scaf/TestSF"}
        assert cells(printed, "Frag/Test")[1] == f"{result['whole']['Frag/Test']:.5f}"
        assert cells(printed, "SNN/Test")[1] == "" and "train, 3 of 4 molecules" in printed.replace("\n", " ")
    assert kept == {path: path.stat().st_mtime_ns for path in (published_moses / "scmdm/moses").iterdir()}
    # A half of one molecule has no distance, and a part of one fragment no estimate; JSON has no NaN.
    assert main(["moses", "train", "num=2", f"out={out}"]) == 0
    whole = json.loads(out.read_text(), parse_constant=pytest.fail)["whole"]
    assert whole["FCD/Test"] is None and whole["Scaf/Test"] is None
    assert main(["moses", "train", "fcd=false", f"out={out}"]) == 0
    assert "whole" not in json.loads(out.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "num=5"], "num=5 is not possible"),
        (["{tmp}/two.smi", "num=3", "fcd=false"], "two.smi has 2 molecules"),
        (["train", "threads=9"], "threads=9 is not possible"),
        (["train", "detailed=1"], "detailed=1 is not possible"),
        (["training"], "training"),
        (["{tmp}/empty.smi"], "empty.smi contains no molecule"),
        (["{tmp}/other.jsonl"], "other.jsonl"),
        (["train", "out=/proc/nope/x.json"], "out=/proc/nope/x.json cannot be written"),
    ],
)
def test_mistakes_of_moses(published_moses, tmp_path, capsys, arguments, message):
    (tmp_path / "empty.smi").write_text("")
    (tmp_path / "two.smi").write_text("CCO\nCCN\n")
    (tmp_path / "other.jsonl").write_text("[1]\n")
    assert main(["moses", *(text.format(tmp=tmp_path) for text in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_evaluate_moses(base, molecules, published_moses, tmp_path, capsys, monkeypatch):
    """Molecules of the data in place of the tiny base's, which makes none: ordinary numbers, with an interval, kept."""
    rows_N = torch.from_numpy(read_split(molecules, "test").astype("int64"))[:24]
    tokenizer = load_tokenizer(molecules / "tokenizer.json")
    texts = [tokenizer.decode(row) for row in rows_N.tolist()]

    def drawn(samples, **_):
        seed = samples.seed
        return GeneratedSamples(rows_N[seed:], texts[seed:], [True] * (24 - seed), [4] * (24 - seed), 1.0)

    monkeypatch.setattr("scmdm.evaluation.evaluate.generate_divided", drawn)
    out = tmp_path / "e.json"
    keys = ["metrics.moses=true", "nelbo_samples=0", "num=24", "seeds=[0,4]", f"out={out}"]
    assert main(["evaluate", str(base), *keys]) == 0
    metrics = [row["metrics"] for row in json.loads(out.read_text())["samples"]]
    assert all(row["moses_valid"] == 1 and row["moses_unique@1000"] is None for row in metrics)
    printed = capsys.readouterr().out
    snn = sum(row["moses_SNN/Test"] for row in metrics) / 2
    assert cells(printed, "MOSES SNN/Test") == [f"{snn:.5f}", "0.6419"]
    assert "unique@1000" not in printed and "MOSES (protocol: 30,000 samples" in printed.replace("\n", " ")
    assert len(list((published_moses / "scmdm/moses").glob("molecules-*.npz"))) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["out=/proc/nope/x.json"], "out=/proc/nope/x.json cannot be written"),
        (["domain=poems"], "domain='poems' is not possible; it must be one of molecules"),
        (["metrics.scorer=/tmp"], "unknown key `scorer` (='/tmp') in metrics of the domain molecules"),
        (["scorer=/tmp"], "write `metrics.scorer`"),
        (["split=nope"], "no split 'nope'"),
        (["nelbo_draws=0"], "nelbo_draws=0 is not possible"),
        (["nelbo_passes=2"], "nelbo_passes=2 is not possible"),
        (["seeds=[0,1,0]"], "seeds=[0, 1, 0] is not possible"),
        (["seeds=[]"], "seeds=[] is not possible"),
        (["seeds=[-1]"], "seeds=[-1] is not possible"),
    ],
)
def test_evaluation_mistakes(base, capsys, keys, message):
    assert main(["evaluate", str(base), "num=8", "sampler.steps=2", "nelbo_samples=8", *keys]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_an_export_has_no_raw_weights(command, capsys):
    model = ROOT / "configs" / "qm9" / "base-model"
    assert main([command, str(model), "weights=raw", "num=1", "sampler.steps=1"]) == 1
    assert "weights=raw" in capsys.readouterr().err


def test_evaluations_do_not_replace_each_other(base):
    keys = ["nelbo_samples=0", "num=4", "sampler.steps=2"]
    for extra in ([], ["sampler.temperature=0.5"], ["weights=raw"], ["sampler.temperature=0.5"]):
        assert main(["evaluate", str(base), *keys, *extra]) == 0
    found = [json.loads(path.read_text()) for path in (base / "evaluations").glob("step6_test_T2_*.json")]
    assert sorted((r["config"]["weights"], r["config"]["sampler"]["temperature"]) for r in found) == [
        ("ema", 0.5),
        ("ema", 1.0),
        ("raw", 1.0),
    ]


def test_raw_weights_are_not_the_averages(base):
    ema, raw = (scmdm.load(base, weights=kind).model for kind in ("ema", "raw"))
    assert any(not torch.equal(a, b) for a, b in zip(ema.parameters(), raw.parameters(), strict=True))


def test_a_model_trained_with_flash_attention_loads_anywhere(base, tmp_path):
    import shutil

    from scmdm.checkpoint.reader import find_model
    from scmdm.checkpoint.seal import seal

    copy = tmp_path / "model"
    shutil.copytree(find_model(base), copy)
    (copy / "model.json").write_text((copy / "model.json").read_text().replace('"auto"', '"flash"'))
    (copy / "checkpoint.json").unlink()
    seal(copy)
    assert main(["sample", str(copy), "num=2", "sampler.steps=2", "device=cpu"]) == 0


def test_the_text_road_end_to_end(tmp_path, empty_yaml, capsys):
    """Prepare, train, adapt, evaluate and report on characters; the scorer is named in the output."""
    (tmp_path / "a.txt").write_text(
        "\n\n".join(f"Line {i} of a small play. Enter {i * 7 % 13} ghosts. " * 20 for i in range(150))
    )
    data, run, adapted = tmp_path / "data", tmp_path / "base", tmp_path / "adapted"
    prepare = [
        "source.name=text",
        f"source.path={tmp_path / 'a.txt'}",
        "tokenizer.name=characters",
        "length=32",
        "pad_policy=ignore",
    ]
    assert (
        main(["prepare", str(empty_yaml), f"out={data}", "validation_fraction=0.2", "test_fraction=0.2", *prepare]) == 0
    )
    assert main(["train", str(empty_yaml), f"run_dir={run}", f"data.path={data}", "train.steps=4", *TINY]) == 0
    keys = [f"run_dir={adapted}", f"base={run}", f"data.path={data}", "train.steps=4", *ADAPTED]
    extra = ["self_conditioning.rate=1", "model.conditioner=mlp", "self_conditioning.rollout_steps=1"]
    assert main(["adapt", str(empty_yaml), *keys, *extra, "train.validate_every=2", "train.validation_samples=20"]) == 0
    words = "metrics.known_words=true"
    assert main(["evaluate", str(adapted), "nelbo_samples=10", "num=6", "sampler.steps=3", words]) == 0
    text = capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in (adapted / "evaluations").glob("*.json"))
    assert 0 <= result["samples"][0]["metrics"]["known_words"] <= 1
    assert "not a neural scorer" in text and "entropy" in text and "NELBO conditioned" in text
    validation = [row for row in rows(adapted / "metrics.jsonl") if row["kind"] == "validation"]
    assert [row["step"] for row in validation] == [2, 4] and validation[0]["nelbo_conditioned"] is not None
    assert main(["report", str(adapted)]) == 0
    assert "NELBO conditioned" in (adapted / "report.html").read_text()


def test_run_directory_holds_all_that_made_it(base):
    names = {path.name for path in base.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "train.log", "checkpoints"} <= names
    environment = json.loads((base / "environment.json").read_text())
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    if (ROOT / ".git").exists():
        assert len(environment["git"]["commit"]) == 40
    assert "step 6/6 loss" in (base / "train.log").read_text()


def test_a_decoder_is_adapted_and_the_adaptation_resumed(molecules, empty_yaml, tmp_path):
    run, adapted = tmp_path / "run", tmp_path / "adapted"
    width = tmp_path / "model.yaml"  # of a DiT, until the command line selects another kind
    width.write_text("model: {width: 32, layers: 2, heads: 2, condition_width: 8}\n")
    keys = [f"data.path={molecules}", "schedule.warmup_steps=0", *ADAPTED]
    decoder = ["model.kind=decoder", "model.kv_heads=1", "train.steps=2"]
    assert main(["train", str(width), f"run_dir={run}", *keys, *decoder]) == 0
    for steps in (2, 3):
        adaptation = [f"base={run}", f"run_dir={adapted}", "self_conditioning.rate=1", f"train.steps={steps}"]
        assert main(["adapt", str(empty_yaml), *keys, *adaptation]) == 0
    model = yaml.safe_load((adapted / "config.yaml").read_text())["model"]
    assert model["kind"] == "decoder" and model["kv_heads"] == 1 and model["self_conditioned"]


def test_an_adaptation_keeps_its_bases_dropout_unless_told_otherwise(base, molecules, empty_yaml, tmp_path):
    def adapted(source, name, *keys):
        common = [f"run_dir={tmp_path / name}", f"base={source}", f"data.path={molecules}", "train.steps=2", *ADAPTED]
        assert main(["adapt", str(empty_yaml), "self_conditioning.rate=1", *common, *keys]) == 0
        return tmp_path / name, yaml.safe_load((tmp_path / name / "config.yaml").read_text())["model"]["dropout"]

    first, dropout = adapted(base, "a", "model.dropout=0.2")
    assert dropout == 0.2
    assert adapted(first, "b")[1] == 0.2
    assert adapted(first, "c", "model.dropout=0")[1] == 0


@pytest.mark.parametrize(
    ("command", "keys", "message"),
    [
        ("train", ["base=x"], "`scmdm train` starts from scratch"),
        ("adapt", [], "`base` is not set"),
        ("adapt", ["base=/nonexistent"], "/nonexistent does not exist"),
        ("adapt", ["base={base}", "self_conditioning.rate=1", "model.width=64"], "model.width=64, but base="),
        ("adapt", ["base={base}", "self_conditioning.rate=1", "model.kind=decoder"], "model.kind=decoder, but base="),
        ("adapt", ["base={base}", "diffusion.schedule=cosine"], "diffusion.schedule='cosine', but base="),
        ("train", ["run_dir={file}/run"], "cannot be created"),
        ("train", ["data.train_split=nope"], "no split 'nope'"),
        ("train", ["data.validation_split=nope"], "no split 'nope'"),
        ("train", ["data.path=/nonexistent"], "is not a prepared data set"),
        ("train", ["model.self_conditioned=true"], "self_conditioning.rate=0"),
        ("train", ["model.kind=decoder", "model.rotary_length=64"], "model.rotary_length=64"),
        ("train", ["model.kind=decoder", "model.rotary_truncate=false"], "model.rotary_truncate=false"),
        ("train", [*EXPERTS, "model.router_bias_rate=0.1"], "model.router_bias_rate=0.1"),
        (
            "train",
            [*EXPERTS, "self_conditioning.rate=1", "self_conditioning.stop_gradient=false"],
            "self_conditioning.stop_gradient=false",
        ),
        ("train", ["engine=single", "fsdp.reshard_after_estimate=true"], "fsdp.reshard_after_estimate=true"),
    ],
)
def test_training_mistakes_stop_before_any_work(command, keys, message, base, molecules, tmp_path, empty_yaml, capsys):
    file = tmp_path / "file"
    file.write_text("")
    keys = [key.format(base=base, file=file) for key in keys]
    defaults = [f"run_dir={tmp_path / 'run'}", f"data.path={molecules}", "train.steps=2", "train.validate_every=0"]
    assert main([command, str(empty_yaml), *defaults, *keys]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU torch.compile needs no C++ compiler of ours")
def test_compiling_without_a_compiler_is_refused(molecules, tmp_path, empty_yaml, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    keys = [f"run_dir={tmp_path / 'run'}", f"data.path={molecules}", "train.steps=2", "train.validate_every=0"]
    assert main(["train", str(empty_yaml), *keys, "model.compile=block"]) == 1
    assert "needs a C++ compiler" in capsys.readouterr().err


def test_a_damaged_shard_stops_training_by_name(molecules, tmp_path, empty_yaml, capsys):
    import shutil

    shutil.copytree(molecules, tmp_path / "data")
    shard = next((tmp_path / "data/train").glob("*.mds"))
    os.truncate(shard, 100)
    keys = [f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'data'}", "train.steps=2", *TINY]
    assert main(["train", str(empty_yaml), *keys]) == 1
    error = capsys.readouterr().err
    assert "shard.00000.mds has 100 bytes instead of" in error and "overwrite=true" in error


SCRATCH = ["only=[x]", "arms.x={label: x, from_scratch: true}", "adaptation_seeds=[0,1]"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("overrides=[train.stepz=3]", "did you mean `train.steps`"),
        ("adapt_config=nowhere.yaml", "nowhere.yaml"),
        ("arms.scmdm.overrides=[self_conditioning.rate=7]", "arms.scmdm: self_conditioning.rate=7.0 is not possible"),
        ("arms.scmdm.overrides=[seed=7]", "arms.scmdm: seed"),
        ("arms.scmdm.overrides=['data={path: /elsewhere}']", "arms.scmdm: data.path='/elsewhere'"),
        ("overrides=[base=/elsewhere]", "base='/elsewhere'"),
        ("overrides=[run_dir=/elsewhere]", "run_dir='/elsewhere'"),
        (["from_scratch=true", "base_overrides=[run_dir=/elsewhere]"], "run_dir='/elsewhere'"),
        (["from_scratch=true", "base_overrides=['data={path: /elsewhere}']"], "data.path='/elsewhere'"),
        (["from_scratch=true", "base_overrides=[base=/elsewhere]"], "base=/elsewhere"),
        ([*SCRATCH, "base_overrides=[seed=5]"], "arms.x: seed=5"),
        ([*SCRATCH, "base_overrides=[base=/elsewhere]"], "base=/elsewhere"),
        ("base_overrides=[train.steps=3]", "base_overrides=['train.steps=3']"),
        ("arms.scmdm.overrides=[ema.reset=false,ema.warmup=false]", "arms.scmdm: ema.reset=false is not possible"),
        ("arms.scmdm.samples_of=nobody", "it must be one of base, vanilla, partial"),
        ("arms.scmdm.samples_of=vanilla", "leave overrides and from_scratch out"),
        ("arms.scmdm.sampler=[gumble=float32]", "did you mean `gumbel`?"),
        ("arms.scmdm.sampler=[steps=3]", "set steps=[...]"),
        ("sampler.steps=3", "set steps=[...]"),
        ("only=[scmd]", "only='scmd' is not possible; it must be one of vanilla, partial, scmdm"),
        ("reference=best", "reference='best' is not possible"),
        ("reference=partial", "reference='partial' is not possible; it must be one of vanilla, scmdm"),
        ("reference=", "reference='' is not possible"),
        ("arms.scmdm.label=continued vanilla", "arms.scmdm.label='continued vanilla'"),
        ("arms.scmdm.label=base", "arms.scmdm.label='base'"),
        ("arms.scmdm.label=held out", "arms.scmdm.label='held out'"),
        ("arms.scmdm.label= ", "arms.scmdm.label=' '"),
        (["only=[]", "arms.x/y.label=x"], "arms='x/y'"),
        (["only=[]", "arms={'../../x': {label: x}}"], "arms='../../x'"),
        (["only=[]", "arms={'..': {label: x}}"], "arms='..'"),
        (["only=[]", "arms={'': {label: x}}"], "arms=''"),
        ("nelbo_samples=0", "nelbo_samples=0 is not possible"),
        ("base=/nonexistent", "/nonexistent does not exist"),
        ("sampling_seeds=[0,0]", "sampling_seeds=[0, 0] is not possible"),
        ("adaptation_seeds=[]", "adaptation_seeds=[] is not possible"),
        ("adaptation_seeds=[1,-1]", "adaptation_seeds=[1, -1] is not possible"),
        ("steps=[4,4]", "steps=[4, 4] is not possible"),
    ],
)
def test_a_study_checks_all_its_runs_before_any_work(base, tmp_path, capsys, monkeypatch, key, message):
    monkeypatch.chdir(ROOT)
    keys = [key] if isinstance(key, str) else key
    arguments = ["study", "configs/qm9/quickstart.yaml", f"out={tmp_path / 'study'}", f"base={base}", *keys]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_study_end_to_end_and_again(base, tmp_path, capsys):
    """All of the quickstart at small size; the second time nothing is done again."""
    from tests.conftest import prepare_qm9

    prepare_yaml = tmp_path / "qm9.yaml"
    text = (ROOT / "configs/data/qm9.yaml").read_text().replace("data/qm9", str(tmp_path / "data"))
    prepare_yaml.write_text(text.replace("length: 32", "length: 24") + "limit: 900\nvalidation_fraction: 0.1\n")
    assert prepare_qm9(tmp_path / "data", "overwrite=true") == 0
    steps = "overrides=[train.steps=4,schedule.warmup_steps=1,train.global_batch_size=64,train.micro_batch_size=64]"
    keys = [f"out={tmp_path / 'study'}", f"prepare={prepare_yaml}", f"base={base}", steps, "num=60", "nelbo_samples=50"]
    config = str(ROOT / "configs/qm9/quickstart.yaml")
    arguments = ["study", config, *keys, f"adapt_config={ROOT / 'configs/qm9/adapt.yaml'}", "steps=[2,4]"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "rate 1 (SCMDM)" in printed and "against continued vanilla" in printed
    evaluations = sorted((tmp_path / "study/evaluations").iterdir())
    assert len(evaluations) == 3 * (1 + 2 * 2)
    before = {path: path.stat().st_mtime_ns for path in evaluations}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in evaluations} == before
    study = json.loads((tmp_path / "study/study.json").read_text())
    counts = {(r["arm"], r["steps"]): r["evaluations"] for r in study["evaluations"] if r["kind"] == "samples"}
    assert all(evaluations == steps for (_, steps), evaluations in counts.items())
    spent = {
        arm["name"]: arm["cost"][0]["evaluations"] / arm["cost"][0]["sequences"] for arm in study["arms"] if arm["cost"]
    }
    assert spent == {"vanilla": 1, "scmdm": 2}
    assert len({arm["cost"][0]["tokens"] for arm in study["arms"] if arm["cost"]}) == 1


@pytest.mark.slow
def test_a_training_starts_without_importing_the_compiler():
    """Which takes a second; a run with model.compile imports it when it compiles."""
    code = "import sys, scmdm.training.trainer, scmdm.sampling.generation; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
