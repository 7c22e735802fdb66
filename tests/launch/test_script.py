"""Batch scripts, quoting, and the frozen code and configuration of a launch."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scmdm.cli import main
from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.launch import Container, Ranks, SlurmJob
from scmdm.config.loading import load_config
from scmdm.config.preparation import PrepareConfig
from scmdm.config.run import RunConfig
from scmdm.config.study import StudyConfig
from scmdm.errors import UserError
from scmdm.launch.batch_script import render, render_preparation
from scmdm.launch.freeze import FrozenLaunch, freeze, plan_launch, resolve
from scmdm.observability.environment import REVISION_FILE, git_revision
from scmdm.system.signals import REQUEUE_EXIT
from tests.conftest import ROOT

ADAPT = ["adapt", str(ROOT / "configs/qm9/adapt.yaml"), "base=runs/base", "train.micro_batch_size=4"]


def dry_run(capsys, tmp_path, *options, status=0):
    assert main(["launch", *options[:1], *ADAPT, f"run_dir={tmp_path / 'run'}", *options[1:], "--dry-run"]) == status
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"
    captured = capsys.readouterr()
    return captured.err if status else captured.out


SCRIPTS = {
    "--nodes 2 --gpus-per-node 8 --cpus-per-rank 7 --time 4:00:00 --qos high": """
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=56
#SBATCH --gpus-per-node=8
#SBATCH --time=4:00:00
#SBATCH --qos=high
#SBATCH --signal=USR1@120
#SBATCH --requeue
""",
    "--nodes 4 --gpus-per-node 4 --cpus-per-rank 7 --starter srun --signal USR2": """
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=7
#SBATCH --signal=USR2@120
  --starter srun \\
  85|143|140)
""",
    "--container-image scmdm.sqsh --container-mount /scratch:/scratch --signal-before 300": """
#SBATCH --signal=USR1@300
  --container-image=scmdm.sqsh \\
""",
    "--container-image a.sif --container-runtime apptainer --setup module\\ load\\ apptainer": """
module load apptainer
""",
    "--sbatch mem=0 --sbatch=--exclusive --no-requeue --account me --partition gpu": """
#SBATCH --partition=gpu
#SBATCH --account=me
#SBATCH --mem=0
#SBATCH --exclusive
  : # left to the site's RequeueExit
""",
}


@pytest.mark.parametrize(("options", "lines"), SCRIPTS.items())
def test_scripts_are_valid_and_contain_the_options(capsys, tmp_path, options, lines):
    script = dry_run(capsys, tmp_path, "slurm", *shlex.split(options))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert not set(lines.strip("\n").splitlines()) - set(script.splitlines())
    assert ("scontrol requeue" in script) == ("--no-requeue" not in options)


def test_apptainer_gets_the_command_and_the_run_directory(capsys, tmp_path):
    script = dry_run(capsys, tmp_path, "slurm", "--container-image", "a.sif", "--container-runtime", "apptainer")
    line = next(line for line in script.splitlines() if "apptainer exec" in line)
    assert f"{tmp_path / 'run'}:{tmp_path / 'run'}" in line and line.endswith(" a.sif \\")
    assert "SCMDM_STOP_SIGNALS=TERM,USR1,INT python)" in script, "the image's interpreter"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["slurm", "--nodes", "0"], "--nodes=0 is not possible; it must be between 1 and 65536"),
        (["slurm", "--gpus-per-node", "2", "--ranks-per-node", "3"], "--ranks-per-node=3 is not possible"),
        (["slurm", "--time", "soon"], "--time='soon' is not possible; it must be minutes, HH:MM:SS or days-hours"),
        (["slurm", "--time", "\uff11\uff12"], "--time="),
        (["slurm", "--attempts", "0"], "--attempts=0"),
        (["slurm", "--container-mount", "/a:/a"], "--container-image"),
        (["slurm", "--container-runtime", "apptainer"], "--container-image"),
        (["slurm", "--nodes", "3"], "train.global_batch_size=64 is not possible with 3 processes"),
        (["slurm", "engine=single", "--nodes", "2"], "engine=single is not possible with 2 processes"),
        (["local", "base=null"], "`base` is not set"),
        (["local", "train.stepps=3"], "did you mean `train.steps`?"),
    ],
)
def test_mistakes_are_reported_at_the_launch(capsys, tmp_path, options, message):
    assert message in dry_run(capsys, tmp_path, *options, status=1)


HOSTILE = "a b'c\"d$(touch e)`touch f`;touch g&&x|y>z#h\\i%jé本${k}!l*"


def canonical(script):
    """The commands of a script as bash itself parses and prints them."""
    printing = f"f() {{\n{script}\n}}\ndeclare -f f"
    return subprocess.run(["bash"], input=printing, capture_output=True, text=True, check=True).stdout


def unmarked(word):
    """A directory has no backslash, which is refused."""
    return word.replace(HOSTILE, "PLAIN").replace(HOSTILE.replace("\\", ""), "PLAIN")


def directives(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def rendered(text, starter="srun", runtime="pyxis", array=None, command="adapt"):
    words = (f"model {text}", text) if command == "export" else ()
    place = Path("/runs") / text.replace("\\", "")
    frozen = FrozenLaunch(command, place, place / "launch" / "now", words)
    job = SlurmJob(
        **dict.fromkeys(("name", "partition", "account", "qos", "python"), text),
        sbatch=(f"comment={text}", "exclusive"),
        container=Container(text, runtime, (f"/{text}:/{text}",)),
    )
    if array is not None:
        return render_preparation(frozen, Ranks(starter=starter), job, Path("/cwd") / text, array)
    return render(frozen, Ranks(starter=starter), job, Path("/cwd") / text)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"starter": "torchrun", "runtime": "apptainer"},
        {"array": 3},
        {"array": 3, "runtime": "apptainer"},
        {"command": "export"},
    ],
)
def test_no_value_adds_a_command_or_an_option(kind):
    """With hostile values in every place bash parses the same commands, and sbatch the same options."""
    plain, hostile = rendered("PLAIN", **kind), rendered(HOSTILE, **kind)
    subprocess.run(["bash", "-n"], input=hostile, text=True, check=True)
    commands, expected = shlex.split(canonical(hostile)), shlex.split(canonical(plain))
    assert [unmarked(word) for word in commands] == expected
    # sbatch reads quotes as a shell does, except that a backslash escapes everywhere, and replaces %% by %.
    options = [shlex.split(line.replace("\\\\", "\\")) for line in directives(hostile)]
    assert all(len(words) == 1 for words in options)
    found = [unmarked(words[0].replace("%%", "%")) for words in options]
    assert found == [line.replace("%%", "%") for line in directives(plain)]
    assert "--exclusive" in found and "--comment=PLAIN" in found


@pytest.mark.parametrize("text", ["a\nb", "a\0b", "a\rb", "a\x1bb", "a\u2028b", "a\udcffb"])
def test_values_of_several_lines_are_refused(text):
    with pytest.raises(UserError, match="must be one line of printable characters"):
        rendered(text)


def test_other_values_that_are_refused():
    frozen, ranks = FrozenLaunch("adapt", Path("/runs/a:b"), Path("/runs/a:b/launch")), Ranks()
    with pytest.raises(UserError, match="/runs/a:b cannot be mounted"):
        render(frozen, ranks, SlurmJob(container=Container("image")), Path("/cwd"))
    with pytest.raises(UserError, match=r"a\\b"):
        render(FrozenLaunch("adapt", Path("/a\\b"), Path("/a\\b/launch")), ranks, SlurmJob(), Path("/cwd"))
    with pytest.raises(UserError, match="--sbatch 'a b' is not possible"):
        render(frozen, ranks, SlurmJob(sbatch=("a b=c",)), Path("/cwd"))
    with pytest.raises(UserError, match="--setup="):
        render(frozen, ranks, SlurmJob(setup=("module load a\nrm b",)), Path("/cwd"))


def test_a_preparation_is_an_array(capsys, tmp_path):
    command = ["launch", "slurm", "prepare", str(ROOT / "configs/data/qm9.yaml"), f"out={tmp_path / 'qm9'}"]
    options = ["--array", "4", "--cpus-per-rank", "8", "--time", "60", "--setup", "module load python"]
    assert main([*command, *options, "--dry-run"]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for line in ("--array=0-3", "--cpus-per-task=8", "--time=60", "--signal=B:USR1@120", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert 'prepare "$launch/config.yaml" slice="$SLURM_ARRAY_TASK_ID/4" &\n' in script
    assert "\nmodule load python\n" in script and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "status"), [([], 128 + signal.SIGUSR1), (["--no-requeue"], REQUEUE_EXIT)])
def test_a_preparation_that_is_signalled_before_its_time_limit(capsys, tmp_path, option, status):
    """The script runs with stand-ins for SLURM's commands: srun signals the shell, as SLURM does."""
    command = ["launch", "slurm", "prepare", str(ROOT / "configs/data/qm9.yaml"), f"out={tmp_path / 'qm9'}"]
    assert main([*command, *option, "--dry-run"]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    stand_ins = """srun() { sleep 0.5; kill -USR1 $$; sleep 2; }
scontrol() { echo "scontrol $*"; }
export SLURM_JOB_ID=7 SLURM_ARRAY_TASK_ID=0 SLURM_JOB_NODELIST=here
"""
    done = subprocess.run(["bash", "-c", stand_ins + script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    assert ("scontrol requeue 7" in done.stdout) == ("requeued" in done.stdout) == (not option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["prepare", "configs/data/qm9.yaml", "--array", "0"], "--array=0 is not possible"),
        (["prepare", "configs/data/qm9.yaml", "--nodes", "2"], "--nodes=2 is not possible with prepare"),
        (["prepare", "configs/data/qm9.yaml", "overwrite=true"], "overwrite=true is not possible"),
        (["prepare", "configs/data/qm9.yaml", "slice=2/8", "--array", "4"], "slice='2/8'"),
        *(
            (["prepare", "configs/data/qm9.yaml", option, value], f"{option}={value} is not possible with prepare")
            for option, value in (
                ("--starter", "srun"),
                ("--start-timeout", "9"),
                ("--grace", "9"),
                ("--attempts", "9"),
            )
        ),
        ([*ADAPT, "--array", "2"], "--array=2 is not possible with adapt; it must be left out"),
    ],
)
def test_mistakes_about_arrays(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(ROOT)
    assert main(["launch", "slurm", *options, "--dry-run"]) == 1
    assert message in capsys.readouterr().err


LATER = ["--after", "12"]  # the model need not exist yet


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["demo", "model"], "'demo'"),
        (["evaluate", "model"], "model"),  # there is none
        (["sample", "model", *LATER], "`out`"),
        (["evaluate", "model", "other", *LATER], "'other'"),
        (["export", "model", *LATER], "[]"),
        (["export", "model", "exported", "--nodes", "2", *LATER], "export"),
        (["study", str(ROOT / "configs/qm9/quickstart.yaml"), "only=[nope]"], "only"),
        (["evaluate", "model", "sampler.stepps=3", *LATER], "sampler.steps"),
        (["adapt", "configs/qm9/adapt.yaml", "--config", "other.yaml"], "other.yaml"),
        (["evaluate", "model", "--after", "12;rm"], "--after='12;rm'"),
    ],
)
def test_mistakes_of_other_commands(capsys, tmp_path, monkeypatch, options, named):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "slurm", *options]) == 1
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "target", "words"),
    [
        (["evaluate", "a run", "num=4"], "a run/launch", ["evaluate", "a run"]),
        (["evaluate", "elsewhere", "num=4"], "evaluations/elsewhere.launch", ["evaluate", "elsewhere"]),
        (["evaluate", "elsewhere", "out=e$x.json"], "e$x.json.launch", ["evaluate", "elsewhere"]),
        (["sample", "a run", "out=50%.jsonl"], "50%.jsonl.launch", ["sample", "a run"]),
        (["export", "a run", "for 'you'", "format=mdlm"], "for 'you'.launch", ["export", "a run", "for 'you'"]),
    ],
)
def test_commands_with_a_model(capsys, tmp_path, monkeypatch, options, target, words):
    """The model does not exist yet: an earlier job makes it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a run/launch").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert main(["launch", "slurm", *options, *LATER, "--dry-run"]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert sorted(tmp_path.rglob("*")) == before
    (directory,) = (shlex.split(line)[0] for line in script.splitlines() if line.startswith("launch="))
    assert Path(directory.removeprefix("launch=")).parent == tmp_path / target
    command = next(line for line in script.splitlines() if line.strip().startswith("-- "))
    assert shlex.split(command) == ["--", *words, "--config", "$launch/config.yaml"]
    assert "--dependency=afterok:12" in script and "#SBATCH --dependency" not in script


def test_a_study_takes_nodes_and_gpus(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["launch", "slurm", "study", "configs/qm9/quickstart.yaml", f"out={tmp_path / 'study'}"]
    ranks = ["--nodes", "2", "--gpus-per-node", "2"]
    assert main([*command, "overrides=[train.micro_batch_size=16]", *ranks, "--dry-run"]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH --nodes=2" in script and "#SBATCH --gpus-per-node=2" in script and "--ranks-per-node 2" in script
    (launched,) = (line.strip() for line in script.splitlines() if line.strip().startswith("-- "))
    assert shlex.split(launched) == ["--", "study", "$launch/config.yaml"]
    # A batch that the ranks of a run cannot share is named with the arm, as is a run's mistake.
    for keys, named in ((["--nodes", "3"], "global_batch_size"), (["overrides=[train.stepps=2]"], "stepps")):
        assert main([*command, *keys, "--dry-run"]) == 1
        error = capsys.readouterr().err
        assert "arms." in error and named in error
    assert not list(tmp_path.iterdir())


def test_a_study_of_a_model_that_an_earlier_job_makes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["launch", "slurm", "study", "configs/qm9/ablations.yaml", f"out={tmp_path / 'study'}"]
    command += [f"base={tmp_path / 'later'}", "--dry-run"]
    assert main([*command, *LATER]) == 0
    capsys.readouterr()
    assert main(command) == 1
    assert str(tmp_path / "later") in capsys.readouterr().err


def test_a_study_on_one_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["launch", "local", "study", "configs/qm9/quickstart.yaml", f"out={tmp_path / 'study'}"]
    assert main([*command, "--dry-run"]) == 0
    arguments = shlex.split(capsys.readouterr().out)
    assert arguments[-2] == "study" and Path(arguments[-1]).parents[1] == tmp_path / "study.launch"


def test_a_frozen_evaluation_reads_its_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = resolve("evaluate", Path("run"), ["seeds=[1, 2]", "texts.a=file"], later=True)
    frozen = plan_launch(resolved)
    freeze(frozen, resolved.config)
    assert load_config(EvaluateConfig, frozen.config) == resolved.config
    assert frozen.arguments("x") == ["evaluate", "run", "--config", "x"]


def test_a_launched_study_is_frozen_with_the_files_that_it_names(tmp_path, monkeypatch):
    """Edits do not reach the job, which may run where scmdm's own files are missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parent.yaml").write_text("extends: configs/qm9/base.yaml\noptimizer: {lr: 2e-3}\n")
    (tmp_path / "mine.yaml").write_text("extends: parent.yaml\ntrain: {log_every: 7}\n")
    keys = [f"{name}=mine.yaml" for name in ("base_config", "adapt_config")]
    resolved = resolve("study", ROOT / "configs/qm9/quickstart.yaml", ["out=study", *keys], later=True)
    frozen = plan_launch(resolved)
    freeze(frozen, resolved.config)
    own = [f"run_dir={tmp_path / 'run'}", "data.path=data", "train.steps=900"]
    before = load_config(RunConfig, tmp_path / "mine.yaml", own)
    (tmp_path / "mine.yaml").write_text("train: {log_every: 8}\n")
    (tmp_path / "parent.yaml").unlink()
    study = load_config(StudyConfig, frozen.config)
    named = [study.prepare, study.base_config, study.adapt_config, study.base]
    assert all(Path(path).is_relative_to(frozen.directory) for path in named), named
    assert load_config(PrepareConfig, Path(study.prepare)) == load_config(PrepareConfig, Path("configs/data/qm9.yaml"))
    for name in (study.base_config, study.adapt_config):
        assert load_config(RunConfig, Path(name), own) == before
    assert (Path(study.base) / "model.json").is_file()


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_a_model_that_comes_with_scmdm_is_copied(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    arguments = {"sample": ["out=a.jsonl"], "evaluate": ["out=a.json"], "export": ["exported"]}[command]
    resolved = resolve(command, ROOT / "configs/qm9/long-base", arguments)
    frozen = plan_launch(resolved)
    freeze(frozen, resolved.config)
    model = Path(frozen.arguments("x")[1])
    assert model.is_relative_to(frozen.directory) and (model / "model.json").is_file()
    assert model.name == "long-base", "the output of an evaluation without `out` is named after it"


def test_without_slurm_the_script_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main(["launch", "slurm", *ADAPT, f"run_dir={tmp_path / 'run'}"]) == 1
    assert "no sbatch on this machine" in capsys.readouterr().err
    (script,) = (tmp_path / "run/launch").glob("*/job.sbatch")
    assert script.read_text().startswith("#!/usr/bin/env bash\n# scmdm adapt into ")


def test_a_job_runs_frozen_code_and_configuration(tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text(f"run_dir: {tmp_path / 'run'}\ntrain: {{steps: 3}}\ndata: {{path: here}}\n")
    resolved = resolve("train", settings, ["seed=5", "train.global_batch_size=4", "train.micro_batch_size=4"])
    config, frozen = resolved.config, plan_launch(resolved)
    freeze(frozen, config)
    settings.write_text("train: {steps: 9}\n")
    kept = load_config(RunConfig, frozen.config)
    assert kept == config and kept.seed == 5 and kept.train.steps == 3
    # The copy, marked, and not the checkout that is the working directory.
    marked = frozen.code / "scmdm/__main__.py"
    marked.write_text(marked.read_text() + "\nprint('the copy')\n")
    marked.write_text("print('the copy')\n" + marked.read_text().replace("from __future__", "# from __future__"))
    done = subprocess.run(
        [sys.executable, "-m", "scmdm", "--help"], cwd=ROOT, env=frozen.environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("the copy\n"), done.stderr
    assert plan_launch(resolved).directory != frozen.directory


def test_frozen_code_reports_the_revision_of_its_original(tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text(f"run_dir: {tmp_path / 'run'}\ntrain: {{steps: 3}}\ndata: {{path: here}}\n")
    resolved = resolve("train", settings, [])
    frozen = plan_launch(resolved)
    freeze(frozen, resolved.config)
    kept = frozen.code / REVISION_FILE
    assert json.loads(kept.read_text()) == git_revision(ROOT / "scmdm")
    kept.write_text('{"commit": "of the original", "changed": false}')
    program = "from scmdm.observability.environment import describe_environment as e; print(e()['git']['commit'])"
    done = subprocess.run([sys.executable, "-c", program], env=frozen.environment, capture_output=True, text=True)
    assert done.stdout == "of the original\n", done.stderr


def test_options_override_a_sites_defaults(tmp_path):
    command = [ROOT / "launch/slurm.sh", *ADAPT, f"run_dir={tmp_path / 'run'}", "--nodes", "2", "--time", "1:00:00"]
    wrapper = tmp_path / "scmdm"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m scmdm "$@"\n')
    wrapper.chmod(0o755)
    environment = {**os.environ, "SCMDM": str(wrapper)}
    done = subprocess.run([*command, "--dry-run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in ("--nodes=2", "--gpus-per-node=8", "--time=1:00:00", "--signal=USR1@180"):
        assert f"#SBATCH {line}\n" in done.stdout
