"""`scmdm` that records the samples and the noise of each step: `-m tests.distributed.recorded_noise DIRECTORY ...`."""

import json
import os
import sys
from hashlib import sha256
from pathlib import Path

from scmdm.cli import main
from scmdm.training import step as training_step


def record(directory):
    """Append a line per sample that a step of this process trains on."""
    noise_batch, path = training_step.noise_batch, Path(directory) / f"{os.getpid()}.jsonl"
    path.parent.mkdir(exist_ok=True)

    def noise_and_record(sequences, t_B, *, step, **options):
        batch = noise_batch(sequences, t_B, step=step, **options)
        with path.open("a") as file:
            for at, sample in enumerate(sequences.ids.tolist()):
                tensors = (batch.x[at], batch.z[at], batch.t[at], batch.conditioned[at])
                values = [sha256(tensor.cpu().numpy().tobytes()).hexdigest() for tensor in tensors]
                file.write(json.dumps([step, sample, *values]) + "\n")
        return batch

    training_step.noise_batch = noise_and_record


def recorded(directory):
    """Distinct records of all processes; a step that is repeated after a kill counts once if it is repeated exactly."""
    lines = [line for path in Path(directory).iterdir() for line in path.read_text().splitlines()]
    return {tuple(json.loads(line)) for line in lines if line.endswith("]")}  # a killed rank's last line may be cut


if __name__ == "__main__":
    record(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
