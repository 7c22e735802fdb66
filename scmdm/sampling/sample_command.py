"""`scmdm sample`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from scmdm.config.common import resolve_weights_dtype
from scmdm.config.sampling import SampleConfig
from scmdm.domains.interface import GeneratedSamples
from scmdm.sampling.generation import SampleSet, generate_divided
from scmdm.sampling.model_loading import evaluation_ranks, load_as_configured, parts_beside
from scmdm.sampling.sample_files import FRAMED_ONLY, require_sample_format, write_samples
from scmdm.sampling.templates import (
    Prompt,
    make_model_template,
    pad_templates,
    question,
    read_messages,
    read_prompts,
    require_prompt,
)
from scmdm.system.files import require_output_file
from scmdm.system.terminal import printable


def sample_and_print(path: Path, config: SampleConfig) -> None:
    """Draw samples, write them to `config.out` or print their texts, and print their cost."""
    with evaluation_ranks(config):
        generated = run_sampling(path, config)
    if generated is None:
        return
    if config.out is None:
        for text in generated.texts:
            print(printable(text, keep_lines=True) if sys.stdout.isatty() else text)
    place = f" -> {config.out}" if config.out else ""
    fragments = len(generated.framed) - sum(generated.framed)
    if fragments and config.out and Path(config.out).suffix in FRAMED_ONLY:
        place += f", where {fragments} are left out: they are not framed as the data (out=NAME.jsonl keeps all)"
    broken = sum(len((text + "\n").splitlines()) > 1 for text in generated.texts)
    if broken and config.out and Path(config.out).suffix == ".txt":
        place += f", where {broken} take several lines (out=NAME.jsonl keeps samples apart)"
    cost = f"{generated.evaluations} denoiser evaluations each, {generated.seconds:.1f} s"
    if generated.positions is not None:
        cost += f", {max(generated.positions)} token positions each"
    print(f"{len(generated.texts)} samples, {cost}{place}", file=sys.stderr)
    if generated.cache_deviation is not None:
        kind = config.sampler.cache
        print(f"sampler.cache={kind} against none: {generated.cache_deviation.describe()}", file=sys.stderr)


def run_sampling(path: Path, config: SampleConfig) -> GeneratedSamples | None:
    """Draw samples from the model at `path`, divided over the ranks, and write them to `config.out` if it is set.

    Returns them on rank 0, None on the other ranks.
    """
    if config.out is not None:
        require_output_file(Path(config.out))
    prompts = _prompts(config)
    precision = resolve_weights_dtype(config.weights_dtype, config.precision)
    loaded = load_as_configured(path, config)
    if config.out is not None:
        require_sample_format(Path(config.out), loaded.tokenizer)
    require_prompt(loaded, prompts[0] if config.infill is None else config.infill)
    length = config.length or loaded.spec.length
    add_bos, gen_length = config.add_bos_token, config.gen_length
    templates = [
        make_model_template(loaded, length, prompt, config.infill, add_bos=add_bos, gen_length=gen_length)
        for prompt in prompts
    ]
    templates_PL, lengths_P = pad_templates(templates, loaded.manifest.padding_id)
    samples = SampleSet(
        loaded,
        config.sampler,
        num=config.num,
        seed=config.seed,
        templates_PL=templates_PL,
        lengths_P=lengths_P if config.gen_length is not None else None,
        precision=precision,
        chats=isinstance(prompts[0], Sequence) and not isinstance(prompts[0], str),
    )
    parts = parts_beside(Path(config.out), loaded, config) if config.out is not None else None
    generated = generate_divided(samples, batch_size=config.batch_size, parts=parts)
    if generated is not None and config.out is not None:
        write_samples(Path(config.out), generated, loaded.tokenizer)
    if generated is not None and parts is not None:
        parts.remove()
    return generated


def _prompts(config: SampleConfig) -> Sequence[Prompt | None]:
    if config.messages is not None:
        return read_messages(Path(config.messages))
    prompts = read_prompts(Path(config.prompts)) if config.prompts is not None else [config.prompt]
    return [question(prompt) if config.chat and prompt is not None else prompt for prompt in prompts]
