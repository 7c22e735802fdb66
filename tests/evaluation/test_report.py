"""Statistics and reports: numbers, completeness, self-containment, damaged input."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scmdm.evaluation.statistics import mean_interval, paired_difference

from scmdm.cli import main
from scmdm.data.tokenizers import SmilesTokenizer
from scmdm.domains import plotting
from scmdm.evaluation import report_figures
from scmdm.evaluation.report_figures import quality_figure
from scmdm.evaluation.study_report import study_report
from scmdm.study.study_plan import finished_row

ARMS = {
    "base": ("base", 0.0, 0.50),
    "vanilla": ("continued vanilla", 0.0, 0.52),
    "scmdm": ("rate 1 (SCMDM)", 1.0, 0.60),
}


def test_intervals_by_hand():
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2 and interval.half_width == pytest.approx(4.302653 * 1 / math.sqrt(3), rel=1e-5)
    assert interval.text(1) == "2.0 ± 2.5" and mean_interval([0.5]).text(1, 100) == "50.0"


def test_pairing_removes_what_is_common():
    noise = np.random.default_rng(0).normal(0, 5, 4)
    found = paired_difference([(n + 1 + e, n) for n, e in zip(noise, [0.1, -0.1, 0.05, -0.05], strict=True)])
    assert found.low > 0.7 and found.high < 1.3 and found.p_value < 0.01
    assert paired_difference([(1, 0)]) is None


def metrics_row(validity):
    valid = round(1024 * validity)
    ratios = {
        "validity": validity,
        "parsed": validity + 0.02,
        "uniqueness_of_samples": 0.9 * validity,
        "novelty_of_samples": 0.5 * validity,
        "novelty_of_unique": 0.6,
        "uniqueness_of_valid": 0.9,
    }
    return {
        "num_valid": valid,
        "num_samples": 1024,
        "property_distance": 0.3 - validity / 4,
        "fcd": 5 - validity,
        **ratios,
    }


@pytest.fixture
def study(tmp_path):
    evaluations, arms = [], []
    for name, (label, rate, level) in ARMS.items():
        (tmp_path / "samples").mkdir(exist_ok=True)
        for steps in (8, 32):
            for seed in range(3):
                samples = f"samples/{name}_T{steps}_s{seed}.jsonl"
                (tmp_path / samples).write_text(
                    "".join(json.dumps({"text": t, "framed": True}) + "\n" for t in ["CCO", "C1CC", "c1ccccc1"])
                )
                validity = level + 0.01 * math.log2(steps) + 0.005 * seed + 0.001 * len(name) * (seed - 1)
                common = {
                    "arm": name,
                    "adaptation_seed": 0,
                    "kind": "samples",
                    "sampling_seed": seed,
                    "samples_file": samples,
                }
                cost = {"steps": steps, "evaluations": steps, "num": 1024, "seconds": 1.0}
                evaluations.append({**common, **cost, "metrics": metrics_row(validity)})
        trained = name != "base"
        nelbo = {"null": {"mean": 0.5}, **({"conditioned": {"mean": 0.45}} if rate else {})}
        spent = {
            "step": 10,
            "tokens": 81920,
            "seconds": 4.0 + rate,
            "evaluations": 2560 * (1 + int(rate > 0)),
            "sequences": 2560,
        }
        arms.append({"name": name, "label": label, "rate": rate, "nelbo": [nelbo]})
        arms[-1] |= {"runs": [f"{name}-0"] if trained else [], "cost": [spent] if trained else []}
        if trained:
            (tmp_path / f"{name}-0").mkdir()
            rows = [{"kind": "train", "step": s, "loss": 1 / s, "tokens": s * 100} for s in range(1, 60)]
            rows += [{"kind": "validation", "step": 30, "nelbo_null": 0.5, "nelbo_conditioned": 0.4, "tokens": 3000}]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}-0" / "metrics.jsonl").write_text(text + '{"kind": "train", "st')
    SmilesTokenizer(["C", "O"]).save(tmp_path)
    content = {"title": "A <study>", "config": "key: value", "environment": {"python": "3"}}
    (tmp_path / "held_out_test.jsonl").write_text('{"text": "CCC", "framed": true}\n{"text": "CO", "framed": true}\n')
    content |= {"domain": "molecules", "tokenizer": "tokenizer.json", "held_out": "held_out_test.jsonl"}
    (tmp_path / "study.json").write_text(json.dumps({**content, "arms": arms, "evaluations": evaluations}))
    return tmp_path


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.scripts = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.scripts += tag == "script"
        if tag == "img":
            self.images.append(attributes["src"])
        self.links += [v for k, v in attributes.items() if k in ("href", "src") and not v.startswith("data:")]


def test_study_report_is_complete_and_self_contained(study, capsys):
    assert main(["report", str(study)]) == 0
    printed = capsys.readouterr().out
    text = (study / "report.html").read_text()
    page = Page(text)
    assert page.links == [] and page.scripts == 0 and "http" not in re.sub(r"data:[^\"]+", "", text)
    assert len(page.images) == 3 + len(ARMS)
    for image in page.images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    for label, *_ in ARMS.values():
        assert label in text and label in printed
    assert "A &lt;study&gt;" in text
    for name in ("quality", "losses", "molecules_distributions", *(f"molecules_{arm}" for arm in ARMS)):
        assert (study / f"{name}.png").stat().st_size > 5000


def test_conclusions_come_from_the_numbers(study):
    summary = study_report(study, study / "report.html")
    better = [line for line in summary.conclusions if "against continued vanilla" in line]
    assert len(better) == 2 and all("better" in line for line in better)
    content = json.loads((study / "study.json").read_text())
    for row in content["evaluations"]:
        if row["arm"] == "scmdm":
            row["metrics"]["validity"] -= 0.2
    (study / "study.json").write_text(json.dumps(content))
    assert all("worse" in line for line in study_report(study, study / "report.html").conclusions)
    row = next(row for row in summary.quality[1] if row[0] == "32" and row[1] == "rate 1 (SCMDM)")
    assert row[2] == "32" and row[3] == "3 x 1024" and row[4].startswith("65.5 ±")
    cost = {row[0]: row for row in summary.cost[1]}
    assert cost["base"][1] == "(given)" and cost["rate 1 (SCMDM)"][1:5] == ["81,920", "2", "0:05", "1.25"]


def test_moses_metrics_have_their_own_table_and_figure(study, capsys):
    """A row for each with an interval over seeds, beside the published row of real data."""
    content = json.loads((study / "study.json").read_text())
    for row in content["evaluations"]:
        level = row["sampling_seed"] / 100
        row["metrics"] |= {"moses_SNN/Test": 0.5 + level, "moses_FCD/Test": None, "moses_logP": 0.1 + level}
    (study / "study.json").write_text(json.dumps(content))
    assert main(["report", str(study)]) == 0
    printed, text = capsys.readouterr().out, (study / "report.html").read_text()
    assert (study / "moses.png").stat().st_size > 5000 and "MOSES (protocol: 30,000 samples" in text
    summary = study_report(study, study / "report.html")
    assert not any("MOSES" in title for title in summary.quality[0])
    ((title, (header, rows)),) = summary.benchmarks.items()
    assert title in printed.replace("\n", " ") and "0.5100 ± 0.0248" in printed and "<td>0.5100 ± 0.0248</td>" in text
    assert header == ["T", "metric", "real data", *(label for label, *_ in ARMS.values())]
    assert [row[:3] for row in rows] == [
        [steps, *row]
        for steps in ("8", "32")
        for row in (["MOSES SNN/Test", "0.6419"], ["MOSES logP, Wasserstein distance", "-"])
    ]


def test_axes_end_where_nothing_is_possible(tmp_path, monkeypatch):
    """Two seeds have intervals from -40 to 140 % here; a number below zero stays in sight."""
    seen = []
    monkeypatch.setattr(
        report_figures, "save_figure", lambda figure, path: seen.extend(ax.get_ylim() for ax in figure.axes)
    )
    wide = {"a": {8: mean_interval([0.4, 0.6]), 16: mean_interval([0.45, 0.5])}}
    below = {"a": {8: mean_interval([-0.4, 0.6]), 16: mean_interval([-3.0, -2.9])}}
    panels = [
        report_figures.Panel("valid", wide, "higher", 100, None, 1),
        report_figures.Panel("other", below, "lower"),
    ]
    quality_figure(panels, tmp_path / "figure.png")
    assert seen[0] == pytest.approx((-5.25, 105)) and seen[1][0] < -3 and seen[1][1] > 1
    plotting.plt.close("all")


def test_text_is_compared_by_perplexity_where_less_is_better(study):
    content = json.loads((study / "study.json").read_text())
    content["domain"] = "text"
    for row in content["evaluations"]:
        row["metrics"] = {"perplexity": 100 * (1 - row["metrics"]["validity"]), "entropy": 4.5, "distinct_2": 0.5}
    (study / "study.json").write_text(json.dumps(content))
    summary = study_report(study, study / "report.html")
    assert summary.quality[0][4:] == ["generative perplexity", "entropy, nats", "distinct bigrams"]
    better = [line for line in summary.conclusions if "against continued vanilla" in line]
    assert len(better) == 2 and all("better" in line and "difference -" in line for line in better)
    page = (study / "report.html").read_text()
    assert "Molecules" not in page and page.count("CCO\n\nC1CC\n\nc1ccccc1") == len(ARMS)


def test_several_adaptations_count_as_the_independent_ones(study):
    """Two adaptations of three samplings are two values, not six."""
    content = json.loads((study / "study.json").read_text())
    rows = content["evaluations"]
    for row in [r for r in rows if r["arm"] != "base"]:
        better = {**row["metrics"], "validity": row["metrics"]["validity"] + 0.02}
        rows.append({**row, "adaptation_seed": 1, "metrics": better})
    (study / "study.json").write_text(json.dumps(content))
    summary = study_report(study, study / "report.html")
    means = [
        np.mean(
            [
                r["metrics"]["validity"]
                for r in rows
                if r["arm"] == "scmdm" and r["steps"] == 8 and r["adaptation_seed"] == seed
            ]
        )
        for seed in (0, 1)
    ]
    row = next(row for row in summary.quality[1] if row[0] == "8" and row[1] == "rate 1 (SCMDM)")
    assert row[4] == mean_interval(means).text(1, 100)


def test_report_of_a_run(base, tmp_path, capsys):
    assert main(["report", str(base), "--out", str(tmp_path / "run.html")]) == 0
    text = (tmp_path / "run.html").read_text()
    assert "Step 6" in text and "global_batch_size" in text and len(Page(text).images) == 2
    assert main(["report", str(tmp_path)]) == 1
    assert "neither a run" in capsys.readouterr().err


def test_many_arms_have_a_row_each_and_are_compared_with_the_reference(study):
    content = json.loads((study / "study.json").read_text())
    source = next(arm for arm in content["arms"] if arm["name"] == "scmdm")
    for number in range(6):
        name = f"arm{number}"
        content["arms"].append({**source, "name": name, "label": f"arm {number}", "runs": [], "cost": []})
        content["arms"][-1] |= {"samples_of": "scmdm"} if number else {"from_scratch": True, "cost": source["cost"]}
        rows = [row for row in content["evaluations"] if row["arm"] == "scmdm"]
        content["evaluations"] += [{**row, "arm": name} for row in rows]
    content["reference"] = "vanilla"
    (study / "study.json").write_text(json.dumps(content))
    summary = study_report(study, study / "report.html")
    assert {line.split(": ")[1].split(" against ")[0] for line in summary.conclusions} == {"continued vanilla"}
    assert len(summary.conclusions) == 2 * (len(content["arms"]) - 1)
    text = (study / "report.html").read_text()
    assert "arm 0: trained from scratch" in text and "the dashed line is continued vanilla" in text
    assert (study / "arms.png").stat().st_size > 5000 and not (study / "losses.png").exists()
    assert next(row for row in summary.cost[1] if row[0] == "arm 1")[1] == "(samples of scmdm)"


def change_study(study, change):
    content = json.loads((study / "study.json").read_text())
    change(content)
    (study / "study.json").write_text(json.dumps(content))


PARTS = {
    "a row that is empty": (lambda c: c["evaluations"].append({}), "evaluations.18"),
    "a row without a number": (lambda c: c["evaluations"][3].pop("steps"), "evaluations.3"),
    "a row with no steps": (lambda c: c["evaluations"][3].update(steps=0), "evaluations.3"),
    "an unknown arm": (lambda c: c["evaluations"][3].update(arm="x"), "evaluations.3"),
}


@pytest.mark.parametrize("damage", PARTS)
def test_a_damaged_row_of_a_study_is_left_out_and_named(study, capsys, damage):
    change, named = PARTS[damage]
    change_study(study, change)
    (study / "samples" / "base_T8_s0.jsonl").write_bytes(b'null\n{"text": "CCO", "framed": true}\n\xff\n')
    assert main(["report", str(study)]) == 0
    assert named in (study / "report.html").read_text() and named in capsys.readouterr().out


WHOLES = {
    "null": lambda c: c.clear(),
    "another key": lambda c: c.update(more=1),
    "arms empty": lambda c: c.update(arms=[]),
    "no samples": lambda c: c.update(evaluations=[]),
    "a label": lambda c: c["arms"][0].update(label=3),
    "metrics as text": lambda c: [row["metrics"].update(validity="x") for row in c["evaluations"]],
    "a file above": lambda c: c.update(held_out="../x"),
    "a file elsewhere": lambda c: c.update(tokenizer="/etc/passwd"),
    "a run above": lambda c: c["arms"][1].update(runs=["../.."]),
    "an unknown domain": lambda c: c.update(domain="x"),
    "a missing file": lambda c: c.update(held_out="nothing"),
}


@pytest.mark.parametrize("damage", WHOLES)
def test_a_study_that_no_command_wrote_is_refused_in_one_line(study, capsys, damage):
    change_study(study, WHOLES[damage])
    assert main(["report", str(study)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("scmdm: error: ") and error.count("\n") == 1
    assert not (study / "report.html").exists()


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"\xff", b"[" * 100_000, b'{"title": 1e999}'])
def test_any_text_in_place_of_a_study(study, capsys, text):
    (study / "study.json").write_bytes(text)
    assert main(["report", str(study)]) == 1
    error = capsys.readouterr().err
    assert "study.json" in error and error.count("\n") == 1


def test_a_damaged_measurement_is_measured_again(tmp_path, caplog):
    row, path = {"kind": "nelbo", "num": 3, "nelbo": {"null": {"mean": 0.5}}}, tmp_path / "row.json"
    path.write_text(json.dumps(row))
    assert finished_row(path, {"num": 3}) == row and finished_row(path, {"num": 4}) is None
    for text in ("null", '{"num": 3', '{"num": 3}', '{"num": 3, "kind": "samples", "metrics": null}'):
        path.write_text(text)
        caplog.clear()
        assert finished_row(path, {"num": 3}) is None
        assert any(str(path) in record.getMessage() for record in caplog.records)
    assert finished_row(tmp_path / "none", {}) is None
