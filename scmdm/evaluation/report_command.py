"""`scmdm report`."""

from __future__ import annotations

from pathlib import Path

from scmdm.errors import UserError
from scmdm.evaluation.run_report import run_report
from scmdm.evaluation.study_report import print_summary, study_report
from scmdm.system.terminal import say


def write_report(directory: Path, *, out: Path | None) -> None:
    """Write the report of a run or a study to `out`, by default `report.html` in its directory."""
    out = out or directory / "report.html"
    if (directory / "study.json").exists():
        print_summary(study_report(directory, out))
    elif (directory / "metrics.jsonl").exists():
        run_report(directory, out)
    else:
        raise UserError(f"{directory} is neither a run (metrics.jsonl) nor a study (study.json); give one of those")
    say(f"wrote {out}")
