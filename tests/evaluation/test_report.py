"""Statistics and reports: numbers, completeness, self-containment, damaged input."""

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats

from scmdm.cli import main
from scmdm.data.tokenizers import SmilesTokenizer
from scmdm.domains import plotting
from scmdm.domains.molecules.domain import MoleculesDomain
from scmdm.domains.sample_values import SampleValues, write_values
from scmdm.evaluation import report_figures
from scmdm.evaluation.comparison import Quality, compare_arms, quality_by_arm
from scmdm.evaluation.report_figures import Panel, length_figure, quality_figure
from scmdm.evaluation.result_table import print_result
from scmdm.evaluation.significance import Estimate, Trainings, holm
from scmdm.evaluation.study_record import open_study
from scmdm.evaluation.study_report import print_summary, study_report
from scmdm.study.study_plan import has_settings, stored_row

ARMS = {
    "base": ("base", 0.0, 0.50),
    "vanilla": ("continued vanilla", 0.0, 0.52),
    "scmdm": ("rate 1 (SCMDM)", 1.0, 0.60),
}


VALIDITY = MoleculesDomain.metrics[0]


def valid(arm, steps, seed, gain=0.0):
    """Valid samples, on the noise that all arms share in part."""
    own, shared = np.random.default_rng([steps, seed, len(arm)]).random(1024), np.random.default_rng([steps, seed])
    noise = np.where(shared.random(1024) < 0.5, shared.random(1024), own)
    return noise < ARMS[arm][2] + 0.01 * math.log2(steps) + gain


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
    for name, (label, rate, _) in ARMS.items():
        (tmp_path / "samples").mkdir(exist_ok=True)
        for steps in (8, 32):
            for seed in range(3):
                samples = f"samples/{name}_T{steps}_s{seed}.jsonl"
                (tmp_path / samples).write_text(
                    "".join(json.dumps({"text": t, "framed": True}) + "\n" for t in ["CCO", "C1CC", "c1ccccc1"])
                )
                found = valid(name, steps, seed)
                write_values(tmp_path / samples.replace("jsonl", "npz"), {"validity": SampleValues.mean(found)})
                common = {
                    "arm": name,
                    "adaptation_seed": 0,
                    "kind": "samples",
                    "sampling_seed": seed,
                    "samples_file": samples,
                    "values_file": samples.replace("jsonl", "npz"),
                }
                cost = {"steps": steps, "evaluations": steps, "num": 1024, "seconds": 1.0}
                evaluations.append({**common, **cost, "metrics": metrics_row(float(found.mean()))})
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
    row = next(row for row in summary.quality[1] if row[0] == "32" and row[1] == "rate 1 (SCMDM)")
    shares = np.concatenate([valid("scmdm", 32, seed) for seed in range(3)])
    limits = stats.binomtest(int(shares.sum()), 3072).proportion_ci(method="wilson")
    assert row[2] == "32" and row[3] == "3 x 1024"
    assert row[4] == f"{100 * shares.mean():.1f} [{100 * limits.low:.1f}, {100 * limits.high:.1f}]"
    change_study(study, lambda c: c.update(reference="vanilla"))
    lines = study_report(study, study / "report.html").conclusions
    assert [("worse" in line) for line in lines] == ["SCMDM" in line for line in lines]
    cost = {row[0]: row for row in summary.cost[1]}
    assert cost["base"][1] == "(given)" and cost["rate 1 (SCMDM)"][1:5] == ["81,920", "2", "0:05", "1.25"]


def test_a_study_may_name_the_metric_that_it_compares(study):
    """Validity of rate 1 is the best, `parsed` of rate 1 the worst."""

    def parse(content):
        content["metric"] = "parsed"
        for row in content["evaluations"]:
            found, arm = valid(row["arm"], row["steps"], row["sampling_seed"]), row["arm"]
            parsed = found & (np.arange(1024) % 2 == 0) if arm == "scmdm" else found
            values = {"validity": SampleValues.mean(found), "parsed": SampleValues.mean(parsed)}
            write_values(study / row["values_file"], values)
            row["metrics"]["parsed"] = float(parsed.mean())

    change_study(study, parse)
    lines = study_report(study, study / "report.html").conclusions
    assert len(lines) == 4 and all("worse" in line for line in lines)


def test_the_table_has_the_evaluations_that_were_computed(study):
    content = json.loads((study / "study.json").read_text())
    for row in content["evaluations"]:
        if row["arm"] == "scmdm":
            row["computed_evaluations"] = row["steps"] - 0.25
    (study / "study.json").write_text(json.dumps(content))
    summary = study_report(study, study / "report.html")
    header, rows = summary.quality
    at = header.index("evaluations (computed)")
    found = {row[at] for row in rows if row[1] == ARMS["scmdm"][0]}
    assert found == {f"{row[0]} ({int(row[0]) - 0.25:.1f})" for row in rows}
    assert {row[at] for row in rows if row[1] == ARMS["vanilla"][0]} == {row[0] for row in rows}
    header, costs = summary.cost
    speed = {row[0]: row[header.index("sampling, ms per sample and computed evaluation")] for row in costs}
    for name, skipped in (("scmdm", 0.25), ("vanilla", 0)):
        assert speed[ARMS[name][0]] == f"{np.mean([1000 / 1024 / (steps - skipped) for steps in (8, 32)]):.3f}"


def test_the_report_counts_the_samples_that_were_drawn(study):
    """A data set may have fewer prompts than `num`."""
    change_study(study, lambda content: [row.update(drawn=512) for row in content["evaluations"]])
    summary = study_report(study, study / "report.html")
    header, rows = summary.quality
    assert {row[header.index("samples")] for row in rows} == {"3 x 512"} and "512 samples" in summary.protocol
    header, rows = summary.cost
    speed = header.index("sampling, ms per sample and computed evaluation")
    assert {row[speed] for row in rows} == {f"{np.mean([1000 / 512 / steps for steps in (8, 32)]):.3f}"}


def test_moses_metrics_have_their_own_table_and_figure(study, capsys):
    """A row for each, beside the published row of real data."""
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
    assert title in printed.replace("\n", " ") and "0.5100" in printed and "<td>0.5100</td>" in text
    assert header == ["T", "metric", "real data", *(label for label, *_ in ARMS.values())]
    assert [row[:3] for row in rows] == [
        [steps, *row]
        for steps in ("8", "32")
        for row in (["MOSES SNN/Test", "0.6419"], ["MOSES logP, Wasserstein distance", "-"])
    ]


def quality(value, low=math.nan, high=math.nan, *trainings):
    return Quality(Estimate(value, low, high), Trainings(trainings or (value,)))


def test_axes_end_where_nothing_is_possible(tmp_path, monkeypatch):
    """Few samples have intervals beyond 0 and 100 % here; a number below zero stays in sight."""
    seen = []
    monkeypatch.setattr(
        report_figures, "save_figure", lambda figure, path: seen.extend(ax.get_ylim() for ax in figure.axes)
    )
    wide = {"a": {8: quality(0.5, -0.4, 1.4), 16: quality(0.47, 0.2, 0.8, 0.45, 0.49)}}
    below = {"a": {8: quality(0.1, -1.0, 2.0), 16: quality(-3.0)}}
    panels = [
        Panel("valid", wide, "higher", 100, None, 1),
        Panel("other", below, "lower"),
    ]
    quality_figure(panels, tmp_path / "figure.png")
    assert seen[0] == pytest.approx((-5.25, 105)) and seen[1][0] < -3 and seen[1][1] > 1
    plotting.plt.close("all")


def test_an_arm_that_lacks_a_metric_keeps_its_colour(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report_figures, "save_figure", lambda figure, path: seen.append(figure))
    full = {name: {8: quality(0.5), 32: quality(0.6)} for name in "abc"}
    panels = [Panel("fcd", {name: full[name] for name in "ac"}, "lower"), Panel("valid", full, "higher")]
    quality_figure(panels, tmp_path / "figure.png")
    (figure,) = seen
    colours = [{c.get_label(): c.lines[0].get_color() for c in ax.containers} for ax in figure.axes]
    assert colours[0] == {name: colours[1][name] for name in "ac"} and len(set(colours[1].values())) == 3
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["a", "b", "c"]
    plotting.plt.close("all")


def test_a_study_without_the_metric_that_it_compares_is_reported(study, capsys):
    """As of pictures without labels: no metric of the figures was computed."""

    def forget(content):
        for row in content["evaluations"]:
            row["metrics"] = {"entropy": 1.0}

    change_study(study, forget)
    assert main(["report", str(study)]) == 0
    assert "metric=validity" in capsys.readouterr().out


@pytest.mark.parametrize("arms", [2, 14])
def test_the_legend_has_all_arms_and_fits_below_the_axes(tmp_path, monkeypatch, arms):
    seen = []
    monkeypatch.setattr(report_figures, "save_figure", lambda figure, path: seen.append(figure))
    values = {f"arm with a long name {number}": {8: quality(0.5), 32: quality(0.6)} for number in range(arms)}
    quality_figure([Panel(title, values, "higher") for title in ("a", "b")], tmp_path / "figure.png")
    (figure,) = seen
    (legend,) = figure.legends
    extent, whole = legend.get_window_extent(), figure.bbox
    assert len(legend.get_texts()) == arms and extent.x0 >= whole.x0 and extent.x1 <= whole.x1
    assert all(extent.y1 <= ax.get_tightbbox().y0 + 1 for ax in figure.axes)
    styles = {
        (line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines() if line.get_marker() != "|"
    }
    assert len({style for style in styles if style[1] != "None"}) == arms
    plotting.plt.close("all")


def test_text_is_compared_by_perplexity_where_less_is_better(study):
    def as_text(content):
        content["domain"] = "text"
        for row in content["evaluations"]:
            own = valid(row["arm"], row["steps"], row["sampling_seed"])
            values = SampleValues.ratio(5.0 - own, np.ones(1024), exponential=True)
            write_values(study / row["values_file"], {"perplexity": values})
            row["metrics"] = {"perplexity": values.value(), "entropy": 4.5, "distinct_2": 0.5}

    change_study(study, as_text)
    summary = study_report(study, study / "report.html")
    assert summary.quality[0][4:] == ["generative perplexity", "entropy, nats", "distinct bigrams"]
    better = [line for line in summary.conclusions if "against continued vanilla" in line]
    assert len(better) == 2 and all(": lower:" in line and "difference -" in line for line in better)
    assert all("better" not in line and "entropy, nats: 4.500 against 4.500" in line for line in better)
    page = (study / "report.html").read_text()
    assert "Molecules" not in page and page.count("CCO\n\nC1CC\n\nc1ccccc1") == len(ARMS)


def test_a_metric_without_a_preferred_direction_has_no_better_model_and_no_arrow(study, monkeypatch):
    def by_entropy(content):
        content.update(domain="text", metric="entropy")
        for row in content["evaluations"]:
            own = valid(row["arm"], row["steps"], row["sampling_seed"])
            values = SampleValues.mean(4.0 + own)
            write_values(study / row["values_file"], {"entropy": values})
            row["metrics"] = {"entropy": values.value(), "perplexity": 9.0, "distinct_2": 0.5}

    titles = []
    save = report_figures.save_figure

    def note(figure, path):
        titles.extend(ax.get_title() for ax in figure.axes if path.name == "quality.png")
        return save(figure, path)

    monkeypatch.setattr(report_figures, "save_figure", note)
    change_study(study, by_entropy)
    lines = [line for line in study_report(study, study / "report.html").conclusions if "against base" in line]
    assert lines and all("higher:" in line and "better" not in line and "worse" not in line for line in lines)
    assert titles == ["generative perplexity (↓)", "entropy, nats", "distinct bigrams (↑)"]


def test_quality_is_drawn_against_tokens_where_adaptations_differ_in_length(study, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "scmdm.evaluation.study_report.length_figure", lambda panel, lines, path: drawn.append(lines) or path
    )
    monkeypatch.setattr("scmdm.evaluation.study_report.picture", lambda path, caption: caption)

    def train_longer(content, name, times):
        source = next(arm for arm in content["arms"] if arm["name"] == "scmdm")
        cost = [{**spent, "tokens": times * spent["tokens"]} for spent in source["cost"]]
        content["arms"].append({**source, "name": name, "label": name, "cost": cost})
        rows = [row for row in content["evaluations"] if row["arm"] == "scmdm"]
        content["evaluations"] += [{**row, "arm": name} for row in rows]

    study_report(study, study / "report.html")
    assert not drawn
    change_study(study, lambda content: train_longer(content, "longer", 3))
    study_report(study, study / "report.html")
    tokens = json.loads((study / "study.json").read_text())["arms"][2]["cost"][0]["tokens"]
    assert drawn == [
        {
            "rate 0": {0: "base", tokens: ARMS["vanilla"][0]},
            "rate 1": {0: "base", tokens: ARMS["scmdm"][0], 3 * tokens: "longer"},
        }
    ]
    change_study(study, lambda content: train_longer(content, "another", 1))  # differs in something else
    study_report(study, study / "report.html")
    assert len(drawn) == 1


def test_a_figure_of_lengths_has_a_point_for_each_arm_that_was_sampled(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("scmdm.evaluation.report_figures.save_figure", lambda figure, path: figures.append(figure))
    values = {arm: {8: quality(0.4), 32: quality(0.6)} for arm in ("base", "short", "long")}
    del values["long"][8]
    lines = {"rate 1": {3_000_000: "long", 0: "base", 1_000_000: "short"}}
    length_figure(Panel("valid", values, "higher", 100), lines, tmp_path / "length.png")
    points = [ax.containers[0].lines[0].get_xydata().tolist() for ax in figures[0].axes]
    assert points == [[[0, 40], [1, 40]], [[0, 60], [1, 60], [3, 60]]]


def test_ways_to_sample_a_text_model_are_joined_to_a_frontier(study, monkeypatch):
    marks = []
    monkeypatch.setattr(Axes, "annotate", lambda _, text, *args, **options: marks.append(text))

    def as_text(content):
        content["domain"] = "text"
        for row in content["evaluations"]:
            row["metrics"] = {"perplexity": 12.0 + len(row["arm"]), "entropy": 4.5, "distinct_2": 0.5}
            del row["values_file"]

    change_study(study, as_text)
    study_report(study, study / "report.html")
    assert not (study / "frontier.png").exists()
    way = {"samples_of": "base", "sampler": ["temperature=0.8"], "runs": [], "cost": [], "nelbo": []}
    change_study(study, lambda content: content["arms"][1].update(way))
    study_report(study, study / "report.html")
    assert set(marks) == {"", "0.8"}
    assert (study / "frontier.png").stat().st_size > 0
    assert (study / "report.html").read_text().count("entropy, nats") > 1


def test_a_text_study_of_several_ways_to_sample_compares_models_at_equal_entropy(study, capsys):
    """Rate 1 is sampled as `vanilla` says, too: the base's entropy lies between the two."""

    def as_text(content):
        content["domain"] = "text"
        content["arms"][1].update(samples_of="scmdm", runs=[], cost=[], nelbo=[])
        for row in content["evaluations"]:
            own = valid(row["arm"], row["steps"], row["sampling_seed"])
            nll, entropy = 5.0 - own, 4.0 + 0.1 * own + {"vanilla": -0.1, "base": 0.0, "scmdm": 0.1}[row["arm"]]
            values = {"perplexity": SampleValues.ratio(nll, np.ones(1024), exponential=True)}
            values["entropy"] = SampleValues.mean(entropy)
            write_values(study / row["values_file"], values)
            row["metrics"] = {name: found.value() for name, found in values.items()}

    change_study(study, as_text)
    summary = study_report(study, study / "report.html")
    assert len(summary.conclusions) == 2 and all("against base" in line for line in summary.conclusions)
    _, rows = summary.equal_diversity
    assert [(row[0], row[2]) for row in rows] == [
        (t, label) for t in ("8", "32") for label in ("base", "rate 1 (SCMDM)")
    ]
    assert all(row[6].startswith("-") and "[" in row[6] for row in rows[::2]) and rows[1][6:] == ["-", "-", "-"]
    assert f"<td>{rows[0][6]}</td>" in (study / "report.html").read_text()
    print_summary(summary)
    assert "At equal diversity" in capsys.readouterr().out


def test_comparisons_of_one_training_are_mcnemars(study):
    """All sampling seeds count as samples; p values are adjusted over all comparisons."""
    opened = open_study(study)
    found, _ = compare_arms(opened.samples, opened.arms, opened.arms[2], VALIDITY)
    assert [(one.steps, one.theirs) for one in found] == [(t, ARMS[a][0]) for a in ("base", "vanilla") for t in (8, 32)]
    for one, name in zip(found, ("base", "base", "vanilla", "vanilla"), strict=True):
        ours, theirs = (np.concatenate([valid(arm, one.steps, seed) for seed in range(3)]) for arm in ("scmdm", name))
        gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        assert one.compared.p_value == stats.binomtest(gained, gained + lost).pvalue
        assert one.compared.difference == pytest.approx(ours.mean() - theirs.mean())
        assert one.differences.values == pytest.approx((ours.mean() - theirs.mean(),))
    summary = study_report(study, study / "report.html")
    for line, adjusted in zip(summary.conclusions, holm([one.compared.p_value for one in found]), strict=True):
        assert f"{adjusted:.2g}" in line


def test_several_trainings_are_averaged_over_the_same_noise(study):
    """3 x 1,024 samples of two trainings are 3,072 values, not 6,144; each training is shown."""

    def train_again(content):
        for row in [row for row in content["evaluations"] if row["arm"] != "base"]:
            name = row["values_file"].replace("_s", "_again_s")
            own = valid(row["arm"], row["steps"], row["sampling_seed"], gain=0.03)
            write_values(study / name, {"validity": SampleValues.mean(own)})
            metrics = {**row["metrics"], "validity": own.mean()}
            content["evaluations"].append({**row, "adaptation_seed": 1, "metrics": metrics, "values_file": name})

    change_study(study, train_again)
    opened = open_study(study)
    found, _ = compare_arms(opened.samples, opened.arms, opened.arms[2], VALIDITY)
    for one, name in zip(found, ("base", "base", "vanilla", "vanilla"), strict=True):
        gains = (0.0, 0.03)
        first = np.array([[valid("scmdm", one.steps, seed, gain=gain) for seed in range(3)] for gain in gains])
        other = (0.0, 0.0) if name == "base" else gains
        second = np.array([[valid(name, one.steps, seed, gain=gain) for seed in range(3)] for gain in other])
        gaps = (first.astype(float) - second).mean(0)  # over trainings
        t = gaps.mean() / (np.sqrt(gaps.var(1, ddof=1).sum() / 1024) / 3)
        assert one.compared.p_value == pytest.approx(2 * stats.t.sf(abs(t), 3 * 1023))
        each = (first.astype(float) - second).mean((1, 2))
        assert one.differences.values == pytest.approx(tuple(each)) and one.differences.agree == (min(each) > 0)
    summary = study_report(study, study / "report.html")
    means = [100 * np.mean([valid("scmdm", 8, seed, gain=gain) for seed in range(3)]) for gain in (0, 0.03)]
    row = next(row for row in summary.quality[1] if row[0] == "8" and row[1] == "rate 1 (SCMDM)")
    assert row[4].startswith(f"{np.mean(means):.1f} [")
    each, spread = ", ".join(f"{mean:.1f}" for mean in means), f"{means[1] - means[0]:.1f}"
    assert ["8", "rate 1 (SCMDM)", each, spread] in summary.trainings[1]
    assert {row[1] for row in summary.trainings[1]} == {"continued vanilla", "rate 1 (SCMDM)"}
    for value in found[0].differences.values:
        assert f"{100 * value:+.1f}" in summary.conclusions[0]


def test_a_reference_of_one_training_is_compared_with_every_training_of_an_arm(study):
    """As an arm that samples the base, whose seed of training is 0."""

    def train_twice(content):
        for row in [row for row in content["evaluations"] if row["arm"] == "scmdm"]:
            name = row["values_file"].replace("_s", "_again_s")
            own = valid("scmdm", row["steps"], row["sampling_seed"], gain=0.03)
            write_values(study / name, {"validity": SampleValues.mean(own)})
            metrics = {**row["metrics"], "validity": own.mean()}
            content["evaluations"].append({**row, "adaptation_seed": 2, "metrics": metrics, "values_file": name})
            row["adaptation_seed"] = 1

    change_study(study, train_twice)
    opened = open_study(study)
    base, _, scmdm = opened.arms
    found = [compare_arms(opened.samples, [base, scmdm], arm, VALIDITY)[0] for arm in (base, scmdm)]
    assert [len(comparisons) for comparisons in found] == [2, 2]
    for ours, theirs in zip(*found, strict=True):
        assert len(ours.differences.values) == 2
        assert ours.differences.values == pytest.approx([-value for value in theirs.differences.values])
        assert ours.compared.p_value == pytest.approx(theirs.compared.p_value)
        assert ours.compared.low == pytest.approx(-theirs.compared.high)
        assert ours.means == pytest.approx(theirs.means[::-1])


def test_trainings_on_other_noise_are_not_paired(study):
    """Only sampling seeds that all have are compared; a mean over unequal seeds has no interval."""

    def lose(content):
        rows = content["evaluations"]
        rows += [{**row, "adaptation_seed": 1} for row in rows if row["arm"] == "scmdm" and row["sampling_seed"] > 0]

    change_study(study, lose)
    opened = open_study(study)
    one = compare_arms(opened.samples, opened.arms, opened.arms[2], VALIDITY)[0][0]
    ours, theirs = (np.concatenate([valid(arm, 8, seed) for seed in (1, 2)]) for arm in ("scmdm", "base"))
    assert one.compared.difference == pytest.approx(ours.mean() - theirs.mean())
    row = next(row for row in study_report(study, study / "r.html").quality[1] if row[:2] == ["8", "rate 1 (SCMDM)"])
    assert "[" not in row[4]


def _train_three_times(content):
    for row in [row for row in content["evaluations"] if row["arm"] != "base"]:
        content["evaluations"] += [{**row, "adaptation_seed": seed} for seed in (1, 2)]


def test_a_training_without_a_value_is_named_and_compared_with_none(study):
    """Rate 1 has three trainings, continued vanilla a value of the last one alone."""

    def lose(content):
        _train_three_times(content)
        for row in content["evaluations"]:
            if row["arm"] == "vanilla" and row["adaptation_seed"] < 2:
                row["metrics"] = {**row["metrics"], "validity": None}

    change_study(study, lose)
    opened = open_study(study)
    found, impossible = compare_arms(opened.samples, opened.arms, opened.arms[2], VALIDITY)
    assert impossible == [] and {one.theirs: (len(one.differences.values), one.left_out) for one in found} == {
        "base": (3, ()),
        "continued vanilla": (1, (0, 1)),
    }
    summary = study_report(study, study / "report.html")
    assert sum("3 of 9" in problem and "continued vanilla" in problem for problem in summary.problems) == 2
    assert all("seed(s) 0, 1" in line for line in summary.conclusions if "vanilla" in line)


@pytest.mark.parametrize("damage", ["value", "number of samples", "training"])
def test_a_comparison_that_is_not_possible_is_named(study, damage):
    def lose(content):
        for row in content["evaluations"]:
            if row["arm"] == "vanilla" and row["steps"] == 32:
                if damage == "value":
                    row["metrics"] = {**row["metrics"], "validity": None}
                row["drawn"] = 512 if damage == "number of samples" else 1024
                row["adaptation_seed"] = int(damage == "training")

    change_study(study, lose)
    summary = study_report(study, study / "report.html")
    assert len(summary.conclusions) == 3 and "There are 3 comparisons" in summary.protocol
    named = [line for line in summary.problems if "T = 32" in line and "not compared with continued vanilla" in line]
    assert len(named) == 1


def test_an_arm_with_its_own_number_of_evaluations_is_named(study):
    named = "but continued vanilla with"
    assert named not in study_report(study, study / "report.html").protocol
    change_study(study, lambda c: [row.update(evaluations=24) for row in c["evaluations"] if row["arm"] == "vanilla"])
    assert named in study_report(study, study / "report.html").protocol


def test_evaluations_that_the_report_leaves_out_are_counted(study):
    assert "further" not in study_report(study, study / "report.html").protocol
    (study / "evaluations").mkdir()
    for number in range(18 + 5):
        (study / "evaluations" / f"other-{number}_T8_s0.json").write_text("{}")
    assert "5 further" in study_report(study, study / "report.html").protocol


@pytest.mark.parametrize(("counts", "judged"), [((900, 895), True), ((900, 450), False)])
def test_a_distance_of_fewer_samples_is_not_called_worse(study, counts, judged):
    def as_distance(content):
        content["metric"] = "property_distance"
        for row in content["evaluations"]:
            better = row["arm"] == "scmdm"
            groups = np.random.default_rng(row["sampling_seed"]).normal(0.1 if better else 0.2, 1e-4, 200)
            write_values(study / row["values_file"], {"property_distance": SampleValues("jackknife", groups)})
            row["metrics"] |= {"property_distance": groups.mean(), "num_valid": counts[0] if better else counts[1]}

    change_study(study, as_distance)
    lines = study_report(study, study / "report.html").conclusions
    assert len(lines) == 4 and all(("better" in line) == judged and ("450" in line) != judged for line in lines)


def test_trainings_of_a_constant_share_are_compared(study):
    """All of rate 1 and none of continued vanilla, in three trainings: McNemar's test of the first one."""

    def saturate(content):
        _train_three_times(content)
        for row in content["evaluations"]:
            if row["arm"] != "base":
                all_or_none = np.full(1024, row["arm"] == "scmdm")
                write_values(study / row["values_file"], {"validity": SampleValues.mean(all_or_none)})
                row["metrics"] = {**row["metrics"], "validity": float(all_or_none.mean())}

    change_study(study, saturate)
    opened = open_study(study)
    found, _ = compare_arms(opened.samples, opened.arms, opened.arms[2], VALIDITY)
    other = next(one for one in found if one.theirs == "continued vanilla")
    assert other.compared.difference == 1.0 and other.compared.p_value < 1e-100 and len(other.differences.values) == 3


def test_the_error_of_a_likelihood_is_in_the_table(study):
    change_study(study, lambda content: content["arms"][0].update(nelbo=[{"null": {"mean": 0.5, "stderr": 0.0123}}]))
    header, rows = study_report(study, study / "report.html").cost
    assert [row[header.index("NELBO null")] for row in rows[:2]] == ["0.5000 ± 0.0123", "0.5000"]


def test_evaluations_of_earlier_versions_have_no_intervals(study, capsys):
    change_study(study, lambda c: [row.pop("values_file") for row in c["evaluations"]])
    summary = study_report(study, study / "report.html")
    print_summary(summary)
    assert "18 of 18" in capsys.readouterr().out and "18 of 18" in (study / "report.html").read_text()
    assert not any("[" in cell for row in summary.quality[1] for cell in row)
    assert len(summary.conclusions) == 4 and not any("p = " in line for line in summary.conclusions)


def test_conclusions_come_first(study, capsys):
    summary = study_report(study, study / "report.html")
    print_summary(summary)
    assert capsys.readouterr().out.startswith(f"- {summary.conclusions[0][:60]}")
    assert set(summary.figure_metrics[0]) < set(summary.quality[0])


@pytest.mark.parametrize("damage", ["missing", "text", "pickle", "shape", "kind"])
def test_damaged_values_are_named(study, damage):
    path = study / "samples" / "base_T8_s0.npz"
    arrays = {
        "pickle": {"mean/validity": np.array([{}])},
        "shape": {"mean/validity": np.zeros((2, 3))},
        "kind": {"median/validity": np.zeros(3)},
    }
    path.unlink()
    if damage == "text":
        path.write_text("validity")
    elif damage != "missing":
        np.savez(path, **arrays[damage])
    opened = open_study(study)
    assert [path.name in problem for problem in opened.problems] == [True]
    found = quality_by_arm(opened.samples, {"base": "base"}, "validity")["base"]
    assert math.isnan(found[8].estimate.low) and found[32].estimate.low < found[32].estimate.value


def test_report_of_a_run(base, tmp_path, capsys):
    assert main(["report", str(base), "--out", str(tmp_path / "run.html")]) == 0
    text = (tmp_path / "run.html").read_text()
    assert "Step 6" in text and "global_batch_size" in text and len(Page(text).images) == 2
    assert main(["report", str(tmp_path)]) == 1
    assert main(["report", str(tmp_path / "missing")]) == 1 and not (tmp_path / "missing").exists()
    assert "neither a run" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["$5 or $6", "a $\\frac$ b"])
def test_labels_are_no_formulas(study, monkeypatch, label):
    """matplotlib would set the text between two dollars as a formula, or raise an error."""
    texts = []
    save = report_figures.save_figure

    def note(figure, path):
        texts.extend(text for ax in (*figure.axes, figure) for text in ax.findobj(plotting.plt.Text))
        return save(figure, path)

    monkeypatch.setattr(report_figures, "save_figure", note)
    change_study(study, lambda content: content["arms"][1].update(label=label))
    assert any(label in line for line in study_report(study, study / "report.html").conclusions)
    own = [text for text in texts if label in text.get_text()]
    assert own and not any(text.get_parse_math() for text in own)


def test_the_legend_of_a_run_has_its_name_whatever_it_begins_with(base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report_figures, "save_figure", lambda figure, path: seen.append(figure) or path)
    monkeypatch.setattr("scmdm.evaluation.run_report.picture", lambda path, caption: caption)
    shutil.copytree(base, tmp_path / "_copy", ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["report", str(tmp_path / "_copy")]) == 0
    assert "_copy" in seen[0].axes[0].get_legend_handles_labels()[1][0]
    plotting.plt.close("all")


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
    "a number drawn as text": (lambda c: c["evaluations"][3].update(drawn="x"), "evaluations.3"),
    "values that are no name": (lambda c: c["evaluations"][3].update(values_file=3), "evaluations.3"),
    "an unknown arm": (lambda c: c["evaluations"][3].update(arm="x"), "evaluations.3"),
    "a missing file": (lambda c: c.update(held_out="nothing"), "nothing"),
    "missing samples": (lambda c: c["evaluations"][3].update(samples_file="nowhere.jsonl"), "nowhere.jsonl"),
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
    "a label twice": lambda c: c["arms"][1].update(label=c["arms"][2]["label"]),
    "a label of the base": lambda c: c["arms"][1].update(label=" base"),
    "a label of the held-out data": lambda c: c["arms"][1].update(label="held out"),
    "a label that legends leave out": lambda c: c["arms"][1].update(label="_a"),
    "a name of another figure": lambda c: c["arms"].append({**c["arms"][1], "name": "distributions", "label": "x"}),
    "a name too long for its files": lambda c: c["arms"].append({**c["arms"][1], "name": "x" * 240, "label": "x"}),
    "a blank label": lambda c: c["arms"][1].update(label=" "),
    "a name twice": lambda c: c["arms"].append({**c["arms"][1], "label": "another"}),
    "a name elsewhere": lambda c: c["arms"].append({**c["arms"][1], "name": "x/../../x", "label": "another"}),
    "a reference that is no arm": lambda c: c.update(reference="partial"),
    "metrics as text": lambda c: [row["metrics"].update(validity="x") for row in c["evaluations"]],
    "a file above": lambda c: c.update(held_out="../x"),
    "values above": lambda c: c["evaluations"][0].update(values_file="../x.npz"),
    "a file elsewhere": lambda c: c.update(tokenizer="/etc/passwd"),
    "a run above": lambda c: c["arms"][1].update(runs=["../.."]),
    "an unknown metric": lambda c: c.update(metric="x"),
    "an unknown domain": lambda c: c.update(domain="x"),
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


def finished_row(path, settings):
    row = stored_row(path)
    return row if row is not None and has_settings(row, settings) else None


def test_a_damaged_measurement_is_measured_again(tmp_path, caplog):
    row, path = {"kind": "nelbo", "num": 3, "nelbo": {"null": {"mean": 0.5}}}, tmp_path / "row.json"
    path.write_text(json.dumps(row))
    earlier = {"weights_dtype": "float32", "compile": "none"}  # as rows of earlier versions were
    assert finished_row(path, {"num": 3}) == row | earlier
    assert finished_row(path, {"num": 4}) is None
    assert finished_row(path, {"num": 3, "weights_dtype": "bfloat16"}) is None
    assert finished_row(path, {"num": 3, "compile": "block"}) is None
    for text in ("null", '{"num": 3', '{"num": 3}', '{"num": 3, "kind": "samples", "metrics": null}'):
        path.write_text(text)
        caplog.clear()
        assert finished_row(path, {"num": 3}) is None
        assert any(str(path) in record.getMessage() for record in caplog.records)
    assert finished_row(tmp_path / "none", {}) is None


def test_a_metric_that_was_requested_and_not_computed_is_named(capsys):
    metrics = {"validity": 0.4, "fcd": None, "fcd_note": "225 valid molecules, fewer than 512"}
    row = {"num": 8, "evaluations": 4, "computed_evaluations": 4.0, "metrics": metrics}
    result = {"model": "runs/x", "step": 3, "config": {}, "samples": [row]}
    print_result(result, MoleculesDomain.metrics)
    assert "not computed: 225" in capsys.readouterr().out
    metrics["fcd_note"] = None  # it was not requested
    print_result(result, MoleculesDomain.metrics)
    assert "FCD" not in capsys.readouterr().out
