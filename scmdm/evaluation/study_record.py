"""The record of a study, `study.json`, and the files that it names, read strictly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scmdm.config.fields import require
from scmdm.config.study import check_arms
from scmdm.domains.sample_values import read_values
from scmdm.errors import UserError
from scmdm.system.json_lines import JsonLines, read_json_lines
from scmdm.system.run_directory import EVALUATIONS
from scmdm.system.untrusted import name_inside, parse_as, parse_json, read_bytes, reading

STUDY_FILE = "study.json"
_REMEDY = "run the study again"
_COUNTS = ("steps", "num", "evaluations")
_ROW_TYPES: dict[str, type | tuple[type, ...]] = {
    "arm": str,
    "adaptation_seed": int,
    "sampling_seed": int,
    "seconds": (int, float),
    "metrics": dict,
    "samples_file": str,
    **dict.fromkeys(_COUNTS, int),
}


@dataclass(frozen=True)
class TrainingCost:
    """What the training of one run cost."""

    step: int
    tokens: int
    seconds: float
    evaluations: int
    sequences: int


@dataclass(frozen=True)
class ArmRecord:
    """An arm of a study: its runs, their cost and the NELBO of their models."""

    name: str
    label: str
    rate: float
    runs: list[str]
    nelbo: list[dict[str, dict[str, float | None]]]
    cost: list[TrainingCost]
    from_scratch: bool = False
    samples_of: str | None = None
    sampler: list[str] = field(default_factory=list)  # overrides of the study's sampler


@dataclass(frozen=True)
class StudyRecord:
    """Contents of `study.json`."""

    title: str
    domain: str
    tokenizer: str
    held_out: str
    config: str
    environment: dict[str, Any]
    arms: list[ArmRecord]
    evaluations: list[dict[str, Any]]
    reference: str | None = None
    metric: str | None = None  # by which the arms are compared; None: the first of the domain


@dataclass(frozen=True)
class OpenStudy:
    """A study whose record was read: its arms and the rows of its samples as plain values, without damaged rows."""

    directory: Path
    record: StudyRecord
    arms: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)  # one line for each part that was left out

    def file(self, name: str) -> Path:
        """The path of a file that the record names. Raises UserError if it is not inside the study."""
        return name_inside(self.directory, name, self.directory / STUDY_FILE)

    def read_samples(self, name: str) -> list[dict[str, Any]]:
        """Read a file of samples without its damaged lines, which are noted, as is a file that cannot be read."""
        path = self.file(name)
        try:
            found = read_json_lines(path, _parse_sample)
        except UserError as error:
            self._note_once(f"left out: {error}")
            return []
        self.note(found)
        if not found.rows:
            self._note_once(f"left out: {found.path} has no samples; {_REMEDY}")
        return found.rows

    def _note_once(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def further_evaluations(self) -> int:
        """Number of evaluations of samples in the directory that the record does not name."""
        stored = sum(1 for _ in (self.directory / EVALUATIONS).glob("*_T*_s*.json"))
        named = sum(row.get("kind") == "samples" for row in self.record.evaluations)
        return max(0, stored - named)

    def read_values(self) -> None:
        """Read the values of each evaluation's samples into its row; those that have none are noted."""
        missing = 0
        for row in self.samples:
            row["values"] = {}
            if (name := row.get("values_file")) is None:
                missing += 1
                continue
            path = self.file(name)
            try:
                row["values"] = read_values(path)
            except UserError as error:
                self.problems.append(str(error))
        if missing:
            self.problems.append(
                f"{self.directory / STUDY_FILE}: {missing} of {len(self.samples)} evaluations have no values of single "
                "samples, as in studies of earlier versions: their metrics have no interval"
            )

    def note(self, found: JsonLines[Any]) -> None:
        """Note what could not be read of a file."""
        if found.problem is not None and found.problem not in self.problems:
            self.problems.append(found.problem)


def open_study(directory: Path) -> OpenStudy:
    """Read the record of the study in `directory`. Raises UserError, which names the place, if that is not possible."""
    path = directory / STUDY_FILE
    with reading(path, "record of a study", _REMEDY):
        content = parse_json(read_bytes(path), nan_is_null=True)
    record = parse_as(StudyRecord, content, path, _REMEDY)
    if not record.arms:
        raise UserError(f"{path}: arms=[]: there is nothing to report; {_REMEDY}")
    names = [arm.name for arm in record.arms]
    try:
        check_arms((arm.name, arm.label) for arm in record.arms)
        require(record.reference in (None, *names), "reference", record.reference, f"one of {', '.join(names)}")
    except UserError as error:
        raise UserError(f"{path}: {error}; change the study's configuration, and {_REMEDY}") from error
    samples, problems = [], []
    for number, row in enumerate(record.evaluations):
        if row.get("kind") == "nelbo":
            continue
        if row.get("kind") == "samples" and row.get("arm") in names and is_sample_row(row):
            samples.append({**row, "num": row.get("drawn", row["num"])})  # earlier versions wrote `num` alone
        else:
            problems.append(f"{path}: evaluations.{number} is damaged and left out")
    if not samples:
        raise UserError(f"{path} has no evaluation of samples; {_REMEDY}")
    study = OpenStudy(directory, record, [asdict(arm) for arm in record.arms], samples, problems)
    study.read_values()
    return study


def is_sample_row(row: dict[str, Any]) -> bool:
    """Return whether a row has everything that tables and figures read of an evaluation of samples."""
    typed = all(isinstance(row.get(name), kind) and row[name] is not True for name, kind in _ROW_TYPES.items())
    named = isinstance(row.get("values_file"), str | None)
    drawn = row.get("drawn", 1)
    counted = isinstance(drawn, int) and drawn is not True and 0 < drawn < 2**63
    return typed and named and counted and all(0 < row[name] < 2**63 for name in _COUNTS)


def _parse_sample(line: bytes) -> dict[str, Any]:
    row = parse_json(line)
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not isinstance(row.get("framed"), bool):
        raise ValueError("not a sample")
    return row
