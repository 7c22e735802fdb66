"""Drawing samples from a model: batches, labels, decoding.

Legend: B batch, L length, N samples, P templates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import torch
from rich.progress import Progress
from torch import Tensor

from scmdm.checkpoint.reader import find_model
from scmdm.config.sampling import SamplerConfig
from scmdm.data.tokenizers import block_text, is_block, is_framed
from scmdm.diffusion.sampler import Observation, Samples, StepHook, sample
from scmdm.diffusion.state import NO_LABEL
from scmdm.distributed.engine import compute_context, resolve_device, resolve_precision
from scmdm.domains.interface import GeneratedSamples
from scmdm.errors import UserError
from scmdm.models.model_files import LoadedModel, read_model
from scmdm.models.network import Network
from scmdm.ops.cuda_graphs import ReplayedDenoiser
from scmdm.sampling.templates import make_model_template, require_prompt
from scmdm.system.terminal import Terminal

EACH_LABEL = "each"
_CPU_BATCH, _GPU_BATCH = 64, 1024  # the first fits a core's cache, the second fills a GPU


def load(path: str | Path, *, weights: str = "ema", device: str = "auto") -> LoadedModel:
    """Load a model for sampling from a run directory, a checkpoint or an export, in eval mode on `device`.

    `weights` is "ema" (averaged, where the model has them) or "raw"; `device` is "auto", "cpu" or "cuda". Raises
    UserError when there is no model at `path`, or when its files are missing, damaged or inconsistent.
    """
    loaded = read_model(find_model(Path(path)), weights=weights)
    loaded.model.to(resolve_device(device))
    return loaded


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
    """Draw `num` samples for each template (P, L) int64, ordered by template; without templates, `num` samples.

    Sample i depends on `seed` and i, not on `batch_size`. `progress` shows a bar on a terminal. `on_step` is called
    after every step of every batch, in the thread that draws the batch. On a CPU each core draws its own batches:
    one small batch on each of two cores is faster than one batch on both.

    Raises UserError for a model of responses without templates, for a label that the model does not have, and for CUDA
    graphs without a GPU.
    """
    spec, model = loaded.spec, loaded.model
    device = next(model.parameters()).device
    settings = sampler.settings(spec.model.self_conditioned)
    denoiser = _replayed(model, device) if sampler.cuda_graphs else model
    if templates_PL is None:
        require_prompt(loaded, None)
        templates_PL = make_model_template(loaded, spec.length)[None]
    sampler.check_length(templates_PL.shape[1])
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    ids_N = torch.arange(num * len(templates_PL))
    labels_N = _labels(loaded, sampler, ids_N % num)
    batches = ids_N.split(batch_size or (_CPU_BATCH if device.type == "cpu" else _GPU_BATCH))
    masks = int((templates_PL == spec.mask_id).sum(1).max())
    per_batch = masks if settings.kind == "first_hitting" else settings.steps
    bar = Progress(transient=True, disable=not (progress and Terminal().is_terminal))
    task = bar.add_task("denoiser evaluations", total=per_batch * len(batches))

    ended = Event()  # after Ctrl-C or a failure in one thread, the others end at their next step

    def stepped(observation: Observation) -> None:
        if ended.is_set():
            raise CancelledError
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
    # torch keeps the number of threads per thread: the pool's threads compute on one core, the caller's is unchanged.
    with bar, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            drawn = list(pool.map(draw, batches))
        finally:
            ended.set()
    return _decoded(loaded, drawn, labels_N, time.perf_counter() - started)


def _replayed(model: Network, device: torch.device) -> ReplayedDenoiser:
    if device.type != "cuda":
        raise UserError(f"sampler.cuda_graphs=true needs a CUDA device, not {device.type}; leave it out")
    return ReplayedDenoiser(model)


def _labels(loaded: LoadedModel, sampler: SamplerConfig, numbers_N: Tensor) -> Tensor | None:
    """Return labels (N,) int64 of samples, given their numbers within a template; None for a model without labels."""
    names, label = loaded.manifest.labels, sampler.label
    if not loaded.spec.model.labels:
        if label is not None:
            raise UserError(f"sampler.label={label}, but the model has no labels; train it with model.labels=true")
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
