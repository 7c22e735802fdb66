"""The trajectory of one sample: tokens, revealed positions and the carried estimate after each step.

Legend: L length, N masked positions, V vocabulary with the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scmdm.config.fields import require
from scmdm.config.sampling import DenoiseConfig
from scmdm.diffusion.sampler import Observation
from scmdm.domains.interface import GeneratedSamples
from scmdm.errors import UserError
from scmdm.models.model_files import LoadedModel
from scmdm.sampling.generation import generate
from scmdm.sampling.templates import make_model_template, require_prompt

_MOST_SHOWN = 2**22  # tokens of all frames
_CHUNK = 512  # positions whose entropy is computed at once, which bounds memory


@dataclass(frozen=True)
class Frame:
    """The sequence after a step, with the estimate that the next step is conditioned on at masked positions."""

    t: float  # time of the denoiser's input
    tokens: list[int]
    revealed: list[int]  # positions
    entropy: list[float | None]  # of the estimate, in nats; None at positions that are not masked
    guess: list[int | None]  # most probable token of the estimate; None at positions that are not masked


@dataclass(frozen=True)
class Trajectory:
    """A sample and its frames, one per denoiser evaluation."""

    given: list[int]  # initial sequence
    frames: list[Frame]
    generated: GeneratedSamples  # with this sample only


@dataclass
class Recorder:
    """Records the steps of one sample; pass it as `on_step` to `generate`."""

    mask_id: int
    most: int | None = None  # steps that are recorded; with more, sampling ends in a UserError
    frames: list[Frame] = field(default_factory=list)

    def __call__(self, step: Observation) -> None:
        assert len(step.z_BL) == 1, "a Recorder records one sample"
        if len(self.frames) == self.most:
            raise UserError(f"the sample takes more than {self.most} steps; lower sampler.threshold, or raise factor")
        masked_BL = step.z_BL == self.mask_id
        logits_NV = step.logits(masked_BL)
        entropy_N = torch.cat([entropy(part) for part in logits_NV.split(_CHUNK)])
        revealed = step.revealed_BL[0].nonzero().squeeze(1).tolist()
        tokens, masked = step.z_BL[0].tolist(), masked_BL[0].tolist()
        entropies, guesses = iter(entropy_N.tolist()), iter(logits_NV.argmax(1).tolist())
        self.frames.append(
            Frame(
                float(step.t_B[0]),
                tokens,
                revealed,
                [next(entropies) if hidden else None for hidden in masked],
                [next(guesses) if hidden else None for hidden in masked],
            )
        )


def entropy(logits_NV: Tensor) -> Tensor:
    """Entropy (N,) float64 of each row's distribution, in nats."""
    return torch.special.entr(logits_NV.double().softmax(1)).sum(1)


def record(loaded: LoadedModel, config: DenoiseConfig) -> Trajectory:
    """Draw the sample that `scmdm sample MODEL num=1` draws with these keys, and record its trajectory.

    Raises UserError for a prompt that the tokenizer cannot encode, for settings that do not fit the model, and for a
    trajectory too large to show.
    """
    require_prompt(loaded, config.prompt if config.infill is None else config.infill)
    template_L = make_model_template(loaded, loaded.spec.length, config.prompt, config.infill)
    masks = int((template_L == loaded.spec.mask_id).sum())
    most = _MOST_SHOWN // len(template_L)
    if config.sampler.kind == "first_hitting":
        require(masks <= most, "sampler.kind", config.sampler.kind, f"another one for more than {most} tokens")
    elif not config.sampler.adaptive:
        require(config.sampler.steps <= most, "sampler.steps", config.sampler.steps, f"at most {most} for this model")
    recorder = Recorder(loaded.spec.mask_id, most)
    generated = generate(
        loaded, config.sampler, num=1, seed=config.seed, templates_PL=template_L[None], on_step=recorder
    )
    return Trajectory(template_L.tolist(), recorder.frames, generated)


def best_guess(frame: Frame) -> Sequence[int]:
    """Token ids of a frame, with the most probable token of the estimate at each masked position."""
    return [token if guess is None else guess for token, guess in zip(frame.tokens, frame.guess, strict=True)]
