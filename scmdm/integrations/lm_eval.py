"""Evaluation of scmdm models in EleutherAI's lm-evaluation-harness.

`python -m scmdm.integrations.lm_eval` is the harness's command line with an additional model, `scmdm`. Under torchrun
the harness divides the documents of each task over the ranks.

Legend: B batch, L length.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from scmdm.config.common import resolve_weights_dtype
from scmdm.config.fields import require
from scmdm.config.loading import read_config
from scmdm.config.sampling import SamplerConfig
from scmdm.data.tokenizers import OwnFraming, UnknownSymbol
from scmdm.data.tokenizers.chat_template import Turn, UnusableChat, marked_parts
from scmdm.diffusion.cached_windows import CacheDeviation
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.distributed.engine import compute_context, resolve_device, resolve_precision
from scmdm.errors import UserError
from scmdm.evaluation.zero_shot import encode_text
from scmdm.integrations.harness_likelihood import ContinuationScorer, Piece, request_key, windows
from scmdm.integrations.harness_options import WHERE, HarnessOptions, read_options
from scmdm.sampling.batch_size import fitting_batch_size
from scmdm.sampling.end_tokens import answer_text, end_token_ids
from scmdm.sampling.model_loading import LONGEST_COLLECTIVE, load
from scmdm.sampling.templates import pad_templates
from scmdm.system.process_group import current_world, gather_object, joined_world, process_group

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise ImportError(f"{error}; pip install 'scmdm[lm-eval]'") from error

_STATES = 32  # masked states per request in a batch
_SAMPLER: dict[str, Any] = {"kind": "confidence", "steps": 64}  # LLaDA's order of tokens
T = TypeVar("T")


@dataclass(frozen=True)
class _Prompt:
    """Request for generated text."""

    request: int
    context: list[int]
    max_new_tokens: int  # tokens to generate
    until: list[str]  # strings that end the text
    sampler: SamplerConfig
    draw_key: int  # key of the random draws
    cut: bool  # whether the beginning of the context is left out
    shorter: bool  # whether `max_new_tokens` is smaller than the task's


@register_model("scmdm")
class MaskedDiffusionLM(TemplateLM):
    """A scmdm model in the harness, on one device of each rank. Results do not depend on the number of ranks.

    Args:
        path: run directory, checkpoint or exported model.
        device: "cpu", "cuda", or None to use a GPU if there is one.
        **keys: those of `HarnessOptions`, and of `scmdm.config.sampling.SamplerConfig`, which take precedence over a
            task's temperature, top_k and top_p. `carry` also decides whether likelihoods are conditioned on the
            model's own estimate. `batch_size="auto"` takes what fits into memory.

    Raises UserError for an argument out of range, and for a model that does not generate text.
    """

    def __init__(self, path: str, *, device: str | None = None, **keys: Any) -> None:
        super().__init__()
        own = {field.name for field in dataclasses.fields(HarnessOptions)}
        self._options = options = read_options({name: value for name, value in keys.items() if name in own})
        self._given = {name: value for name, value in keys.items() if name not in own}
        for name in ("label", "guidance", "guided_by"):
            if name in self._given:
                raise UserError(f"{name}={self._given[name]!r} is not possible; the harness has no labels: give cfg")
        self._rank, self._world_size = _joined_ranks()
        precision = resolve_weights_dtype(options.weights_dtype, options.precision)
        place = _device_name(device, self._world_size)
        loading = {name: getattr(options, name) for name in ("weights", "weights_dtype", "compile")}
        self._loaded = load(str(path), device=place, **loading)
        if isinstance(self._loaded.tokenizer, OwnFraming):
            raise UserError(f"{path} generates {self._loaded.tokenizer.kind}; give a model of text")
        self._end_ids = end_token_ids(self._loaded.tokenizer, self._sampler({}).end_tokens)
        # A model of conversations was trained on the beginning that its chat template writes.
        has_bos = options.add_bos_token and self._loaded.manifest.framing != "chats"
        self._prefix = [self._loaded.tokenizer.bos_id] if has_bos else []
        if options.gen_length is not None:
            possible = options.gen_length <= self.max_length
            require(possible, "gen_length", options.gen_length, f"at most {self.max_length}, the model's length")
        self._device = next(self._loaded.model.parameters()).device
        self._precision = resolve_precision(precision, self._device)
        states_at_once = self._set_batch_sizes()
        self._scorer = ContinuationScorer(
            self._loaded,
            options,
            self._prefix,
            carry=self._settings(self._sampler({})).carry,
            precision=self._precision,
            states_at_once=states_at_once,
        )

    def _set_batch_sizes(self) -> int:
        """Set the numbers of requests in a batch; returns the number of masked states in one."""
        options, length = self._options, self._loaded.spec.length
        kind = {"guided": options.cfg != 0, "padded": options.tail == "none"}
        fitting = fitting_batch_size(self._loaded, self._device, self._precision, length, **kind)
        self._scored_at_once = options.batch_size or max(1, fitting // _STATES)
        self._generated_at_once = options.batch_size or fitting
        return _STATES * options.batch_size if options.batch_size else fitting

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return this rank's value for every rank.

        The harness gathers numbers of requests, and repeats requests on ranks that have fewer, whose responses would
        count. Ranks that each have the whole model need no equal numbers.
        """
        return tensor.expand(self._world_size)

    def gather_object(self, obj: T, dst: int = 0) -> list[T] | None:
        """Return every rank's object, in rank order, on rank 0; None on the other ranks."""
        assert dst == 0
        return gather_object(obj)

    def barrier(self) -> None:
        """Do nothing. The harness waits after each kind of request, which not all ranks need to have."""

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's cache of requests."""
        return self._loaded.manifest.tokenizer.sha256

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the chat template, for the harness's records. Raises UserError if there is none."""
        if isinstance(chat_template, str):
            raise UserError(f"apply_chat_template={chat_template} is not possible; the tokenizer has one chat template")
        return self._loaded.tokenizer.chat.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in a form that `tok_encode` tells from plain text.

        Without `add_generation_prompt`, the last message is the beginning of the answer. Raises UserError when there is
        no chat template, or when it refuses the conversation.
        """
        turns = [Turn(message["role"], message["content"]) for message in chat_history]
        try:
            return self._loaded.tokenizer.chat.marked(turns, continued=not add_generation_prompt)
        except (UnknownSymbol, UnusableChat) as error:
            raise UserError(f"conversation {turns[-1].content[:60]!r}: {error}") from error

    @property
    def eot_token_id(self) -> int:
        return self._loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._loaded.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of a sequence after [BOS]."""
        return self._loaded.spec.length - len(self._prefix)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, without special tokens: [BOS] is added to the sequence later."""
        tokenizer, ids = self._loaded.tokenizer, list[int]()
        for text, is_chat in marked_parts(string):
            ids += tokenizer.chat.encode_text(text) if is_chat else encode_text(tokenizer, text)
        return ids[1:] if self._prefix and ids[:1] == self._prefix else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pieces = []
        for number, (_texts, context, ids) in enumerate(requests):
            known = context[1:] if context[:1] == [self.prefix_token_id] else context
            pieces += [Piece(number, *window) for window in windows(known, ids, self.max_length)]
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        for group in self._groups(pieces, lambda own: own.length, disable_tqdm, self._scored_at_once):
            for piece, nll, agrees in zip(group, self._scorer.nll(group), self._scorer.greedy(group), strict=True):
                totals[piece.request] -= nll
                greedy[piece.request] &= agrees
        return list(zip(totals, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, without context."""
        pieces = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pieces += [Piece(number, *window) for window in windows([], ids, self.max_length)]
        totals = [0.0] * len(requests)
        for group in self._groups(pieces, lambda own: own.length, disable_tqdm, self._scored_at_once):
            for piece, nll in zip(group, self._scorer.nll(group), strict=True):
                totals[piece.request] -= nll
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations drawn by the sampler, up to the first end token and the first of the strings in `until`."""
        seen: Counter[str] = Counter()  # earlier equal requests of a document; a rank has all requests of its documents
        prompts = []
        for number, request in enumerate(requests):
            context, options = request.args
            same = repr((request.doc_id, request.args))
            draw = (seen[same],) if request.doc_id is None else (seen[same], request.doc_id)
            prompts.append(self._prompt(number, context, normalize_gen_kwargs(options), draw))
            seen[same] += 1
        self._report_shortened(prompts)
        texts = [""] * len(requests)
        size, self._deviation = self._generated_at_once, CacheDeviation()
        for group in self._groups(prompts, lambda own: repr(own.sampler), disable_tqdm, size, order=_prompt_length):
            for prompt, text in zip(group, self._generate(group), strict=True):
                texts[prompt.request] = text
        if self._deviation.positions:
            cache = self._sampler({}).cache
            print(f"rank {self._rank}: cache={cache} against none: {self._deviation.describe()}", file=sys.stderr)
        return texts

    def _report_shortened(self, prompts: Sequence[_Prompt]) -> None:
        """Print how many contexts are cut, and how many texts are shorter than their task allows."""
        cut, shorter = sum(prompt.cut for prompt in prompts), sum(prompt.shorter for prompt in prompts)
        half = self._loaded.spec.length // 2
        for number, what in (
            (cut, "contexts do not fit into the model's length and are cut on the left"),
            (shorter, f"texts have {half} tokens instead of the task's max_gen_toks; give gen_length for more"),
        ):
            if number:
                print(f"rank {self._rank}: {number} of {len(prompts)} {what}", file=sys.stderr)

    def _sampler(self, options: dict[str, Any]) -> SamplerConfig:
        task = {"temperature": options.get("temperature", 0.0), "top_p": options.get("top_p", 1.0)}
        keys = {**_SAMPLER, **task, "top_k": options.get("top_k") or None, **self._given}
        if self._options.cfg:
            keys |= {"guidance": self._options.cfg + 1, "guided_by": "prompt"}
        return read_config(SamplerConfig, keys, WHERE).of_model(self._block_length)

    @property
    def _block_length(self) -> int | None:
        return self._loaded.spec.diffusion.block_length

    def _settings(self, sampler: SamplerConfig) -> SamplerSettings:
        model = self._loaded.spec.model
        return sampler.settings(
            model.self_conditioned, self._end_ids, block_length=self._block_length, logit_shift=model.logit_shift
        )

    def _prompt(self, number: int, context: str, options: Any, draw: tuple[int, ...]) -> _Prompt:
        """Make a request, whose random draws are keyed on `draw`. A long context is cut on the left."""
        ids = self.tok_encode(context)
        wanted = self._options.gen_length or options["max_gen_toks"]
        max_new_tokens = self._options.gen_length or min(wanted, self._loaded.spec.length // 2)
        cut = max(0, len(ids) - (self.max_length - max_new_tokens))
        ids = ids[cut:]
        until = [] if self._options.escape_until else options["until"]
        key, shorter = request_key(ids, *draw), max_new_tokens < wanted
        return _Prompt(number, ids, max_new_tokens, until, self._sampler(options), key, cut > 0, shorter)

    def _groups(
        self,
        items: Sequence[T],
        group_key: Callable[[T], Any],
        quiet: bool,
        size: int,
        order: Callable[[T], int] = lambda _: 0,
    ) -> Iterator[list[T]]:
        """Yield batches of at most `size` items that have the same `group_key`, those of a similar `order` together."""
        with tqdm(total=len(items), disable=quiet or self._rank != 0) as bar:
            ordered = sorted(items, key=lambda item: (group_key(item), order(item)))
            for _, same in itertools.groupby(ordered, group_key):
                while group := list(itertools.islice(same, size)):
                    yield group
                    bar.update(len(group))

    def _generate(self, group: Sequence[_Prompt]) -> list[str]:
        """Generate the text of each prompt."""
        spec, tokenizer, sampler = self._loaded.spec, self._loaded.tokenizer, group[0].sampler
        templates = []
        for prompt in group:
            row, tail = self._scorer.row(prompt.context, prompt.max_new_tokens)
            templates.append(row.masked_fill(tail, spec.mask_id))
        templates_BL, lengths_B = pad_templates(templates, self._loaded.manifest.padding_id)
        from_prompt = sampler.block_start == "prompt"
        starts = [len(self._prefix) + len(prompt.context) for prompt in group]
        sampler.check_length(max(len(row) - from_prompt * at for row, at in zip(templates, starts, strict=True)))
        with compute_context(self._device, self._precision):
            drawn = sample(
                self._loaded.model,
                templates_BL.to(self._device),
                torch.tensor([prompt.draw_key for prompt in group], device=self._device),
                schedule=spec.schedule,
                settings=self._settings(sampler),
                mask_id=spec.mask_id,
                seed=self._options.seed,
                lengths_B=lengths_B.to(self._device) if self._options.tail == "none" else None,
            )
        self._deviation += drawn.deviation
        texts = []
        for prompt, at, row_L in zip(group, starts, drawn.tokens.tolist(), strict=True):
            text = answer_text(tokenizer, row_L[: at + prompt.max_new_tokens], at, self._end_ids)
            texts.append(_cut(text, prompt.until))
        return texts


def _joined_ranks() -> tuple[int, int]:
    """Return rank and number of the processes. Raises UserError outside of their process group."""
    rank, size = joined_world()
    if size != (started := current_world().size):
        raise UserError(
            f"WORLD_SIZE={started}, but the model was made outside of a process group; start the harness with "
            "`torchrun ... -m scmdm.integrations.lm_eval`, or call torch.distributed.init_process_group first"
        )
    return rank, size


def _device_name(device: str | None, ranks: int) -> str:
    """Return the name of the device for `load`.

    The harness's command line passes cuda:0 by default, to all ranks and on machines without a GPU.
    """
    if not device or (device.startswith("cuda") and not torch.cuda.is_available()):
        return "auto"
    return "cuda" if device.startswith("cuda") and ranks > 1 else device


def _prompt_length(prompt: _Prompt) -> int:
    return len(prompt.context) + prompt.max_new_tokens


def _cut(text: str, until: Sequence[str]) -> str:
    """Cut a text before the first occurrence of a string of `until`."""
    return text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]


def main() -> int:
    """Run the harness's command line; returns the exit status."""
    try:
        world = current_world()
        device = resolve_device("auto", world.local_rank)
        with process_group(world, device, needed=False, timeout=LONGEST_COLLECTIVE, heartbeat=True):
            cli_evaluate()
    except UserError as error:
        print(f"scmdm: error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
