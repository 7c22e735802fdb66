"""`python -m benchmarks.train_scorer FILE ... --out DIRECTORY`: a causal model of characters for `metrics.scorer`.

Trains a LLaMA of `transformers` on text files (UTF-8), for a corpus without a published scorer of its style. Give it
text that the judged models were not trained on. The weights are stored in bfloat16. The last twentieth of each file is
held out; its perplexity is printed and written to `scorer.json`. The same command continues an interrupted training,
and another one is refused.

Legend: B batch, L length.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scmdm.diffusion.noise import keyed_uniform
from scmdm.system.files import atomic_write_bytes, atomic_write_text, sha256_file

_HELD_OUT = 20  # one of this number of parts
_LOG_EVERY, _KEEP_EVERY = 100, 250
_HEAD = 64  # width of a head
_SETTINGS = ("width", "layers", "length", "batch", "steps", "lr")
_UNKNOWN, _END = "<unk>", "<eos>"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the scorer that the arguments describe."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_scorer")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=1e-3)
    found = parser.parse_args(arguments)
    if found.width < _HEAD or found.width % _HEAD:
        parser.error(f"--width: {found.width} is not a multiple of {_HEAD}, the width of a head")
    texts = [path.read_text() for path in found.files]
    for path, text in zip(found.files, texts, strict=True):
        if len(text) < _HELD_OUT:
            parser.error(
                f"{path} has {len(text)} characters; give files of at least {_HELD_OUT}, of which one is held out"
            )
    held_out = sum(len(text) // _HELD_OUT for text in texts)
    if held_out < found.length:
        parser.error(f"--length: {found.length} is more than the {held_out} characters that are held out of all files")
    settings = {f"--{name}": getattr(found, name) for name in _SETTINGS}
    settings |= {f"hash of file {at}": sha256_file(path) for at, path in enumerate(found.files, start=1)}
    state = found.out / "training.pt"
    for name, kept, given in _differences(state, settings):
        parser.error(
            f"{state} is of a training with {name}={kept}, not {given}; repeat its command, or give another --out"
        )
    tokenizer = character_tokenizer("".join(texts))
    parts = [torch.tensor(tokenizer.encode(text)) for text in texts]
    train_N = torch.cat([part[: -(len(part) // _HELD_OUT)] for part in parts])
    held_out_N = torch.cat([part[-(len(part) // _HELD_OUT) :] for part in parts])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=found.width,
        intermediate_size=4 * found.width,
        num_hidden_layers=found.layers,
        num_attention_heads=found.width // _HEAD,
        max_position_embeddings=found.length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    found.out.mkdir(parents=True, exist_ok=True)
    train(model, train_N, state, settings, length=found.length, batch=found.batch, steps=found.steps, lr=found.lr)
    model.bfloat16().save_pretrained(found.out)
    perplexity = math.exp(held_out_loss(model.float(), held_out_N, found.length))
    tokenizer.save_pretrained(found.out)
    record = {
        "files": [path.name for path in found.files],
        "characters": len(train_N),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "held_out_perplexity": perplexity,
        "steps": found.steps,
    }
    atomic_write_text(found.out / "scorer.json", json.dumps(record, indent=1) + "\n")
    state.unlink(missing_ok=True)
    print(record)


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the characters of a text."""
    vocabulary = {token: index for index, token in enumerate([_UNKNOWN, _END, *sorted(set(text))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=_UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=_UNKNOWN, eos_token=_END)


def _differences(state: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, kept and given value of each setting that is not that of the training in `state`, if there is one."""
    if state.is_file():
        kept = torch.load(state, weights_only=True, mmap=True).get("settings", {})
        for name in [*settings, *(name for name in kept if name not in settings)]:
            if kept.get(name) != settings.get(name):
                yield name, kept.get(name), settings.get(name)


def train(
    model: LlamaForCausalLM,
    tokens_N: Tensor,
    state: Path,
    settings: Mapping[str, Any],
    *,
    length: int,
    batch: int,
    steps: int,
    lr: float,
) -> None:
    """Train on windows at keyed random positions, with AdamW, 200 steps of warm-up and a cosine schedule.

    Weights, moments and settings are kept in the file `state`, from which training goes on.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    started, last, done = len(tokens_N) - length, time.perf_counter(), 0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["step"]
    model.train()
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        first_B = (keyed_uniform(0, "scorer", step, torch.arange(batch), 1)[:, 0] * started).long()
        tokens_BL = tokens_N[first_B[:, None] + torch.arange(length)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens_BL, labels=tokens_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % _LOG_EVERY == 0:
            now = time.perf_counter()
            print(f"step {step + 1}/{steps} loss {loss.item():.4f} {(now - last) / _LOG_EVERY:.2f} s/step", flush=True)
            last = now
        if (step + 1) % _KEEP_EVERY == 0:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            kept |= {"step": step + 1, "settings": dict(settings)}
            buffer = io.BytesIO()
            torch.save(kept, buffer)
            atomic_write_bytes(state, buffer.getvalue())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens_N: Tensor, length: int) -> float:
    """Return the mean loss of consecutive windows, nats per character."""
    model.eval()
    windows = tokens_N[: len(tokens_N) // length * length].view(-1, length)
    losses = [model(input_ids=part, labels=part).loss * len(part) for part in windows.split(64)]
    return float(torch.stack(losses).sum() / len(windows))


if __name__ == "__main__":
    main()
