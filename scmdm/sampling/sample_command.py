"""`scmdm sample`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from scmdm.config.sampling import SampleConfig
from scmdm.domains.interface import GeneratedSamples
from scmdm.sampling.generation import generate, load
from scmdm.sampling.sample_files import write_samples
from scmdm.sampling.templates import (
    Prompt,
    make_model_template,
    pad_templates,
    question,
    read_messages,
    read_prompts,
    require_prompt,
)
from scmdm.system.files import require_writable
from scmdm.system.terminal import printable


def sample_and_print(path: Path, config: SampleConfig) -> None:
    """Draw samples, write them to `config.out` or print their texts, and print their cost."""
    generated = run_sampling(path, config)
    if config.out is None:
        for text in generated.texts:
            print(printable(text, keep_lines=True) if sys.stdout.isatty() else text)
    place = f" -> {config.out}" if config.out else ""
    cost = f"{generated.evaluations} denoiser evaluations each, {generated.seconds:.1f} s"
    print(f"{len(generated.texts)} samples, {cost}{place}", file=sys.stderr)


def run_sampling(path: Path, config: SampleConfig) -> GeneratedSamples:
    """Draw samples from the model at `path`, and write them to `config.out` if it is set."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.out is not None:
        require_writable(Path(config.out))
    prompts = _prompts(config)
    loaded = load(path, weights=config.weights, device=config.device, verify=config.verify)
    require_prompt(loaded, prompts[0] if config.infill is None else config.infill)
    length = config.length or loaded.spec.length
    add_bos, gen_length = config.add_bos_token, config.gen_length
    templates = [
        make_model_template(loaded, length, prompt, config.infill, add_bos=add_bos, gen_length=gen_length)
        for prompt in prompts
    ]
    templates_PL, lengths_P = pad_templates(templates, loaded.tokenizer)
    generated = generate(
        loaded,
        config.sampler,
        num=config.num,
        seed=config.seed,
        batch_size=config.batch_size,
        templates_PL=templates_PL,
        lengths_P=lengths_P if config.gen_length is not None else None,
        precision=config.precision,
        progress=True,
        chats=isinstance(prompts[0], Sequence) and not isinstance(prompts[0], str),
    )
    if config.out is not None:
        write_samples(Path(config.out), generated, loaded.tokenizer)
    return generated


def _prompts(config: SampleConfig) -> Sequence[Prompt | None]:
    if config.messages is not None:
        return read_messages(Path(config.messages))
    prompts = read_prompts(Path(config.prompts)) if config.prompts is not None else [config.prompt]
    return [question(prompt) if config.chat and prompt is not None else prompt for prompt in prompts]
