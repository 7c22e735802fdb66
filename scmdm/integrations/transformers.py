"""Register scmdm models with `transformers`.

After `import scmdm.integrations.transformers`, `AutoModel.from_pretrained` reads directories that `scmdm export RUN OUT
format=hub` or `save_pretrained` wrote.

Legend: B batch, L length, D width, V vocabulary with the mask.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from scmdm.convert.exporter import HUB_TYPE
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import carried_estimate, sample
from scmdm.diffusion.state import State
from scmdm.models.model_files import LoadedModel, ModelSpec, spec_of
from scmdm.models.rotary import Rotary


class MaskedDiffusionConfig(PretrainedConfig):
    """`spec` is a `ModelSpec` as `asdict` gives it."""

    model_type = HUB_TYPE

    def __init__(self, spec: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.spec = spec


@dataclass
class Prediction(ModelOutput):
    """What one denoiser evaluation predicts."""

    logits: Tensor | None = None  # (B, L, V) float32, minus infinity at the mask
    estimate: Tensor | None = None  # (B, L, D): `p @ E` where masked, elsewhere the token's embedding


class MaskedDiffusion(PreTrainedModel):
    """A denoiser, self-conditioned or not."""

    config_class = MaskedDiffusionConfig  # type: ignore[assignment]
    base_model_prefix = "network"
    main_input_name = "input_ids"

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.spec: ModelSpec = spec_of(config.spec or {})
        self.network = self.spec.build().to_empty(device=torch.get_default_device())
        self.post_init()

    @classmethod
    def of(cls, loaded: LoadedModel) -> MaskedDiffusion:
        """From what `scmdm.load` returns; the weights are shared."""
        model = cls(MaskedDiffusionConfig(asdict(loaded.spec)))
        model.network = loaded.model
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Of modules with nothing in the file: the rotary tables are computed."""
        if isinstance(module, Rotary):
            module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        estimate: Tensor | None = None,
        t: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Prediction:
        """Predict the clean tokens of a state (B, L) int64, given the last `estimate`, or none (null).

        `t` (B,) float64 is the noise level, for models with time conditioning; by default the share of masks.
        `labels` (B,) int64 are the sequences' classes, for models that know them (-1: none).
        Logits are of all positions: at those that are not masked the token itself is certain, whatever they say.
        """
        t_B = (input_ids == self.spec.mask_id).double().mean(1) if t is None else t
        h_BLD = self.network.hidden(State(input_ids, t_B, estimate, labels_B=labels))
        next_BLD = carried_estimate(self.network, h_BLD, input_ids, self.spec.mask_id)
        return Prediction(self.network.logits(h_BLD.flatten(0, 1)).unflatten(0, input_ids.shape), next_BLD)

    @torch.no_grad()
    def denoise(
        self,
        input_ids: Tensor,
        settings: SamplerSettings | None = None,
        seed: int = 0,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Fill the masked positions of `input_ids` (B, L) as `scmdm sample` does, row by row, each for its label."""
        carry = self.spec.model.self_conditioned
        return sample(
            self.network,
            input_ids,
            torch.arange(len(input_ids), device=input_ids.device),
            schedule=self.spec.schedule,
            settings=settings or SamplerSettings(kind="ancestral", steps=self.spec.length, carry=carry),
            mask_id=self.spec.mask_id,
            seed=seed,
            labels_B=labels,
        ).tokens


AutoConfig.register(HUB_TYPE, MaskedDiffusionConfig)
AutoModel.register(MaskedDiffusionConfig, MaskedDiffusion)
