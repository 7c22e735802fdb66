"""Small random checkpoints in published layouts, and an independent implementation of MDLM's formulas."""

import json

import omegaconf
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

WORDS = ["<|endoftext|>", *"abcdefghijk"]
VOCAB = len(WORDS) + 1  # with the mask, which GPT-2's tokenizer does not have either
MASK = VOCAB - 1
WIDTH, HEADS, LAYERS, CONDITION, LENGTH = 32, 4, 2, 16, 12


def write_tokenizer(path):
    """A `tokenizer.json` of single letters."""
    pipeline = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    pipeline.decoder = tokenizers.decoders.Fuse()
    pipeline.add_special_tokens(["<|endoftext|>"])
    pipeline.save(str(path))
    return path


def write_texts(path):
    """500 different texts of twelve letters."""
    numbers = range(1, 501)
    texts = ["".join("abcdefghijk"[(n * 7919 // 11**k) % 11] for k in range(12)) for n in numbers]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def mdlm_weights(seed=0, rows=VOCAB):
    """All tensors of a published MDLM checkpoint, in the order of its modules."""
    shapes = {"vocab_embed.embedding": (rows, WIDTH)}
    for index, width in (("0", 256), ("2", CONDITION)):
        shapes |= {f"sigma_map.mlp.{index}.weight": (CONDITION, width), f"sigma_map.mlp.{index}.bias": (CONDITION,)}
    for layer in range(LAYERS):
        block = {
            "norm1.weight": (WIDTH,),
            "attn_qkv.weight": (3 * WIDTH, WIDTH),
            "attn_out.weight": (WIDTH, WIDTH),
            "norm2.weight": (WIDTH,),
            "mlp.0.weight": (4 * WIDTH, WIDTH),
            "mlp.0.bias": (4 * WIDTH,),
            "mlp.2.weight": (WIDTH, 4 * WIDTH),
            "mlp.2.bias": (WIDTH,),
            "adaLN_modulation.weight": (6 * WIDTH, CONDITION),
            "adaLN_modulation.bias": (6 * WIDTH,),
        }
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {
        "output_layer.norm_final.weight": (WIDTH,),
        "output_layer.linear.weight": (rows, WIDTH),
        "output_layer.linear.bias": (rows,),
        "output_layer.adaLN_modulation.weight": (2 * WIDTH, CONDITION),
        "output_layer.adaLN_modulation.bias": (2 * WIDTH,),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    table = 1.0 / (10_000 ** (torch.arange(0, WIDTH // HEADS, 2).float() / (WIDTH // HEADS)))
    weights = {**dict(list(weights.items())[:5]), "rotary_emb.inv_freq": table, **dict(list(weights.items())[5:])}
    return {f"backbone.{name}": value for name, value in weights.items()}


def write_mdlm(directory, weights=None, **config):
    """As on the hub: `config.json`, one safetensors file; and a tokenizer beside them."""
    directory.mkdir()
    described = {
        "model_type": "mdlm",
        "hidden_dim": WIDTH,
        "n_heads": HEADS,
        "n_blocks": LAYERS,
        "cond_dim": CONDITION,
        "dropout": 0.1,
        "model_length": LENGTH,
        "time_conditioning": False,
        "vocab_size": VOCAB,
    }
    (directory / "config.json").write_text(json.dumps({**described, **config}))
    save_file(mdlm_weights() if weights is None else weights, directory / "model.safetensors")
    write_tokenizer(directory / "tokenizer.json")
    return directory


def write_lightning(path, **changes):
    """As Lightning writes MDLM's: hyper-parameters with OmegaConf and tokenizer objects, averages without names."""
    weights = mdlm_weights()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(write_tokenizer(path.parent / "tokenizer.json")))
    config = omegaconf.OmegaConf.create(
        {
            "parameterization": "subs",
            "backbone": "dit",
            "time_conditioning": True,
            "model": {"n_heads": HEADS, "dropout": 0.1, "length": LENGTH},
        }
    )
    shadows = [value for name, value in mdlm_weights(seed=1).items() if not name.endswith("inv_freq")]
    content = {
        "state_dict": weights,
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": shadows},
        "hyper_parameters": {"config": config, "tokenizer": tokenizer},
        "global_step": 7,
    }
    torch.save({**content, **changes}, path)
    return path


def published_logits(weights, ids, sigma):
    """The forward pass of MDLM's DiT (models/dit.py), in evaluation: logits (B, L, V) before SUBS."""
    w = {name.removeprefix("backbone."): value for name, value in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"]

    frequencies = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(128) / 128)
    angles = sigma[:, None] * frequencies
    c = linear(torch.cat([angles.cos(), angles.sin()], -1), "sigma_map.mlp.0")
    c = F.silu(linear(F.silu(c), "sigma_map.mlp.2"))
    turns = torch.outer(torch.arange(ids.shape[1]).float(), w["rotary_emb.inv_freq"])
    turns = torch.polar(torch.ones_like(turns), turns)[:, None]

    def rotated(x):
        half = x.shape[-1] // 2
        pairs = torch.complex(x[..., :half], x[..., half:]) * turns
        return torch.cat([pairs.real, pairs.imag], -1)

    x = w["vocab_embed.embedding"][ids]
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        parts = linear(c, f"{block}.adaLN_modulation")[:, None].chunk(6, -1)
        h = norm(x, f"{block}.norm1") * (1 + parts[1]) + parts[0]
        q, k, v = linear(h, f"{block}.attn_qkv").view(*ids.shape, 3, HEADS, -1).unbind(2)
        scores = torch.einsum("blhk,bmhk->bhlm", rotated(q), rotated(k)) / (WIDTH // HEADS) ** 0.5
        h = torch.einsum("bhlm,bmhk->blhk", scores.softmax(-1), v).flatten(2)
        x = x + parts[2] * linear(h, f"{block}.attn_out")
        h = norm(x, f"{block}.norm2") * (1 + parts[4]) + parts[3]
        x = x + parts[5] * linear(F.gelu(linear(h, f"{block}.mlp.0"), approximate="tanh"), f"{block}.mlp.2")
    shift, scale = linear(c, "output_layer.adaLN_modulation")[:, None].chunk(2, -1)
    return linear(norm(x, "output_layer.norm_final") * (1 + scale) + shift, "output_layer.linear")


def published_update(weights, x, t, s, time_conditioning):
    """MDLM's `_ddpm_update`: q(x_s | x_t) (B, L, V) under its log-linear noise and SUBS, normalised."""
    eps = 1e-3
    sigma_t, sigma_s = (-torch.log1p(-(1 - eps) * torch.tensor(time)) for time in (t, s))
    sigma = sigma_t.expand(len(x)).float() if time_conditioning else torch.zeros(len(x))
    logits = published_logits(weights, x, sigma)
    logits[:, :, MASK] += -1_000_000.0
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    chance_t, chance_s = 1 - torch.exp(-sigma_t), 1 - torch.exp(-sigma_s)
    q = log_p.exp() * (chance_t - chance_s)
    q[:, :, MASK] = chance_s
    return q / q.sum(-1, keepdim=True)
