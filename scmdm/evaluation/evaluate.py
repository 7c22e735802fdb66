"""`scmdm evaluate`: NELBO and sample quality of one model, printed and kept as JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from scmdm.config.evaluation import EvaluateConfig
from scmdm.data.manifest import Manifest, check_dataset
from scmdm.diffusion.likelihood import Nelbo, estimate_nelbo
from scmdm.distributed.engine import compute_context, resolve_precision
from scmdm.domains.interface import Asked, Domain
from scmdm.domains.registry import domain_of
from scmdm.errors import UserError
from scmdm.evaluation.statistics import mean_interval
from scmdm.evaluation.zero_shot import read_texts, zero_shot
from scmdm.models.model_files import LoadedModel
from scmdm.sampling.generation import generate, load
from scmdm.system.files import atomic_write_text, require_writable
from scmdm.training.validation import validation_batches


def run_evaluation(path: str, config: EvaluateConfig) -> dict[str, Any]:
    """Measure what `config` asks for, print it, and write it as JSON; returns what was written."""
    if config.threads:
        torch.set_num_threads(config.threads)
    loaded = load(path, weights=config.weights, device=config.device)
    root = _data_root(loaded, config)
    manifest = check_dataset(root)
    if manifest.tokenizer.sha256 != loaded.manifest.tokenizer.sha256:
        raise UserError(
            f"data={root} has another tokenizer than {loaded.path}; give the data set that the model was made for"
        )
    if manifest.length != loaded.spec.length:
        raise UserError(
            f"data={root} has samples of length {manifest.length}, {loaded.path} makes {loaded.spec.length}; give the "
            "data set that the model was made for, or prepare it with that length"
        )
    domain = _domain(loaded, manifest, root, config)
    out = Path(config.out) if config.out else _default_out(Path(path), loaded.spec.step, config)
    require_writable(out)
    result: dict[str, Any] = {
        "model": str(path),
        "step": loaded.spec.step,
        "domain": domain.name,
        "config": asdict(config),
    }
    if config.nelbo_samples:
        result["nelbo"] = {mode: _as_dict(value) for mode, value in model_nelbo(loaded, root, config).items()}
    if config.texts:
        result["zero_shot"] = _zero_shot(loaded, config)
    if config.num:
        given = domain.given(root, manifest, config.split, config.num)
        result["samples"] = _sample_quality(loaded, domain, given, config)
    _print(result, domain)
    atomic_write_text(out, json.dumps(result, indent=2) + "\n")
    Console().print(f"wrote {out}", highlight=False, soft_wrap=True)
    return result


def model_nelbo(loaded: LoadedModel, root: Path, config: EvaluateConfig) -> dict[str, Nelbo]:
    """NELBO without an estimate ("null") and, for a self-conditioned model, with one ("conditioned"): same noise."""
    device = next(loaded.model.parameters()).device
    manifest = Manifest.read(root)
    manifest.split(config.split, root)
    labels = loaded.spec.model.labels
    modes = {"null": False, "conditioned": True} if loaded.spec.model.self_conditioned else {"null": False}
    found = {}
    for name, condition in modes.items():
        with compute_context(device, resolve_precision(config.precision, device)):
            found[name] = estimate_nelbo(
                loaded.model,
                validation_batches(root, config.split, manifest, device, config.nelbo_samples, labels=labels),
                loaded.spec.schedule,
                mask_id=loaded.spec.mask_id,
                seed=0,
                t_min=config.t_min,
                draws=config.nelbo_draws,
                condition=condition,
            )
    return found


def _zero_shot(loaded: LoadedModel, config: EvaluateConfig) -> dict[str, Any]:
    """By name and mode: how well the model predicts texts of elsewhere."""
    modes = {"null": False, "conditioned": True} if loaded.spec.model.self_conditioned else {"null": False}
    options: dict[str, Any] = {"draws": config.nelbo_draws, "t_min": config.t_min, "precision": config.precision}
    found: dict[str, Any] = {}
    for name, asked in config.zero_shot_texts().items():
        texts = read_texts(Path(asked.path), keys=(asked.key,), unit=asked.unit, detokenize=asked.detokenize)
        measured = {mode: zero_shot(loaded, texts, condition=condition, **options) for mode, condition in modes.items()}
        found[name] = {
            mode: {"nelbo": asdict(m.nelbo), "perplexity": m.perplexity, "word_perplexity": m.word_perplexity}
            for mode, m in measured.items()
        }
    return found


def _sample_quality(
    loaded: LoadedModel, domain: Domain, given: Tensor | None, config: EvaluateConfig
) -> list[dict[str, Any]]:
    rows = []
    for seed in config.seeds:
        drawn = generate(
            loaded,
            config.sampler,
            num=config.num if given is None else 1,
            seed=seed,
            batch_size=config.batch_size,
            templates_PL=given,
            precision=config.precision,
            progress=True,
        )
        metrics = domain.measure(drawn)
        rows.append(
            {
                "seed": seed,
                "num": len(drawn.texts),
                "evaluations": drawn.evaluations,
                "seconds": drawn.seconds,
                "metrics": metrics,
            }
        )
    return rows


def _data_root(loaded: LoadedModel, config: EvaluateConfig) -> Path:
    if config.data is not None:
        return Path(config.data)
    kept = loaded.path / "config.yaml"
    if not kept.is_file():
        raise UserError(f"data is not set, and {loaded.path} does not name its data set; give data=DIRECTORY")
    path = yaml.safe_load(kept.read_text())["data"]["path"]
    if path is None:
        raise UserError(f"data is not set, and {loaded.path} was trained on several data sets; give data=DIRECTORY")
    return Path(path)


def _domain(loaded: LoadedModel, manifest: Manifest, root: Path, config: EvaluateConfig) -> Domain:
    found = domain_of(manifest)
    if config.domain not in ("auto", found.name):
        raise UserError(f"domain={config.domain}, but the model makes {found.name}; leave the key out")
    device = str(next(loaded.model.parameters()).device)
    asked = Asked(
        config.split, config.fcd, config.moses, config.scorer, config.mauve, config.inception, device, alone=True
    )
    return found(root, manifest, asked)


def _default_out(path: Path, step: int, config: EvaluateConfig) -> Path:
    """Another name for all that changes the result, so that no evaluation replaces another one."""
    sampler = config.sampler
    kind = "" if sampler.kind == "ancestral" else sampler.kind
    steps = kind if kind == "first_hitting" else f"{kind}T{sampler.steps}"
    settings = json.dumps({k: v for k, v in asdict(config).items() if k not in ("out", "threads")}, sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return path / "evaluations" / f"step{step}_{config.split}_{steps}_{digest}.json"


def _as_dict(value: Nelbo) -> dict[str, float]:
    return {**asdict(value), "perplexity": value.perplexity}


def _print(result: dict[str, Any], domain: Domain) -> None:
    table = Table(title=f"{result['model']} at step {result['step']:,}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = result.get("samples", [])
    shown = [m for m in domain.metrics if rows and None not in [row["metrics"].get(m.name) for row in rows]]
    if any(metric.real() for metric in shown):
        table.add_column("real data", justify="right")
    for mode, nelbo in result.get("nelbo", {}).items():
        table.add_row(f"NELBO {mode}, nats per token", f"{nelbo['mean']:.4f} ± {nelbo['stderr']:.4f} (standard error)")
    for name, modes in result.get("zero_shot", {}).items():
        for mode, value in modes.items():
            error = value["perplexity"] * value["nelbo"]["stderr"]
            text = f"{value['perplexity']:.2f} ± {error:.2f} (standard error); {value['word_perplexity']:.2f} per word"
            table.add_row(f"zero-shot perplexity of {name}, {mode}", text)
    if rows:
        for metric in shown:
            interval = mean_interval([row["metrics"][metric.name] for row in rows])
            real = [metric.real()] if len(table.columns) > 2 else []
            table.add_row(metric.title, interval.text(metric.digits + 1, metric.scale), *real)
        table.caption = "; ".join(dict.fromkeys(metric.protocol for metric in shown if metric.protocol)) or None
        if "scorer" in rows[0]["metrics"]:
            table.add_row("perplexity under", rows[0]["metrics"]["scorer"])
            table.add_row("sampler precision", result["config"]["sampler"]["gumbel"])
        table.add_row("samples x seeds", f"{rows[0]['num']} x {len(rows)}")
        table.add_row("denoiser evaluations per sample", str(rows[0]["evaluations"]))
    Console().print(table)
