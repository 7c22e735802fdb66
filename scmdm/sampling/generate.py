"""Drawing text, molecules, ... from a model on disk: templates, batches, decoding.

Legend: B batch, L length, N samples, P prompts or templates.
"""

from __future__ import annotations

import io
import json
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from scmdm.checkpoint.reader import find_model
from scmdm.config.sampler import SampleConfig, SamplerConfig
from scmdm.data.tokenizers import LevelTokenizer, Tokenizer, UnknownSymbol, block_text, is_block, is_framed
from scmdm.diffusion.sampler import Observation, Samples, StepHook, sample
from scmdm.diffusion.state import NO_LABEL
from scmdm.distributed.engine import compute_context, resolve_device, resolve_precision
from scmdm.domains.interface import GeneratedSamples
from scmdm.errors import UserError
from scmdm.models.model_files import LoadedModel, read_model
from scmdm.models.network import Network
from scmdm.ops.cuda_graphs import ReplayedDenoiser
from scmdm.system.files import atomic_write_bytes, atomic_write_text, require_writable

MASK_WORD = "[MASK]"
EACH_LABEL = "each"
_CPU_BATCH, _GPU_BATCH = 64, 1024  # samples at once: what stays in a core's cache; what fills a GPU


def load(path: str | Path, *, weights: str = "ema", device: str = "auto") -> LoadedModel:
    """Load a model for sampling from a run directory, a checkpoint or an export, in eval mode on `device`.

    Raises UserError when there is none, or when its files are missing, damaged or do not fit together.
    """
    loaded = read_model(find_model(Path(path)), weights=weights)
    loaded.model.to(resolve_device(device))
    return loaded


def template_tokens(
    tokenizer: Tokenizer, length: int, prompt: str | None, infill: str | None, *, bos_given: bool
) -> Tensor:
    """One row (L,) with the given tokens in place and the mask id elsewhere; `bos_given`: [BOS] is one of them."""
    row = torch.full((length,), tokenizer.mask_id)
    if infill is not None:
        pieces = infill.split(MASK_WORD)
        given = [tokenizer.bos_id, *_encode(tokenizer, pieces[0], "infill")]
        for piece in pieces[1:]:
            given += [tokenizer.mask_id, *_encode(tokenizer, piece, "infill")]
        row[:] = tokenizer.pad_id
        given.append(tokenizer.eos_id)
    elif prompt is not None or bos_given:
        given = [tokenizer.bos_id, *_encode(tokenizer, prompt or "", "prompt")]
    else:
        return row
    if len(given) > length:
        key = "prompt" if infill is None else "infill"
        raise UserError(
            f"{key} has {len(given)} tokens with its marks, the model's length is {length}; shorten it or set length"
        )
    row[: len(given)] = torch.tensor(given)
    return row


def loaded_template(loaded: LoadedModel, length: int, prompt: str | None = None, infill: str | None = None) -> Tensor:
    """`template_tokens` as the model's data set has it: what is known before anything is drawn."""
    bos_given = loaded.manifest.bos_policy == "given"
    return template_tokens(loaded.tokenizer, length, prompt, infill, bos_given=bos_given)


def _encode(tokenizer: Tokenizer, text: str, key: str) -> list[int]:
    try:
        return tokenizer.encode(text) if text else []
    except UnknownSymbol as error:
        raise UserError(f"{key}={text!r}: {error}; the model's vocabulary does not have it") from error


def generate(
    loaded: LoadedModel,
    sampler: SamplerConfig,
    *,
    num: int,
    seed: int,
    batch_size: int | None = None,
    templates_PL: Tensor | None = None,
    precision: str = "auto",
    progress: bool = False,
    on_step: StepHook | None = None,
) -> GeneratedSamples:
    """Draw `num` samples for each template, those of the first one first; without templates `num` from nothing.

    Sample i depends on `seed` and i, not on `batch_size`. `progress`: a bar on a terminal. `on_step` sees every step of
    every batch, in the thread that draws it. On a CPU every core draws batches of its own: two small batches side by
    side are faster than one on two cores.

    Raises UserError without templates for a model of prompts and responses, and for CUDA graphs without a GPU.
    """
    spec, model = loaded.spec, loaded.model
    device = next(model.parameters()).device
    settings = sampler.settings(spec.model.self_conditioned)
    denoiser = _replayed(model, device) if sampler.cuda_graphs else model
    if templates_PL is None:
        _require_prompt(loaded, None)
        templates_PL = loaded_template(loaded, spec.length)[None]
    sampler.check_length(templates_PL.shape[1])
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    ids_N = torch.arange(num * len(templates_PL))
    labels_N = _labels(loaded, sampler, ids_N % num)
    batches = ids_N.split(batch_size or (_CPU_BATCH if device.type == "cpu" else _GPU_BATCH))
    masks = int((templates_PL == spec.mask_id).sum(1).max())
    per_batch = masks if settings.kind == "first_hitting" else settings.steps
    bar = Progress(transient=True, disable=not (progress and Console().is_terminal))
    task = bar.add_task("denoiser evaluations", total=per_batch * len(batches))

    def stepped(observation: Observation) -> None:
        bar.advance(task)
        if on_step is not None:
            on_step(observation)

    def draw(ids_B: Tensor) -> Samples:
        with compute_context(device, resolve_precision(precision, device)):
            return sample(
                denoiser,
                templates_PL[ids_B // num].to(device),
                ids_B.to(device),
                schedule=spec.schedule,
                settings=settings,
                mask_id=spec.mask_id,
                seed=seed,
                labels_B=labels_N[ids_B].to(device) if labels_N is not None else None,
                on_step=stepped,
            )

    started = time.perf_counter()
    # The number of threads is each thread's own: the pool's work alone, the caller's stays.
    with bar, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        drawn = list(pool.map(draw, batches))
    return _decoded(loaded, drawn, labels_N, time.perf_counter() - started)


def _replayed(model: Network, device: torch.device) -> ReplayedDenoiser:
    if device.type != "cuda":
        raise UserError(f"sampler.cuda_graphs=true needs a CUDA device, not {device.type}; leave it out")
    return ReplayedDenoiser(model)


def _require_prompt(loaded: LoadedModel, given: str | None) -> None:
    if given is None and loaded.manifest.framing == "prompts":
        raise UserError(
            f"{loaded.path} was trained on responses to prompts, and has never been asked to make a prompt; give "
            "prompt=TEXT, prompts=FILE or infill=TEXT"
        )


def _labels(loaded: LoadedModel, sampler: SamplerConfig, numbers_N: Tensor) -> Tensor | None:
    """The class (N,) of every sample of a prompt; None for a model that knows none."""
    names, label = loaded.manifest.labels, sampler.label
    if not loaded.spec.model.labels:
        if label is not None:
            raise UserError(f"sampler.label={label}, but the model knows no labels; train it with model.labels=true")
        return None
    if label is None:
        return torch.full_like(numbers_N, NO_LABEL)
    if label == EACH_LABEL:
        return numbers_N % len(names)
    if label not in names:
        raise UserError(f"sampler.label={label} is not possible; it must be {EACH_LABEL} or one of {', '.join(names)}")
    return torch.full_like(numbers_N, names.index(label))


def _decoded(
    loaded: LoadedModel, drawn: Sequence[Samples], labels_N: Tensor | None, seconds: float
) -> GeneratedSamples:
    tokens = torch.cat([part.tokens.cpu() for part in drawn])
    blocks, rows = loaded.manifest.framing == "concatenate", tokens.tolist()
    texts = [block_text(row, loaded.tokenizer) if blocks else loaded.tokenizer.decode(row) for row in rows]
    framed = [is_block(row, loaded.tokenizer) if blocks else is_framed(row, loaded.tokenizer) for row in rows]
    counts = [part.evaluations for part in drawn for _ in range(len(part.tokens))]
    known = None
    if labels_N is not None and int(labels_N.min()) != NO_LABEL:
        known = [loaded.manifest.labels[label] for label in labels_N.tolist()]
    return GeneratedSamples(tokens, texts, framed, counts, seconds, known)


def run_sampling(path: str, config: SampleConfig) -> GeneratedSamples:
    """`scmdm sample`: draw, then write to `config.out` if set."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.out is not None:
        require_writable(Path(config.out))
    prompts = read_prompts(Path(config.prompts)) if config.prompts is not None else [config.prompt]
    loaded = load(path, weights=config.weights, device=config.device)
    _require_prompt(loaded, prompts[0] if config.infill is None else config.infill)
    length = config.length or loaded.spec.length
    templates = [loaded_template(loaded, length, prompt, config.infill) for prompt in prompts]
    generated = generate(
        loaded,
        config.sampler,
        num=config.num,
        seed=config.seed,
        batch_size=config.batch_size,
        templates_PL=torch.stack(templates),
        precision=config.precision,
        progress=True,
    )
    if config.out is not None:
        write_samples(Path(config.out), generated, loaded.tokenizer)
    return generated


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a line each, or in `.jsonl` the key `prompt`. UserError names the line that has none."""
    try:
        lines = path.read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path} cannot be read ({error}); give a text file with a prompt a line") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f'prompts={path}: not every line is {{"prompt": TEXT}} ({error!r})') from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"prompts={path} holds no prompt, or one that is no text; give a prompt a line")
    return prompts


def write_samples(path: Path, generated: GeneratedSamples, tokenizer: Tokenizer) -> None:
    """One JSON object a line with `text`, `framed`, `tokens`, `evaluations` and, if asked for, `label`; or, by the
    file's name: `.txt` texts a line, `.smi` molecules that are framed, `.fasta` sequences, `.png` a picture of the
    first samples, `.npy` codes (N, rows, codes of a row) of samples that are framed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Sequence[Any]] = {
        "text": generated.texts,
        "framed": generated.framed,
        "tokens": generated.tokens.tolist(),
        "evaluations": generated.counts,
    }
    if generated.labels is not None:
        columns["label"] = generated.labels
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".png":
        from scmdm.domains.registry import DOMAINS, domain_name

        if DOMAINS[domain_name(tokenizer.kind)].draw(rows, tokenizer, path) is None:
            raise UserError(f"out={path}: samples of a {tokenizer.kind} tokenizer cannot be drawn; give out=NAME.jsonl")
        return
    if path.suffix == ".npy":
        atomic_write_bytes(path, _codes(path, generated, tokenizer))
        return
    atomic_write_text(path, "".join(line + "\n" for line in _lines(path.suffix, rows)))


def _codes(path: Path, generated: GeneratedSamples, tokenizer: Tokenizer) -> bytes:
    if not isinstance(tokenizer, LevelTokenizer):
        raise UserError(f"out={path}: samples of a {tokenizer.kind} tokenizer are no codes; give out=NAME.jsonl")
    codes_NHW = tokenizer.codes(generated.tokens[torch.tensor(generated.framed)].numpy())
    buffer = io.BytesIO()
    np.save(buffer, codes_NHW.astype(tokenizer.layout.dtype))
    return buffer.getvalue()


def _lines(suffix: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        if suffix == ".smi":
            if row["framed"]:
                yield row["text"]
        elif suffix in (".fasta", ".fa"):
            label = f" label={row['label']}" if "label" in row else ""
            yield f">sample_{number} evaluations={row['evaluations']} framed={str(row['framed']).lower()}{label}"
            yield from textwrap.wrap(row["text"], 80)
        elif suffix == ".txt":
            yield row["text"]
        else:
            yield json.dumps(row)
