"""Small random checkpoints in published layouts, and an independent implementation of MDLM's formulas."""

import json
import warnings

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
    weights = mdlm_weights() if weights is None else weights
    described = {
        "model_type": "mdlm",
        "hidden_dim": WIDTH,
        "n_heads": HEADS,
        "n_blocks": LAYERS,
        "cond_dim": CONDITION,
        "dropout": 0.1,
        "model_length": LENGTH,
        "time_conditioning": False,
        "vocab_size": len(weights.get("backbone.vocab_embed.embedding", range(VOCAB))),
    }
    (directory / "config.json").write_text(json.dumps({**described, **config}))
    save_file(weights, directory / "model.safetensors")
    write_tokenizer(directory / "tokenizer.json")
    return directory


# As in the configurations of MDLM and discrete-diffusion-guidance, which hydra resolves in part before it is saved.
MDLM_RUN = {
    "mode": "train",
    "diffusion": "absorbing_state",
    "backbone": "dit",
    "classifier_backbone": None,
    "parameterization": "subs",
    "time_conditioning": True,
    "T": 0,
    "subs_masking": False,
    "zero_recon_loss": False,
    "is_vision": False,
    "seed": 1,
    "loader": {"global_batch_size": 512, "num_workers": 4},
    "sampling": {"predictor": "ddpm_cache", "steps": 128},
    "training": {"ema": 0.9999, "antithetic_sampling": True, "guidance": None},
    "eval": {"checkpoint_path": "", "generated_samples_path": "${cwd:}/samples.json"},
    "optim": {"lr": 3e-4},
    "trainer": {"devices": "${device_count:}"},
    "wandb": {"project": "text-diffusion", "name": None, "id": "${.name}_${seed}"},
    "hydra": {"run": {"dir": "./outputs/${now:%Y.%m.%d}/${now:%H%M%S}"}},
    "checkpointing": {"save_dir": "${cwd:}", "resume_from_ckpt": True},
    "callbacks": {"checkpoint_monitor": {"monitor": "val/nll"}},
    "data": {"train": "openwebtext", "tokenizer_name_or_path": "gpt2"},
    "model": {
        "name": "small",
        "type": "ddit",
        "hidden_size": WIDTH,
        "cond_dim": CONDITION,
        "length": LENGTH,
        "n_blocks": LAYERS,
        "n_heads": HEADS,
        "scale_by_sigma": True,
        "dropout": 0.1,
        "tie_word_embeddings": False,
    },
    "strategy": {"_target_": "lightning.pytorch.strategies.DDPStrategy"},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "lr_scheduler": {"num_warmup_steps": 2500},
}
# Duo keeps what concerns the algorithm in a section.
_MOVED = ("backbone", "parameterization", "time_conditioning", "T", "subs_masking", "diffusion", "zero_recon_loss")
DUO_RUN = {
    **{key: value for key, value in MDLM_RUN.items() if key not in _MOVED},
    "prior": {"type": "none"},
    "noise": {"type": "log-linear", "eps": 1e-3},
    "algo": {
        "name": "duo",
        "backbone": "dit",
        "parameterization": "mean",
        "time_conditioning": True,
        "T": 0,
        "subs_masking": False,
        "causal_attention": False,
        "loss_type": "elbo",
        "ignore_bos": False,
        "curriculum": {"mode": "simple", "start": 100_000, "end": 200_000},
    },
}


def hydra_config(content):
    """A configuration as hydra hands it on: its resolver `now` has a cache, which was used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of releases that will drop the cache
        omegaconf.OmegaConf.register_new_resolver("now", lambda _: "2026", use_cache=True, replace=True)
    config = omegaconf.OmegaConf.create(content)
    assert config.hydra.run.dir == "./outputs/2026/2026"
    assert config._metadata.resolver_cache["now"]
    return config


def write_lightning(path, run=None, weights=None, **changes):
    """As Lightning writes MDLM's: hyper-parameters with OmegaConf and tokenizer objects, averages without names."""
    weights = mdlm_weights() if weights is None else weights
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(write_tokenizer(path.parent / "tokenizer.json")))
    config = hydra_config(MDLM_RUN if run is None else run)
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
