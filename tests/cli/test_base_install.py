"""The base install: text is prepared, trained, adapted, sampled and evaluated without the packages of any extra."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv

import pytest
from packaging.requirements import Requirement

from scmdm.system.extras import EXTRAS, PURPOSES, extra_of_module, missing_packages, module_of
from tests.conftest import ADAPTED, ROOT, TINY

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Of these, torchvision and pillow are always installed: mosaicml-streaming and matplotlib require them.
BLOCKED = sorted({module_of(package) for packages in EXTRAS.values() for package in packages})
BLOCKER = f"""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        caller = sys._getframe(1)
        while caller and ("importlib" in caller.f_code.co_filename or "<frozen" in caller.f_code.co_filename):
            caller = caller.f_back
        own = caller is not None and caller.f_code.co_filename.startswith({str(ROOT)!r})
        if own and name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
        return None

sys.meta_path.insert(0, Blocked())
"""


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    return {canonical(Requirement(text).name) for text in requirements}


def test_extras_are_those_of_the_project():
    declared = PROJECT["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert names(declared[extra]) == set(packages)
    assert set(PURPOSES) == set(EXTRAS) == set(declared) - {"all", "dev", "browser"}
    assert not names(PROJECT["dependencies"]) & {package for packages in EXTRAS.values() for package in packages}


def test_an_extra_is_named_for_its_module():
    assert extra_of_module("rdkit.Chem") == "molecules" and extra_of_module("sklearn.datasets") == "images"
    assert extra_of_module("PIL") == "images" and extra_of_module("torch") is None
    assert missing_packages("demo") == []


@pytest.mark.slow
def test_a_missing_package_ends_a_command_in_one_line(base):
    code = "import sys; sys.modules['rdkit'] = None; from scmdm.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "evaluate", str(base), "num=4"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "rdkit" in done.stderr and "scmdm[molecules]" in done.stderr and done.stderr.count("\n") == 1


RUNNER = """
import json, sys
from scmdm.cli import main

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code
        if status:
            sys.exit(f"{arguments}: exit status {status}")
"""


def run_text(python, folder, environment):
    """Prepare, train, adapt, sample and evaluate text in one process of an interpreter; returns the evaluation.

    Imports of an extra's packages by our own modules are refused, also of those that are always installed.
    """
    data, base, adapted = folder / "data", folder / "base", folder / "adapted"
    (folder / "a.txt").write_text("\n".join(f"{i} green bottles hanging on the wall" for i in range(90)))
    (folder / "runner.py").write_text(BLOCKER + RUNNER)
    empty = folder / "empty.yaml"
    empty.write_text("{}\n")
    small = [key for key in TINY if not key.startswith("train.")]
    run = ["train.steps=2", "train.global_batch_size=16", "train.micro_batch_size=16"]
    commands = [
        ["--help"],
        ["evaluate", "--help"],
        ["prepare", empty, *text_keys(folder), "length=64", f"out={data}", "workers=1"],
        ["train", empty, f"data.path={data}", f"run_dir={base}", *small, *run],
        ["adapt", empty, f"base={base}", f"data.path={data}", f"run_dir={adapted}", *adapted_keys(), *run],
        ["sample", adapted, "num=2", "sampler.steps=2", f"out={folder / 'samples.jsonl'}"],
        ["evaluate", adapted, "num=4", "nelbo_samples=8", "sampler.steps=2", f"out={folder / 'found.json'}"],
        ["report", adapted],
    ]
    command = [python, str(folder / "runner.py"), json.dumps(commands, default=str)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def text_keys(folder):
    fractions = ["validation_fraction=0.2", "test_fraction=0.2"]
    return [
        "source.name=text",
        f"source.path={folder / 'a.txt'}",
        "tokenizer.name=bytes",
        "source.unit=lines",
        *fractions,
    ]


def adapted_keys():
    return [*(key for key in ADAPTED if not key.startswith("train.")), "self_conditioning.rate=1"]


def closure(requirements):
    """Distributions that the requirements need, installed in this environment."""
    found, extras, waiting = {}, {}, [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonical(requirement.name)
        if name in found and requirement.extras <= extras[name]:
            continue
        found[name] = importlib.metadata.distribution(requirement.name)
        extras[name] = extras.get(name, set()) | requirement.extras
        for text in found[name].requires or []:
            needed = Requirement(text)
            chosen = [{"extra": extra} for extra in extras[name] or {""}]
            if needed.marker is None or any(needed.marker.evaluate(environment) for environment in chosen):
                waiting.append(needed)
    return found.values()


@pytest.mark.slow
def test_text_runs_in_an_environment_of_the_base_alone(tmp_path):
    """A virtual environment with links to the base dependencies, and to what they need, of this environment.

    Installing them took more than 8 minutes and 6.6 GB without pip's cache.
    """
    place = tmp_path / "venv"
    venv.create(place, symlinks=True)
    (packages,) = place.glob("lib/python*/site-packages")
    for distribution in closure(PROJECT["dependencies"]):
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            source = distribution.locate_file(top)
            if source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    (packages / "scmdm.pth").write_text(f"{ROOT}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    python = str(place / "bin/python")
    for module in ("rdkit", "fcd", "selfies", "qm9pack", "sklearn", "pyarrow", "datasets", "flask"):
        assert subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 1, module
    found = run_text(python, tmp_path, environment)
    assert found["domain"] == "text" and found["samples"][0]["metrics"]["perplexity"] > 1
    done = subprocess.run([python, "-m", "scmdm", "doctor"], env=environment, capture_output=True, text=True)
    assert "rdkit" in done.stdout and "scmdm[molecules]" in done.stdout
