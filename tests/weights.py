"""Weights of model directories as dictionaries, and their way into a model."""

import torch

from scmdm.models.model_files import check_fit, iterate_weights


def weights_of(directory, *, weights="ema"):
    """The whole tensors of a model directory by name."""
    return dict(iterate_weights(directory, weights=weights))


def load_weights(model, weights, origin, *, new_conditioner=False):
    """Copy weights into a model; with `new_conditioner`, conditioner and adapters may be missing."""
    expected = dict(model.named_parameters())
    shapes = {name: value.shape for name, value in weights.items()}
    check_fit({n: p.shape for n, p in expected.items()}, shapes, origin, new_conditioner=new_conditioner)
    with torch.no_grad():
        for name, value in weights.items():
            expected[name].copy_(value)
