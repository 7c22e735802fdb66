"""`scmdm report`."""

from __future__ import annotations

from pathlib import Path

from scmdm.errors import UserError
from scmdm.evaluation.run_report import run_report
from scmdm.evaluation.study_record import STUDY_FILE
from scmdm.evaluation.study_report import print_summary, study_report
from scmdm.system.files import require_output_file
from scmdm.system.run_directory import run_of
from scmdm.system.terminal import say


def write_report(directory: Path, *, out: Path | None) -> None:
    """Write the report of a run or a study to `out`, by default `report.html` in its directory."""
    run, is_study = run_of(directory), (directory / STUDY_FILE).exists()
    if run is None and not is_study:
        raise UserError(f"{directory} is neither a run (metrics.jsonl) nor a study (study.json); give one of those")
    out = out or (run or directory) / "report.html"
    require_output_file(out, ".html")
    if is_study:
        print_summary(study_report(directory, out))
    else:
        assert run is not None
        run_report(run, out)
    say(f"wrote {out}")
