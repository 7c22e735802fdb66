"""Replay of evaluations whose shape recurs; CUDA graphs themselves: tests/models/test_gpu.py."""

from pathlib import Path

import pytest
import torch

from scmdm.config.sampling import SamplerConfig
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.errors import UserError
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.ops.cuda_graphs import ReplayedDenoiser
from scmdm.sampling.generation import generate
from scmdm.sampling.model_loading import load

ROOT = Path(__file__).parents[2]
VOCAB, MASK, LENGTH = 12, 11, 16


class Recorder:
    """As a graph: the inputs' memory is fixed, and there is one memory for all results, written by every replay."""

    def __init__(self):
        self.functions, self.replays, self.memory = [], 0, torch.empty(0)

    def __call__(self, function):
        self.functions.append(function)

        def replay():
            self.replays += 1
            result = function()
            self.memory.resize_(result.numel()).copy_(result.flatten())
            return self.memory[: result.numel()].view_as(result)

        return replay


@pytest.fixture
def model():
    config = DiTConfig(width=32, layers=2, heads=2, self_conditioned=True, labels=True, time_conditioning=True)
    model = DiT(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear(), classes=2).eval()
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def draw(denoiser, *, carry, guidance=1.0, batch=4):
    start, ids = torch.full((batch, LENGTH), MASK), torch.arange(batch)
    settings = SamplerSettings(steps=12, carry=carry, guidance=guidance)
    labels = torch.arange(batch) % 2
    return sample(denoiser, start, ids, schedule=LogLinear(), settings=settings, mask_id=MASK, seed=0, labels_B=labels)


@pytest.mark.parametrize(("carry", "guidance"), [(True, 1.0), (True, 2.0), (False, 1.0)])
def test_samples_are_the_same(model, carry, guidance):
    expected = draw(model, carry=carry, guidance=guidance)
    recorder = Recorder()
    replayed = ReplayedDenoiser(model, recorder)
    for batch in (4, 3, 4):
        found = draw(replayed, carry=carry, guidance=guidance, batch=batch)
        assert torch.equal(found.tokens, expected.tokens[:batch])
    assert recorder.replays > 0
    if carry:  # the first step of a batch has no estimate: two shapes for each size, seen once or twice
        assert len(recorder.functions) == 2
        assert recorder.replays == 3 * 11 - 2 * 2


def test_shapes_that_do_not_come_again_are_not_recorded(model):
    recorder = Recorder()
    replayed = ReplayedDenoiser(model, recorder)
    for batch in range(1, 40):
        draw(replayed, carry=False, batch=batch)
    assert len(recorder.functions) == 8


def test_a_cpu_has_no_graphs():
    loaded = load(ROOT / "configs" / "qm9" / "base-model", device="cpu")
    with pytest.raises(UserError, match="cuda_graphs=true needs a CUDA device, not cpu"):
        generate(loaded, SamplerConfig(cuda_graphs=True), num=1, seed=0)


def test_padded_sequences_are_evaluated_without_a_graph(model):
    start = torch.full((3, LENGTH), MASK)
    start[1, 9:] = 0
    options = {"schedule": LogLinear(), "settings": SamplerSettings(steps=12, carry=True), "mask_id": MASK, "seed": 0}
    options |= {"labels_B": torch.zeros(3, dtype=torch.int64), "lengths_B": torch.tensor([LENGTH, 9, LENGTH])}
    denoiser = ReplayedDenoiser(model, Recorder())
    found = sample(denoiser, start, torch.arange(3), **options).tokens
    assert torch.equal(found, sample(model, start, torch.arange(3), **options).tokens)
    assert not denoiser.recorded
