"""Exports of small networks with random weights, for tests of sampling."""

import torch
from safetensors.torch import save_file

from scmdm.checkpoint.seal import seal
from scmdm.config.diffusion import DiffusionConfig
from scmdm.data.tokenizers import CharacterTokenizer
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.dit import DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.model_files import WEIGHTS_FILE, ModelSpec, allocate, write_model_files
from tests.evaluation.test_zero_shot import described

TOKENIZER = CharacterTokenizer("abcdefgh ")
LENGTH = 16


def export(place, *, kind="dit", spread=0.3, block_length=None, pad_policy="ignore", **keys):
    """A model directory at `place`; every parameter is drawn, so that logits depend on tokens and estimate."""
    place.mkdir()
    schema = DecoderConfig if kind == "decoder" else DiTConfig
    config = schema(**{"width": 32, "layers": 2, "heads": 2, "self_conditioned": True, **keys})
    diffusion = DiffusionConfig(block_length=block_length)
    spec = ModelSpec(config, diffusion, TOKENIZER.vocab_size, TOKENIZER.mask_id, LENGTH)
    model = spec.build()
    allocate(model, torch.device("cpu"))
    init_weights(model, 0)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=dice)
    manifest = described(TOKENIZER, pad_policy=pad_policy, length=LENGTH)
    write_model_files(place, spec, manifest, TOKENIZER.save(place.parent))
    save_file({key: value.detach().contiguous() for key, value in model.named_parameters()}, place / WEIGHTS_FILE)
    seal(place)
    return place
