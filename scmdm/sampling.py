"""Drawing text, molecules, ... from a model on disk: templates, batches, decoding.

Legend: B batch, L length, N samples.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from scmdm.config.sampling import SampleConfig, SamplerConfig
from scmdm.data.tokenizers import Tokenizer, UnknownSymbol, block_text, is_block, is_framed
from scmdm.diffusion.sampler import Samples, sample
from scmdm.errors import UserError
from scmdm.files import atomic_write_text, require_writable
from scmdm.model.weights import LoadedModel, read_model
from scmdm.parallel.engine import compute_context, resolve_device, resolve_precision
from scmdm.training.checkpoint import find_model

MASK_WORD = "[MASK]"
_CPU_BATCH, _GPU_BATCH = 64, 1024  # samples at once: what stays in a core's cache; what fills a GPU


@dataclass(frozen=True)
class Generated:
    """Samples in order, with what they cost."""

    tokens: Tensor  # (N, L) int64, on the CPU
    texts: list[str]  # up to the first end mark; of a model of concatenated texts all of them
    framed: list[bool]  # the marks are where the data has them; else `texts` holds a fragment
    evaluations: int  # denoiser evaluations per sample
    seconds: float


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
    template_L: Tensor | None = None,
    precision: str = "auto",
    progress: bool = False,
) -> Generated:
    """Draw `num` samples; sample i depends on `seed` and i, not on `batch_size`. `progress`: a bar on a terminal.

    On a CPU every core draws batches of its own: two small batches side by side are faster than one on two cores.
    """
    spec, model = loaded.spec, loaded.model
    device = next(model.parameters()).device
    settings = sampler.settings(spec.model.self_conditioned)
    template = loaded_template(loaded, spec.length) if template_L is None else template_L
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    batches = torch.arange(num).split(batch_size or (_CPU_BATCH if device.type == "cpu" else _GPU_BATCH))
    per_batch = settings.steps if settings.kind == "ancestral" else int((template == spec.mask_id).sum())
    bar = Progress(transient=True, disable=not (progress and Console().is_terminal))
    task = bar.add_task("denoiser evaluations", total=per_batch * len(batches))

    def draw(ids: Tensor) -> Samples:
        with compute_context(device, resolve_precision(precision, device)):
            return sample(
                model,
                template.to(device).expand(len(ids), -1),
                ids.to(device),
                schedule=spec.schedule,
                settings=settings,
                mask_id=spec.mask_id,
                seed=seed,
                on_step=lambda *_: bar.advance(task),
            )

    started = time.perf_counter()
    # The number of threads is each thread's own: the pool's work alone, the caller's stays.
    with bar, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        drawn = list(pool.map(draw, batches))
    tokens = torch.cat([part.tokens.cpu() for part in drawn])
    blocks, rows = loaded.manifest.framing == "concatenate", tokens.tolist()
    texts = [block_text(row, loaded.tokenizer) if blocks else loaded.tokenizer.decode(row) for row in rows]
    framed = [is_block(row, loaded.tokenizer) if blocks else is_framed(row, loaded.tokenizer) for row in rows]
    evaluations = max(part.evaluations for part in drawn)
    return Generated(tokens, texts, framed, evaluations, time.perf_counter() - started)


def run_sampling(path: str, config: SampleConfig) -> Generated:
    """`scmdm sample`: draw, then write JSON lines to `config.out` if set."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.out is not None:
        require_writable(Path(config.out))
    loaded = load(path, weights=config.weights, device=config.device)
    length = config.length or loaded.spec.length
    template = loaded_template(loaded, length, config.prompt, config.infill)
    generated = generate(
        loaded,
        config.sampler,
        num=config.num,
        seed=config.seed,
        batch_size=config.batch_size,
        template_L=template,
        precision=config.precision,
        progress=True,
    )
    if config.out is not None:
        write_samples(Path(config.out), generated)
    return generated


def write_samples(path: Path, generated: Generated) -> None:
    """One JSON object a line: `text`, `framed`, `tokens`, `evaluations`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text": text, "framed": framed, "tokens": tokens, "evaluations": generated.evaluations}
        for text, framed, tokens in zip(generated.texts, generated.framed, generated.tokens.tolist(), strict=True)
    ]
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
