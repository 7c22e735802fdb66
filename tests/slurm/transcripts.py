"""Write a lab note, such as docs/lab/2026-11-25-slurm.md, from the logs that the SLURM tests left behind:

python -m pytest tests/slurm --basetemp=PLACE -o tmp_path_retention_policy=all
python -m tests.slurm.transcripts PLACE > docs/lab/DATE-slurm.md
"""

import re
import sys
from pathlib import Path

SECTIONS = {
    "test_a_time_limit": "Time limit: save, requeue, finish",
    "test_preemption": "Preemption by a job of a higher partition",
    "test_scancel": "`scancel`: save, no requeue",
    "test_a_signal_before": "A signal before the first step (ranks started by srun, SIGUSR2)",
    "test_a_killed_rank": "A rank is killed",
    "test_a_killed_launcher": "All processes of a node are killed",
    "test_a_node_without": "A node fails with its slurmd and returns while the job waits",
    "test_a_node_that_never": "A node never starts its ranks",
    "test_repeated_failures": "Two failures at the same checkpoint, `--attempts 2`",
    "test_a_run_directory": "A second job on the run directory; the first one ends, a third continues",
    "test_an_array": "Preparation as an array of four tasks, one killed",
}
SHOWN = re.compile(
    r"^(scmdm:|srun: error|slurmstepd|going on|wrote)|INFO (resuming|stopped|saved|\d+ ranks)|RuntimeError|in SLURM job"
)
SHORTER = (
    (r"/\S*?/(?=(run\b|data\b|\.data))", ""),
    (r"\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d+ ", r"\1 "),
    (r"\[/\S+/(pair\.cc:\d+)\]", r"[\1]"),
)


def shown(log):
    """What tells the story: what SLURM and scmdm say, what ranks say of saves and ends; not more than a few saves."""
    kept, saves = [], 0
    for line in log.read_text(errors="replace").splitlines():
        if not SHOWN.search(line):
            continue
        saves = saves + 1 if "INFO saved" in line else 0
        if saves <= 2:
            for pattern, short in SHORTER:
                line = re.sub(pattern, short, line)
            kept.append(line[:120].rstrip())
    return kept


def main():
    place = Path(sys.argv[1])
    print("# SLURM transcripts\n")
    print("Logs of jobs of two nodes on a real SLURM, as `pytest tests/slurm` left them (CPU, gloo, a model of 30,000")
    print("parameters), shortened by `tests/slurm/transcripts.py`. The losses of each of these runs equal those of an")
    print("undisturbed run. What each event means: [SLURM jobs](../guides/slurm.md#what-happens-when).")
    for name, title in SECTIONS.items():
        print(f"\n## {title}\n\n```text")
        for log in sorted(place.glob(f"{name}*0/**/job-*.log")):
            print("\n".join(shown(log)))
        print("```")


if __name__ == "__main__":
    main()
