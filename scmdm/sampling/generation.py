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
from torch.nn import functional

from scmdm.checkpoint.model_verification import Verification
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
from scmdm.sampling.end_tokens import answer_text, cut_at_end, end_token_ids, is_framed_answer
from scmdm.sampling.templates import make_model_template, require_prompt
from scmdm.system.terminal import Terminal

EACH_LABEL = "each"
_CPU_BATCH, _GPU_BATCH = 64, 1024  # the first fits a core's cache, the second fills a GPU


def load(path: str | Path, *, weights: str = "ema", device: str = "auto", verify: str = "share") -> LoadedModel:
    """Load a model for sampling from a run directory, a checkpoint or an export, in eval mode on `device`.

    `weights` is "ema" (averaged, where the model has them) or "raw"; `device` is "auto", "cpu" or "cuda"; `verify` is
    "share" (what is used is hashed, divided over the ranks of a job), "full" (every file is hashed) or "sizes". Raises
    UserError when there is no model at `path`, or when its files are missing, damaged or inconsistent.
    """
    how = Verification(verify, weights=weights, together=True)
    loaded = read_model(find_model(Path(path), how), weights=weights)
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
    lengths_P: Tensor | None = None,
    precision: str = "auto",
    progress: bool = False,
    on_step: StepHook | None = None,
    chats: bool = False,
) -> GeneratedSamples:
    """Draw `num` samples for each template (P, L) int64, ordered by template; without templates, `num` samples.

    With `lengths_P`, each template has its own length, and is padded at its end; tokens of its samples are padded, too.
    Sample i depends on `seed` and i, not on `batch_size`. `progress` shows a bar on a terminal. `on_step` is called
    after every step of every batch, in the thread that draws the batch. On a CPU each core draws its own batches:
    one small batch on each of two cores is faster than one batch on both.

    With `chats`, as always for a model of conversations, the templates end with questions, and texts are the answers.

    Raises UserError for a model of responses without templates, for a label that the model does not have, and for CUDA
    graphs without a GPU.
    """
    spec, model = loaded.spec, loaded.model
    device = next(model.parameters()).device
    end_ids = end_token_ids(loaded.tokenizer, sampler.end_tokens)
    settings = sampler.settings(spec.model.self_conditioned, end_ids)
    denoiser = _replayed(model, device) if sampler.cuda_graphs else model
    if templates_PL is None:
        require_prompt(loaded, None)
        templates_PL = make_model_template(loaded, spec.length)[None]
    masked_PL = templates_PL == spec.mask_id
    ends_P = torch.full((len(templates_PL),), templates_PL.shape[1]) if lengths_P is None else lengths_P
    starts_P = torch.where(masked_PL.any(1), masked_PL.int().argmax(1), ends_P)
    sampler.check_length(int((ends_P - (starts_P if sampler.block_start == "prompt" else 0)).max()))
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    ids_N = torch.arange(num * len(templates_PL))
    labels_N = _labels(loaded, sampler, ids_N % num)
    batches = ids_N.split(batch_size or (_CPU_BATCH if device.type == "cpu" else _GPU_BATCH))
    per_batch = int(masked_PL.sum(1).max()) if settings.kind == "first_hitting" else settings.steps
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
        lengths_B = None if lengths_P is None else lengths_P[ids_B // num]
        longest = templates_PL.shape[1] if lengths_B is None else int(lengths_B.max())
        with compute_context(device, resolve_precision(precision, device)):
            return sample(
                denoiser,
                templates_PL[ids_B // num, :longest].to(device),
                ids_B.to(device),
                schedule=spec.schedule,
                settings=settings,
                mask_id=spec.mask_id,
                seed=seed,
                labels_B=labels_N[ids_B].to(device) if labels_N is not None else None,
                lengths_B=None if lengths_B is None else lengths_B.to(device),
                on_step=stepped,
            )

    started = time.perf_counter()
    # torch keeps the number of threads per thread: the pool's threads compute on one core, the caller's is unchanged.
    with bar, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            drawn = list(pool.map(draw, batches))
        finally:
            ended.set()
    tokens_NL = torch.cat([_padded(part.tokens.cpu(), templates_PL.shape[1], loaded) for part in drawn])
    counts = torch.cat([part.evaluations_B for part in drawn]).tolist()
    seconds = time.perf_counter() - started
    texts, framed = _decoded(loaded, tokens_NL, starts_P[ids_N // num], end_ids, chats=chats)
    known = None
    if labels_N is not None and int(labels_N.min()) != NO_LABEL:
        known = [loaded.manifest.labels[label] for label in labels_N.tolist()]
    return GeneratedSamples(tokens_NL, texts, framed, counts, seconds, known)


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


def _padded(tokens_BL: Tensor, length: int, loaded: LoadedModel) -> Tensor:
    return functional.pad(tokens_BL, (0, length - tokens_BL.shape[1]), value=loaded.tokenizer.pad_id)


def _decoded(
    loaded: LoadedModel, tokens_NL: Tensor, starts_N: Tensor, end_ids: Sequence[int], *, chats: bool
) -> tuple[list[str], list[bool]]:
    """Decode samples, whose generated part begins at `starts_N`, each up to its first end token."""
    tokenizer, rows = loaded.tokenizer, tokens_NL.tolist()
    if loaded.manifest.framing == "concatenate":
        return [block_text(row, tokenizer) for row in rows], [is_block(row, tokenizer) for row in rows]
    pairs = list(zip(rows, starts_N.tolist(), strict=True))
    if chats or loaded.manifest.framing == "chats":
        texts = [answer_text(tokenizer, row, at, end_ids) for row, at in pairs]
        return texts, [is_framed_answer(row[at:], tokenizer, end_ids) for row, at in pairs]
    # [EOS] alone is left to the tokenizer, which may share its id with [BOS].
    texts = [tokenizer.decode(cut_at_end(row, at, end_ids[1:])) for row, at in pairs]
    return texts, [is_framed(row, tokenizer) for row in rows]
