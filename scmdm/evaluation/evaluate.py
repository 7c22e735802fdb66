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

from scmdm.config.sampling import EvaluateConfig
from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest, check_dataset
from scmdm.diffusion.likelihood import Nelbo, estimate_nelbo
from scmdm.errors import UserError
from scmdm.evaluation.molecules import Reference, evaluate_molecules
from scmdm.evaluation.statistics import mean_interval
from scmdm.evaluation.text import check_scorer, evaluate_text
from scmdm.files import atomic_write_text, require_writable
from scmdm.model.weights import LoadedModel
from scmdm.parallel.engine import compute_context, resolve_precision
from scmdm.sampling import Generated, generate, load
from scmdm.training.validation import validation_batches

_SHOWN = {
    "molecules": (
        "validity",
        "parsed",
        "framed",
        "uniqueness_of_valid",
        "uniqueness_of_samples",
        "novelty_of_unique",
        "novelty_of_samples",
    ),
    "text": ("entropy", "distinct_2", "perplexity"),
}


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
    domain = _domain(manifest, config)
    out = Path(config.out) if config.out else _default_out(Path(path), loaded.spec.step, config)
    require_writable(out)
    result: dict[str, Any] = {"model": str(path), "step": loaded.spec.step, "domain": domain, "config": asdict(config)}
    if config.nelbo_samples:
        result["nelbo"] = {mode: _as_dict(value) for mode, value in model_nelbo(loaded, root, config).items()}
    if config.num:
        result["samples"] = _sample_quality(loaded, root, domain, config)
    _print(result)
    atomic_write_text(out, json.dumps(result, indent=2) + "\n")
    Console().print(f"wrote {out}", highlight=False, soft_wrap=True)
    return result


def model_nelbo(loaded: LoadedModel, root: Path, config: EvaluateConfig) -> dict[str, Nelbo]:
    """NELBO without an estimate ("null") and, for a self-conditioned model, with one ("conditioned"): same noise."""
    device = next(loaded.model.parameters()).device
    manifest = Manifest.read(root)
    manifest.split(config.split, root)
    modes = {"null": False, "conditioned": True} if loaded.spec.model.self_conditioned else {"null": False}
    found = {}
    for name, condition in modes.items():
        with compute_context(device, resolve_precision(config.precision, device)):
            found[name] = estimate_nelbo(
                loaded.model,
                validation_batches(root, config.split, manifest, device, config.nelbo_samples),
                loaded.spec.schedule,
                mask_id=loaded.spec.mask_id,
                seed=0,
                t_min=config.t_min,
                draws=config.nelbo_draws,
                condition=condition,
            )
    return found


def molecule_reference(root: Path, loaded: LoadedModel, split: str, *, fcd: bool) -> Reference:
    """Training set for novelty, and the properties of `split`."""
    train, held_out = (decode_split(root, loaded, name) for name in ("train", split))
    return Reference.make(train, held_out, fcd=fcd)


def decode_split(root: Path, loaded: LoadedModel, split: str) -> list[str]:
    """The texts of a split."""
    return [loaded.tokenizer.decode(row) for row in read_split(root, split).tolist()]


def _sample_quality(loaded: LoadedModel, root: Path, domain: str, config: EvaluateConfig) -> list[dict[str, Any]]:
    reference = molecule_reference(root, loaded, config.split, fcd=config.fcd) if domain == "molecules" else None
    held_out = [] if reference is not None or config.scorer else decode_split(root, loaded, config.split)
    rows = []
    for seed in config.seeds:
        drawn = generate(
            loaded,
            config.sampler,
            num=config.num,
            seed=seed,
            batch_size=config.batch_size,
            precision=config.precision,
            progress=True,
        )
        if reference is not None:
            metrics = evaluate_molecules(drawn.texts, drawn.framed, reference).as_dict()
        else:
            metrics = _text_metrics(drawn, loaded, held_out, config)
        rows.append({"seed": seed, "evaluations": drawn.evaluations, "seconds": drawn.seconds, "metrics": metrics})
    return rows


def _text_metrics(drawn: Generated, loaded: LoadedModel, held_out: list[str], config: EvaluateConfig) -> dict[str, Any]:
    scorer = Path(config.scorer) if config.scorer else None
    device = str(next(loaded.model.parameters()).device)
    ids_NL = drawn.tokens.numpy()
    pad_id = loaded.tokenizer.pad_id
    return evaluate_text(drawn.texts, ids_NL, pad_id, held_out=held_out, scorer=scorer, device=device).as_dict()


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


def _domain(manifest: Manifest, config: EvaluateConfig) -> str:
    found = "molecules" if manifest.tokenizer.kind == "smiles" else "text"
    if config.domain not in ("auto", found):
        raise UserError(f"domain={config.domain}, but the model's tokenizer makes {found}; leave the key out")
    if config.fcd and found != "molecules":
        raise UserError("fcd=true is for molecules, and this model makes text; leave it out")
    if config.scorer is not None and found != "text":
        raise UserError(f"scorer={config.scorer} is for text, and this model makes molecules; leave it out")
    if config.scorer is not None:
        check_scorer(Path(config.scorer))
    return found


def _default_out(path: Path, step: int, config: EvaluateConfig) -> Path:
    """Another name for all that changes the result, so that no evaluation replaces another one."""
    sampler = config.sampler
    steps = f"T{sampler.steps}" if sampler.kind == "ancestral" else sampler.kind
    settings = json.dumps({k: v for k, v in asdict(config).items() if k not in ("out", "threads")}, sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return path / "evaluations" / f"step{step}_{config.split}_{steps}_{digest}.json"


def _as_dict(value: Nelbo) -> dict[str, float]:
    return {**asdict(value), "perplexity": value.perplexity}


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']} at step {result['step']:,}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for mode, nelbo in result.get("nelbo", {}).items():
        table.add_row(f"NELBO {mode}, nats per token", f"{nelbo['mean']:.4f} ± {nelbo['stderr']:.4f} (standard error)")
    rows = result.get("samples", [])
    if rows:
        for name in _SHOWN[result["domain"]]:
            table.add_row(name.replace("_", " "), mean_interval([row["metrics"][name] for row in rows]).text(4))
        for name in ("property_distance", "fcd"):
            values = [row["metrics"].get(name) for row in rows]
            if None not in values:
                table.add_row(name.replace("_", " "), mean_interval(values).text(4))
        if "scorer" in rows[0]["metrics"]:
            table.add_row("perplexity under", rows[0]["metrics"]["scorer"])
            table.add_row("sampler precision", result["config"]["sampler"]["gumbel"])
        table.add_row("samples x seeds", f"{result['config']['num']} x {len(rows)}")
        table.add_row("denoiser evaluations per sample", str(rows[0]["evaluations"]))
    Console().print(table)
