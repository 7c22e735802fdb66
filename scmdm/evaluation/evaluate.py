"""`scmdm evaluate`: NELBO, zero-shot perplexity and sample quality of one model."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scmdm.checkpoint.seal import sha256_of_model
from scmdm.config.common import resolve_weights_dtype
from scmdm.config.evaluation import EvaluateConfig, ZeroShotConfig
from scmdm.config.fields import require
from scmdm.config.stored import read_stored_config
from scmdm.config.training import TrainConfig
from scmdm.data.dataset_files import check_dataset
from scmdm.data.loader import read_columns
from scmdm.data.manifest import Manifest
from scmdm.data.shard_index import COLUMN
from scmdm.diffusion.likelihood import Nelbo
from scmdm.domains.domain_registry import domain_of, load_domain, metrics_config
from scmdm.domains.interface import Domain, EvaluationSettings, GeneratedSamples, ScoringDomain
from scmdm.domains.sample_values import SampleValues
from scmdm.errors import UserError
from scmdm.evaluation.divided_nelbo import NelboSettings, divided_nelbo
from scmdm.evaluation.result_table import print_result
from scmdm.evaluation.significance import estimate
from scmdm.evaluation.zero_shot import read_texts, zero_shot
from scmdm.models.model_files import LoadedModel
from scmdm.runtime.divided_work import Result, ResultParts, compute_divided
from scmdm.sampling.generation import SampleSet, generate_divided
from scmdm.sampling.model_loading import evaluation_ranks, load_as_configured, parts_beside
from scmdm.system.files import atomic_write_text, json_text, require_output_file
from scmdm.system.process_group import broadcast, joined_world
from scmdm.system.run_directory import CONFIG_FILE, EVALUATIONS, run_of
from scmdm.system.terminal import Terminal
from scmdm.training.padding import used_lengths
from scmdm.training.validation import ValidationSet

_NO_RESULT = ("out", "threads", "batch_size", "shards", "verify")  # keys that do not change results
_SOURCE_KEYS = {"text_key": "key", "path": "path", "unit": "unit", "detokenize": "detokenize"}  # of the source `text`
_SCORED_AT_ONCE = 256  # samples; a killed evaluation scores at most these again, on each rank


def evaluate_and_print(path: Path, config: EvaluateConfig) -> None:
    """Evaluate the model at `path`, print the results and write them as JSON."""
    with evaluation_ranks(config):
        run_evaluation(path, config)


def run_evaluation(path: Path, config: EvaluateConfig) -> dict[str, Any] | None:
    """Evaluate the model at `path`, divided over the ranks; rank 0 prints, writes and returns the results.

    Returns None on the other ranks. Raises UserError before anything is computed if the data set does not belong to the
    model, if a key of `metrics` does not belong to its domain, or if the output file cannot be written.
    """
    loaded = load_as_configured(path, config)
    root = _data_root(loaded, config)
    manifest = _check_data(loaded, root)
    name = domain_of(manifest) if config.domain == "auto" else config.domain
    keys = metrics_config(name, config.metrics)
    config = replace(config, metrics=asdict(keys))  # with their types; on the command line numbers are text
    out = Path(config.out) if config.out else _default_out(Path(path), loaded, config)
    require_output_file(out, ".json")
    is_main, kind = joined_world()[0] == 0, load_domain(name)
    settings = EvaluationSettings(config.split, str(next(loaded.model.parameters()).device), exclusive=True)
    domain = kind(root, manifest, keys, settings) if is_main or issubclass(kind, ScoringDomain) else None
    parts = parts_beside(out, loaded, config)
    result: dict[str, Any] = {
        "model": str(path),
        "step": loaded.spec.step,
        "domain": kind.name,
        "config": asdict(config),
    }
    # Whatever is wrong with a key is reported before the likelihood, which takes long, is computed.
    _require_conditioner(loaded, config)
    texts = {name: _texts(name, source) for name, source in config.zero_shot_texts().items()}
    sets = _sample_sets(loaded, kind, root, manifest, config) if config.num else []
    if config.nelbo_samples:
        found = model_nelbo(loaded, root, config, parts)
        result["nelbo"] = {mode: {**asdict(nelbo), "perplexity": nelbo.perplexity} for mode, nelbo in found.items()}
    if config.texts:
        result["zero_shot"] = _zero_shot_perplexity(loaded, texts, config, parts)
    if config.num:
        result["samples"], result["intervals"] = _sample_quality(sets, domain, config, parts)
    if not is_main:
        return None
    atomic_write_text(out, json_text(result, indent=2))
    parts.remove()
    print_result(result, kind.metrics)
    Terminal().print(f"wrote {out}", soft_wrap=True)
    return result


def model_nelbo(
    loaded: LoadedModel, root: Path, config: EvaluateConfig, parts: ResultParts | None = None
) -> dict[str, Nelbo]:
    """Estimate the NELBO on a split of the data set at `root`, divided over the ranks.

    Returns, on rank 0, the NELBO without self-conditioning ("null") and, for a self-conditioned model, with it
    ("conditioned"), both on the same noise.
    """
    manifest = Manifest.read(root)
    if not config.nelbo_padding:
        manifest = _without_padding(manifest, root)
    padding = _padding(loaded, config)
    held_out = ValidationSet.at(root, config.split, manifest, config.nelbo_samples, padding=padding)
    lengths = None if padding is None else padding.pad_multiple
    kept = None if parts is None else parts.of(data=manifest.fingerprint(), split=config.split, lengths=lengths)
    found = {
        mode: divided_nelbo(loaded, held_out, _nelbo_settings(config), condition=condition, parts=kept)
        for mode, condition in _modes(loaded).items()
    }
    return {mode: nelbo for mode, nelbo in found.items() if nelbo is not None}


def _require_conditioner(loaded: LoadedModel, config: EvaluateConfig) -> None:
    if not loaded.spec.model.self_conditioned:
        reason = f"1 with {loaded.path}, which is not self-conditioned"
        require(config.nelbo_passes == 1, "nelbo_passes", config.nelbo_passes, reason)


def _nelbo_settings(config: EvaluateConfig) -> NelboSettings:
    precision = resolve_weights_dtype(config.weights_dtype, config.precision)
    return NelboSettings(
        config.nelbo_draws,
        config.nelbo_passes,
        t_min=config.t_min,
        precision=precision,
        batch_size=config.batch_size,
    )


def _padding(loaded: LoadedModel, config: EvaluateConfig) -> TrainConfig | None:
    """Return the rule for the lengths of padded sequences; None: that of the data."""
    run = read_stored_config(loaded.path) if (loaded.path / CONFIG_FILE).is_file() else None
    trained = run.get("train.padding", str) if run is not None else None
    if (config.padding or ("length" if trained in (None, "length") else "sample")) == "length":
        require(config.pad_multiple is None, "pad_multiple", config.pad_multiple, "left out without padding=sample")
        return None
    multiple = config.pad_multiple or (run.get("train.pad_multiple", int) if run is not None else None)
    return TrainConfig(padding="sample", pad_multiple=multiple or TrainConfig.pad_multiple)


def _texts(name: str, source: ZeroShotConfig) -> list[str]:
    """Read a corpus of the key `texts`. Raises UserError, which names the keys of the corpus, not those of a source."""
    try:
        return read_texts(Path(source.path), key=source.key, unit=source.unit, detokenize=source.detokenize)
    except UserError as error:
        message = str(error)
        for own, key in _SOURCE_KEYS.items():
            message = message.replace(f"source.{own}", f"texts.{name}.{key}")
        raise UserError(message) from error


def sample_templates(
    loaded: LoadedModel, kind: type[Domain], root: Path, manifest: Manifest, config: EvaluateConfig
) -> tuple[Tensor | None, Tensor | None]:
    """Return the templates (N, L) of a domain's samples, and the length (N,) of each; None: all of it."""
    templates_NL = kind.templates(root, manifest, config.split, config.num)
    lengths_N = _sample_lengths(loaded, root, manifest, templates_NL, config)
    if lengths_N is not None and templates_NL is not None:
        beyond_NL = torch.arange(templates_NL.shape[1]) >= lengths_N[:, None]
        templates_NL = templates_NL.masked_fill(beyond_NL, manifest.padding_id)
    return templates_NL, lengths_N


def _sample_lengths(
    loaded: LoadedModel, root: Path, manifest: Manifest, templates_NL: Tensor | None, config: EvaluateConfig
) -> Tensor | None:
    """Return the length (N,) of each template with what is drawn after its prompt; None: all of it."""
    padding, count = _padding(loaded, config), config.gen_length
    if templates_NL is None or not manifest.has_prompts:
        require(count is None, "gen_length", count, "left out: the samples of this data set have no prompts")
        return None
    starts_N = (templates_NL == loaded.spec.mask_id).int().argmax(1)
    if count is None and padding is not None:
        held_out_NL = torch.from_numpy(read_columns(root, config.split, range(len(templates_NL)))[COLUMN])
        longest, multiple = int((used_lengths(held_out_NL, manifest) - starts_N).max()), padding.pad_multiple
        count = -(-longest // multiple) * multiple
    return None if count is None else (starts_N + count).clamp(max=templates_NL.shape[1])


def _without_padding(manifest: Manifest, root: Path) -> Manifest:
    """Return the manifest of the same data whose padding is masked, but does not count. Raises UserError."""
    if manifest.pad_policy != "loss" or manifest.framing == "concatenate":
        raise UserError(
            f"nelbo_padding=false is not possible with {root} (framing={manifest.framing}, "
            f"pad_policy={manifest.pad_policy}), whose padding does not count, or is [EOS]; leave it out"
        )
    return replace(manifest, pad_policy="masked")


def _modes(loaded: LoadedModel) -> dict[str, bool]:
    """Map each mode of likelihood estimation to whether it uses self-conditioning."""
    return {"null": False, "conditioned": True} if loaded.spec.model.self_conditioned else {"null": False}


def _zero_shot_perplexity(
    loaded: LoadedModel, texts: Mapping[str, Sequence[str]], config: EvaluateConfig, parts: ResultParts
) -> dict[str, Any]:
    """Compute perplexities by name of the text and mode; without modes on all but rank 0."""
    found: dict[str, Any] = {}
    padding = _padding(loaded, config)
    if not config.nelbo_padding:
        loaded = replace(loaded, manifest=_without_padding(loaded.manifest, loaded.path))
    for name, source in config.zero_shot_texts().items():
        found[name] = {}
        for mode, condition in _modes(loaded).items():
            measured = zero_shot(
                loaded,
                texts[name],
                _nelbo_settings(config),
                condition=condition,
                end_marks=source.end_marks,
                group=source.group,
                padding=padding,
                parts=parts,
            )
            if measured is not None:
                found[name][mode] = {
                    "nelbo": asdict(measured.nelbo),
                    "perplexity": measured.perplexity,
                    "word_perplexity": measured.word_perplexity,
                }
    return found


def _sample_sets(
    loaded: LoadedModel, kind: type[Domain], root: Path, manifest: Manifest, config: EvaluateConfig
) -> list[SampleSet]:
    """Return the samples to draw, a set for each seed. Raises UserError for keys that the sampler cannot use."""
    templates_NL, lengths_N = sample_templates(loaded, kind, root, manifest, config)
    return [
        SampleSet(
            loaded,
            config.sampler,
            num=config.num if templates_NL is None else 1,
            seed=seed,
            templates_PL=templates_NL,
            lengths_P=lengths_N,
            precision=resolve_weights_dtype(config.weights_dtype, config.precision),
        )
        for seed in config.seeds
    ]


def _sample_quality(
    sets: list[SampleSet], domain: Domain | None, config: EvaluateConfig, parts: ResultParts
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Draw and measure sets of samples, and release each; returns a row of each, and by metric the interval over all.

    The ranks share the samples; rank 0 measures them. Both results are empty on the other ranks.
    """
    rows, values = [], []
    while sets:
        samples = sets.pop(0)  # its CUDA graphs would hold memory that the next one needs
        drawn = draw_and_score(samples, domain, metrics=config.metrics, parts=parts, batch_size=config.batch_size)
        if drawn is None:
            continue
        assert domain is not None
        measured = domain.measure(drawn)
        values.append(measured.values)
        rows.append(
            {
                "seed": samples.seed,
                "num": len(drawn.texts),
                "evaluations": drawn.evaluations,
                **sampling_cost(drawn, padded=samples.lengths_P is not None),
                "seconds": drawn.seconds,
                "metrics": measured.metrics,
            }
        )
    return rows, _intervals(rows, values) if rows else {}


def sampling_cost(drawn: GeneratedSamples, *, padded: bool) -> dict[str, Any]:
    """Return what was computed per sample, and the difference that an approximate cache makes.

    `padded` samples have lengths of their own, so that no number of positions is that of an evaluation.
    """
    found: dict[str, Any] = {}
    if drawn.positions is not None:
        found["positions"] = max(drawn.positions)
        found["computed_evaluations"] = None if padded else drawn.computed_evaluations
    if (deviation := drawn.cache_deviation) is not None:
        found["cache_deviation"] = {
            "predictions": deviation.positions,
            "total_variation": deviation.variation / deviation.positions,
            "other_token": deviation.disagreements / deviation.positions,
        }
    return found


def draw_and_score(
    samples: SampleSet,
    domain: Domain | None,
    *,
    metrics: dict[str, Any],
    parts: ResultParts | None,
    batch_size: int | None = None,
) -> GeneratedSamples | None:
    """Draw samples and, if all ranks have a domain that scores them, score them, both divided over the ranks.

    Returns them on rank 0, None on the other ranks, which call this together. Scores depend on the keys `metrics`.
    """
    drawn = generate_divided(samples, batch_size=batch_size, parts=parts)
    return score_divided(domain, drawn, None if parts is None else parts.of(**samples.key(), metrics=metrics))


def score_divided(
    domain: Domain | None, drawn: GeneratedSamples | None, parts: ResultParts | None
) -> GeneratedSamples | None:
    """Score the samples, which rank 0 has, on all ranks, if their domain does; returns them on rank 0.

    All ranks call this together. `parts` holds what was scored before, of these samples and metrics alone.
    """
    if not isinstance(domain, ScoringDomain):
        return drawn
    every = broadcast(drawn)
    assert every is not None

    def compute(numbers: Sequence[int]) -> Iterator[Result]:
        for start in range(0, len(numbers), _SCORED_AT_ONCE):
            some = numbers[start : start + _SCORED_AT_ONCE]
            yield some, domain.scores(every.at(some))

    scores = compute_divided(len(every.texts), compute, parts)
    return None if drawn is None else replace(drawn, scores=scores)


def _intervals(
    rows: Sequence[dict[str, Any]], values: Sequence[Mapping[str, SampleValues]]
) -> dict[str, dict[str, float]]:
    found = {}
    for name in values[0]:
        numbers = [row["metrics"][name] for row in rows]
        if None not in numbers and all(name in own for own in values):
            one = estimate(float(np.mean(numbers)), [[own[name] for own in values]])
            found[name] = {"low": one.low, "high": one.high}
    return {name: limits for name, limits in found.items() if not math.isnan(limits["low"])}


def _data_root(loaded: LoadedModel, config: EvaluateConfig) -> Path:
    if config.data is not None:
        return Path(config.data)
    if not (loaded.path / CONFIG_FILE).is_file():
        raise UserError(f"data is not set, and {loaded.path} does not name its data set; give data=DIRECTORY")
    stored = read_stored_config(loaded.path)
    name, found = stored.get("data.path", str), stored.find("data.path")
    if name is None:
        raise UserError(f"data is not set, and {loaded.path} was trained on several data sets; give data=DIRECTORY")
    if found is None:
        raise UserError(
            f"data is not set, and data.path={name} of {stored.path} does not exist here; give data=DIRECTORY"
        )
    return found


def _check_data(loaded: LoadedModel, root: Path) -> Manifest:
    """Read the manifest at `root`. Raises UserError unless it has the model's tokenizer and length."""
    manifest = check_dataset(root)
    if manifest.tokenizer.sha256 != loaded.manifest.tokenizer.sha256:
        raise UserError(
            f"data={root} and {loaded.path} have different tokenizers; give the data set that the model was trained on"
        )
    if manifest.length != loaded.spec.length:
        raise UserError(
            f"data={root} has length {manifest.length}, but {loaded.path} has length {loaded.spec.length}; "
            f"give the data set that the model was trained on, or prepare one with length={loaded.spec.length}"
        )
    return manifest


def _default_out(path: Path, loaded: LoadedModel, config: EvaluateConfig) -> Path:
    """Output file whose name contains a hash of all keys that change the result.

    It is in the run directory or, for a model outside of a run, which may be sealed or shared, in the working
    directory; the hash then covers the model, too.
    """
    sampler = config.sampler
    kind = "" if sampler.kind == "ancestral" else sampler.kind
    steps = kind if kind == "first_hitting" else f"{kind}T{sampler.steps}"
    run = run_of(path)
    settings: dict[str, Any] = {k: v for k, v in asdict(config).items() if k not in _NO_RESULT}
    if run is None:
        settings["model"] = sha256_of_model(loaded.path)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(EVALUATIONS) / Path(os.path.realpath(path)).name if run is None else run / EVALUATIONS
    return folder / f"step{loaded.spec.step}_{config.split}_{steps}_{digest}.json"
