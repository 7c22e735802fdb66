"""Peak memory of an export: `python -m tests.convert.test_export_memory SMALL_RUN CHECKPOINT OUT SHARD_GB`."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scmdm.checkpoint.reader import find_model
from scmdm.checkpoint.seal import seal, verify_checkpoint
from scmdm.cli import main
from scmdm.models.model_files import TENSORS, open_model
from scmdm.models.safetensors_headers import published_tensors
from scmdm.models.safetensors_writer import write_file
from tests.conftest import ROOT
from tests.weights import weights_of

RANKS = 4


def write_sharded(base, checkpoint, width):
    """Write a checkpoint with the base's files and a wider model's random weights and moments, in four shards."""
    source = find_model(base)
    checkpoint.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.name != "checkpoint.json":
            (checkpoint / path.name).write_bytes(path.read_bytes())
    content = json.loads((checkpoint / "model.json").read_text())
    content["model"] |= {"width": width, "layers": 4, "heads": 4}
    (checkpoint / "model.json").write_text(json.dumps(content, indent=2) + "\n")
    shapes = {name: value.shape for name, value in open_model(checkpoint).spec.build().named_parameters()}
    (checkpoint / TENSORS).mkdir()
    generator = torch.Generator().manual_seed(0)
    written = {}
    for rank in range(RANKS):
        parts, offsets = {}, {}
        for name, shape in shapes.items():
            dimension = rank_dimension(shape)
            begins = [shape[dimension] * i // RANKS for i in range(RANKS + 1)]
            size = list(shape)
            size[dimension] = begins[rank + 1] - begins[rank]
            for prefix in ("weights.", "ema.", "exp_avg.", "exp_avg_sq."):
                parts[prefix + name] = torch.randn(size, generator=generator)
                begin = [begins[rank] if i == dimension else 0 for i in range(len(shape))]
                offsets[prefix + name] = {"saved_offsets": begin}
        parts = {name: value for name, value in parts.items() if value.numel()}
        placed = {name: offsets[name] for name in parts}
        file = f"{TENSORS}/shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        written[file] = write_file(checkpoint / file, parts, {"DCP_SHARDING_INFO": json.dumps(placed)})
    seal(checkpoint, written)


def rank_dimension(shape):
    """Shards of matrices are columns, which are not contiguous in the whole tensor."""
    return len(shape) - 1


def measure(small, checkpoint, out, gigabytes):
    """Print by how many bytes an export raises the peak of this process's memory above that of a small one."""
    assert main(["export", str(small), f"{out}-small", "format=hub"]) == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["export", str(checkpoint), str(out), "format=hub", f"shard_gb={gigabytes}"]) == 0
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


@pytest.mark.slow
def test_an_export_holds_less_than_two_of_its_files(base, tmp_path):
    write_sharded(base, tmp_path / "checkpoint", 768)
    arguments = [base, tmp_path / "checkpoint", tmp_path / "out", "0.03"]
    command = [sys.executable, "-m", "tests.convert.test_export_memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 0.031e9 for path in files)
    assert int(done.stdout.split()[-1]) < 2 * 0.03e9
    exported = published_tensors(tmp_path / "out")
    assert {name.removeprefix("network.") for name in exported} == set(weights_of(tmp_path / "checkpoint"))


def test_an_export_is_sealed_with_the_hashes_of_its_writing(base, tmp_path):
    assert main(["export", str(base), str(tmp_path / "out"), "shard_gb=0.00001"]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert verify_checkpoint(tmp_path / "out") == []
    ours, theirs = weights_of(find_model(base)), weights_of(tmp_path / "out")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    measure(*map(Path, sys.argv[1:4]), float(sys.argv[4]))
