"""Drawing samples from a model: batches, labels, decoding.

Legend: B batch, L length, N samples, P templates.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, replace
from threading import Event
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from scmdm.config.fields import require
from scmdm.config.sampling import SamplerConfig
from scmdm.data.tokenizers import block_text, is_block, is_framed
from scmdm.diffusion.cached_windows import CacheDeviation
from scmdm.diffusion.sampler import Observation, Samples, StepHook, sample
from scmdm.diffusion.state import NO_LABEL
from scmdm.distributed.engine import compute_context, resolve_precision
from scmdm.domains.interface import GeneratedSamples
from scmdm.errors import UserError
from scmdm.models.model_files import LoadedModel
from scmdm.ops.cuda_graphs import ReplayedDenoiser
from scmdm.runtime.divided_work import Columns, Result, ResultParts, compute_divided
from scmdm.runtime.watchdog import report_progress
from scmdm.sampling.batch_size import even_batch_size, fitting_batch_size
from scmdm.sampling.end_tokens import answer_text, cut_at_end, end_token_ids, is_framed_answer
from scmdm.sampling.templates import make_model_template, require_prompt
from scmdm.system.memory import is_out_of_memory
from scmdm.system.process_group import joined_world
from scmdm.system.terminal import Terminal

EACH_LABEL = "each"
logger = logging.getLogger("scmdm")


class SampleSet:
    """Samples to draw from a model: `num` for each template (P, L) int64, ordered by template.

    Sample i depends on these arguments and i alone. Without templates, `num` samples begin fully masked. With
    `lengths_P`, each template has its own length, and is padded at its end; tokens of its samples are padded, too. With
    `chats`, as always for a model of conversations, the templates end with questions, and texts are the answers.

    Raises UserError for a model of responses without templates, for a label that the model does not have, for guidance
    by a prompt that is not given, and for CUDA graphs without a GPU or of shared weights.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sampler: SamplerConfig,
        *,
        num: int,
        seed: int,
        templates_PL: Tensor | None = None,
        lengths_P: Tensor | None = None,
        precision: str = "auto",
        chats: bool = False,
    ) -> None:
        spec, model = loaded.spec, loaded.model
        blocks = spec.diffusion.block_length
        sampler = sampler.of_model(blocks)
        self.loaded, self.sampler, self.num, self.seed = loaded, sampler, num, seed
        self.device = next(model.parameters()).device
        self.dtype = resolve_precision(precision, self.device)
        self._chats = chats
        self._end_ids = end_token_ids(loaded.tokenizer, sampler.end_tokens)
        conditioned, shift = spec.model.self_conditioned, spec.model.logit_shift
        self._settings = sampler.settings(conditioned, self._end_ids, block_length=blocks, logit_shift=shift)
        self._denoiser = _replayed(loaded, self.device) if sampler.cuda_graphs else model
        if templates_PL is None:
            require_prompt(loaded, None)
            templates_PL = make_model_template(loaded, spec.length)[None]
        self.templates_PL, self.lengths_P = templates_PL, lengths_P
        masked_PL = templates_PL == spec.mask_id
        ends_P = torch.full((len(templates_PL),), templates_PL.shape[1]) if lengths_P is None else lengths_P
        self._starts_P = torch.where(masked_PL.any(1), masked_PL.int().argmax(1), ends_P)
        if blocks is not None:
            _require_nothing_later(masked_PL, ends_P, blocks)
        if sampler.guided_by == "prompt" and sampler.guidance != 1:
            given_PL = ~masked_PL & (torch.arange(masked_PL.shape[1]) < ends_P[:, None])
            given_PL[:, 0] &= templates_PL[:, 0] != loaded.tokenizer.bos_id
            require(bool(given_PL.any()), "sampler.guided_by", "prompt", "label, or samples need a prompt")
        sampler.check_length(int((ends_P - (self._starts_P if sampler.block_start == "prompt" else 0)).max()))
        self._labels_N = _labels(loaded, sampler, torch.arange(len(self)) % num)
        first_hitting = self._settings.kind == "first_hitting"
        self._steps = int(masked_PL.sum(1).max()) if first_hitting else self._settings.steps
        self._largest: int | None = None  # sequences of a batch, after the memory was too small for more

    def __len__(self) -> int:
        return self.num * len(self.templates_PL)

    def key(self) -> dict[str, Any]:
        """Return what the samples depend on, besides the weights."""
        templates = hashlib.sha256(self.templates_PL.numpy().tobytes())
        templates.update(b"" if self.lengths_P is None else self.lengths_P.numpy().tobytes())
        shape = [*self.templates_PL.shape, self.num, self.seed]
        return {"sampler": asdict(self._settings), "label": self.sampler.label, "shape": shape} | {
            "templates": templates.hexdigest(),
            "precision": str(self.dtype),
        }

    def draw(
        self,
        numbers: Sequence[int],
        *,
        batch_size: int | None = None,
        progress: bool = False,
        on_step: StepHook | None = None,
    ) -> Iterator[Result]:
        """Draw the samples `numbers`; yield tokens (n, L) and evaluations (n,) of some of them at a time, in order.

        `batch_size` None takes one that fits into memory. `progress` shows a bar on a terminal. `on_step` is called
        after every step of every batch, in the thread that draws the batch. On a CPU each core draws its own batches:
        one small batch on each of two cores is faster than one batch on both.
        """
        workers = torch.get_num_threads() if self.device.type == "cpu" and self.loaded.is_whole else 1
        size = batch_size or even_batch_size(len(numbers), workers, self._fitting(workers))
        batches = torch.tensor(numbers, dtype=torch.int64).split(size) if numbers else ()
        bar = Progress(transient=True, disable=not (progress and Terminal().is_terminal))
        task = bar.add_task("denoiser evaluations", total=self._steps * len(batches))
        ended = Event()  # after Ctrl-C, or once a failure is taken from the pool, all threads end at their next step

        def stepped(observation: Observation) -> None:
            if ended.is_set():
                raise CancelledError
            bar.advance(task)
            report_progress()
            if on_step is not None:
                on_step(observation)

        def draw(ids_B: Tensor) -> Result:
            drawn = self._draw_fitting(ids_B, stepped)
            tokens_BL = torch.cat([part.tokens.cpu() for part in drawn])
            costs = {"evaluations": "evaluations_B", "positions": "positions_B"}
            counts = {name: torch.cat([getattr(part, of).cpu() for part in drawn]) for name, of in costs.items()}
            # Sums over the batch stand with its first sample, because the ranks exchange columns of samples.
            deviation_B3 = torch.zeros(len(ids_B), 3, dtype=torch.float64)
            deviation_B3[0] = torch.tensor([list(vars(part.deviation).values()) for part in drawn]).double().sum(0)
            columns = {name: column.numpy() for name, column in counts.items()}
            tokens = tokens_BL.int().numpy()
            return ids_B.tolist(), {"tokens": tokens, **columns, "cache_deviation": deviation_B3.numpy()}

        # torch keeps the number of threads per thread: the pool's threads compute on one core, the caller's is
        # unchanged.
        with bar, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield from pool.map(draw, batches)
            finally:
                ended.set()

    def describe(self, columns: Columns, seconds: float) -> GeneratedSamples:
        """Decode all samples, drawn in `seconds`."""
        tokens_NL = torch.from_numpy(columns["tokens"]).long()
        starts_N = self._starts_P[torch.arange(len(self)) // self.num]
        texts, framed = _decoded(self.loaded, tokens_NL, starts_N, self._end_ids, chats=self._chats)
        known = None
        if self._labels_N is not None and int(self._labels_N.min()) != NO_LABEL:
            known = [self.loaded.manifest.labels[label] for label in self._labels_N.tolist()]
        counts = {"counts": columns["evaluations"].tolist(), "positions": columns["positions"].tolist()}
        compared, variation, others = columns["cache_deviation"].sum(0).tolist()
        deviation = CacheDeviation(int(compared), variation, int(others)) if compared else None
        return GeneratedSamples(
            tokens_NL, texts, framed, seconds=seconds, labels=known, cache_deviation=deviation, **counts
        )

    def _fitting(self, workers: int) -> int:
        """Return how many sequences of a batch fit into memory."""
        return fitting_batch_size(
            self.loaded,
            self.device,
            self.dtype,
            self.templates_PL.shape[1],
            workers=workers,
            guided=self._settings.guidance != 1,
            padded=self.lengths_P is not None,
            cached=self._settings.cache != "none",
        )

    def _draw_fitting(self, ids_B: Tensor, on_step: StepHook) -> list[Samples]:
        """Draw a batch, in two halves if the memory is too small for it, as are later batches of this size."""
        size = min(self._largest or len(ids_B), len(ids_B))
        try:
            return [self._draw_batch(part, on_step) for part in ids_B.split(size)]
        except (MemoryError, RuntimeError) as error:
            self._make_room(error, size)
        return self._draw_fitting(ids_B, on_step)

    def _make_room(self, error: Exception, size: int) -> None:
        """Halve later batches after an allocation failed; raise UserError if that was done before."""
        if not is_out_of_memory(error):
            raise error
        # The ranks that share weights are in the middle of an evaluation, which this one cannot begin again.
        if size == 1 or not self.loaded.is_whole or (self._largest is not None and size <= self._largest):
            raise UserError(
                f"{self.device} is out of memory with batch_size={size} and samples of {self.templates_PL.shape[1]} "
                "tokens; set a smaller batch_size, or a smaller length"
            ) from error
        self._largest = -(-size // 2)
        logger.warning("%s is out of memory with batch_size=%d; continuing with %d", self.device, size, self._largest)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _draw_batch(self, ids_B: Tensor, on_step: StepHook) -> Samples:
        spec, labels_N = self.loaded.spec, self._labels_N
        lengths_B = None if self.lengths_P is None else self.lengths_P[ids_B // self.num]
        length = self.templates_PL.shape[1]
        longest = length if lengths_B is None else int(lengths_B.max())
        with compute_context(self.device, self.dtype):
            drawn = sample(
                self._denoiser,
                self.templates_PL[ids_B // self.num, :longest].to(self.device),
                ids_B.to(self.device),
                schedule=spec.schedule,
                settings=self._settings,
                mask_id=spec.mask_id,
                seed=self.seed,
                labels_B=labels_N[ids_B].to(self.device) if labels_N is not None else None,
                lengths_B=None if lengths_B is None else lengths_B.to(self.device),
                on_step=on_step,
            )
        padding = self.loaded.manifest.padding_id
        return replace(drawn, tokens=functional.pad(drawn.tokens, (0, length - longest), value=padding))


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
    """Draw all samples of a `SampleSet` in this process; the other arguments are those of `SampleSet.draw`."""
    samples = SampleSet(
        loaded,
        sampler,
        num=num,
        seed=seed,
        templates_PL=templates_PL,
        lengths_P=lengths_P,
        precision=precision,
        chats=chats,
    )
    started = time.perf_counter()
    drawn = samples.draw(range(len(samples)), batch_size=batch_size, progress=progress, on_step=on_step)
    columns = [part for _, part in drawn]
    whole = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    return samples.describe(whole, time.perf_counter() - started)


def generate_divided(
    samples: SampleSet, *, batch_size: int | None = None, parts: ResultParts | None = None
) -> GeneratedSamples | None:
    """Draw a set of samples, divided over the ranks; returns them on rank 0, None on the other ranks.

    Samples that `parts` holds already are not drawn again. `seconds` is the time of all starts, mean of the ranks. All
    ranks call this together.
    """
    rank, size = joined_world()
    drawing = min(size, len(samples))  # ranks that have samples to draw

    def draw(numbers: Sequence[int]) -> Iterator[Result]:
        started = time.perf_counter()
        for ids, columns in samples.draw(numbers, batch_size=batch_size, progress=rank == 0):
            ended = time.perf_counter()
            yield ids, {**columns, "seconds": np.full(len(ids), (ended - started) / len(ids) / drawing)}
            started = ended
        samples.loaded.await_peers(report_progress)

    # Of each sample, so that they include those of an earlier start. Parts of older versions lack them: another key.
    kept = None if parts is None else parts.of(timed=True, **samples.key())
    columns = compute_divided(len(samples), draw, kept)
    return None if columns is None else samples.describe(columns, float(columns["seconds"].sum()))


def _replayed(loaded: LoadedModel, device: torch.device) -> ReplayedDenoiser:
    if device.type != "cuda":
        raise UserError(f"sampler.cuda_graphs=true needs a CUDA device, not {device.type}; leave it out")
    require(loaded.is_whole, "sampler.cuda_graphs", True, "false with shards above 1")
    return ReplayedDenoiser(loaded.model)


def _require_nothing_later(masked_PL: Tensor, ends_P: Tensor, block_length: int) -> None:
    """Raise UserError for a template with given tokens that no earlier block of the model would see."""
    at_L = torch.arange(masked_PL.shape[1])
    first_P = torch.where(masked_PL.any(1), masked_PL.int().argmax(1), ends_P)
    seen_P = (first_P // block_length + 1) * block_length
    later_PL = ~masked_PL & (at_L >= seen_P[:, None]) & (at_L < ends_P[:, None])
    if bool(later_PL.any()):
        raise UserError(
            f"infill: position {int(later_PL.any(0).int().argmax())} is given, and follows a block with masks, but the "
            f"model predicts blocks of diffusion.block_length={block_length} tokens from left to right and does not "
            "see it; fill in its last block alone, or take a model without blocks"
        )


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
    loaded: LoadedModel, tokens_NL: Tensor, starts_N: Tensor, end_ids: Sequence[int], *, chats: bool
) -> tuple[list[str], list[bool]]:
    """Decode samples, whose generated part begins at `starts_N`, each up to its first end token."""
    tokenizer, rows = loaded.tokenizer, tokens_NL.tolist()
    pairs = list(zip(rows, starts_N.tolist(), strict=True))
    if chats or loaded.manifest.framing == "chats":
        texts = [answer_text(tokenizer, row, at, end_ids) for row, at in pairs]
        padded = loaded.manifest.counts_padding
        return texts, [is_framed_answer(row[at:], tokenizer, end_ids, padded=padded) for row, at in pairs]
    if loaded.manifest.framing == "concatenate":
        return [block_text(row, tokenizer) for row in rows], [is_block(row, tokenizer) for row in rows]
    # [EOS] alone is left to the tokenizer, which may share its id with [BOS].
    texts = [tokenizer.decode(cut_at_end(row, at, end_ids[1:])) for row, at in pairs]
    return texts, [is_framed(row, tokenizer, loaded.manifest.padding_id) for row in rows]
