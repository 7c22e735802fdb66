"""Register scmdm models with `transformers`.

After `import scmdm.integrations.transformers`, `AutoModel.from_pretrained` opens directories written by `scmdm export
RUN OUT format=hub` or by `save_pretrained`.

Legend: B batch, L length, D width, V vocabulary with the mask.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from scmdm.config.sampling import SamplerConfig
from scmdm.convert.exporter import HUB_TYPE
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.state import State
from scmdm.errors import UserError
from scmdm.models.model_files import LoadedModel, ModelSpec, check_fit, spec_of
from scmdm.models.rotary import Rotary
from scmdm.models.safetensors_headers import published_tensors, require_finite_all
from scmdm.system.untrusted import read_json


class MaskedDiffusionConfig(PretrainedConfig):
    """Configuration with one field: `spec`, the `dataclasses.asdict` of a `ModelSpec`."""

    model_type = HUB_TYPE

    def __init__(self, spec: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.spec = spec


@dataclass
class Prediction(ModelOutput):
    """Output of one denoiser evaluation."""

    logits: Tensor | None = None  # (B, L, V) float32, minus infinity at the mask id
    estimate: Tensor | None = None  # condition of the next step, as set by `model.carried` and `model.mixing`


class MaskedDiffusion(PreTrainedModel):
    """A masked diffusion model, self-conditioned or not."""

    config_class = MaskedDiffusionConfig  # type: ignore[assignment]
    base_model_prefix = "network"
    main_input_name = "input_ids"

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.spec: ModelSpec = spec_of(config.spec, f"config.json of {config.name_or_path or 'a model'}, spec")
        self.network = self.spec.build().to_empty(device=torch.get_default_device())
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, output_loading_info: bool = False, **keys: Any) -> Any:
        """See `transformers`. Raises UserError unless the weights are safetensors, complete and finite.

        `transformers` itself only warns of missing and unknown tensors, and initialises the missing ones. Of a local
        directory, names and shapes are compared before memory is taken.
        """
        if Path(name).is_dir():
            cls._check_directory(Path(name))
        keys |= {"use_safetensors": True, "trust_remote_code": False}
        model, found = super().from_pretrained(name, *args, output_loading_info=True, **keys)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[kind]:
                raise UserError(f"{name}: {kind.replace('_keys', '')} tensor {sorted(map(str, found[kind]))[0]}")
        require_finite_all(model.named_parameters(), name)
        return (model, found) if output_loading_info else model

    @classmethod
    def _check_directory(cls, path: Path) -> None:
        """Raise UserError unless the files hold the tensors that `config.json` describes."""
        content = read_json(path / "config.json", remedy="export the model again")
        spec = spec_of(content.get("spec") if isinstance(content, dict) else None, f"{path / 'config.json'}, spec")
        stored = published_tensors(path)
        expected = {f"{cls.base_model_prefix}.{n}": p.shape for n, p in spec.build().named_parameters()}
        check_fit(expected, {name: tensor.shape for name, tensor in stored.items()}, str(path))
        for tensor in stored.values():
            _ = tensor.dtype  # refuses what is not floating-point

    @classmethod
    def of(cls, loaded: LoadedModel) -> MaskedDiffusion:
        """Wrap a model returned by `scmdm.load`; the weights are shared."""
        model = cls(MaskedDiffusionConfig(asdict(loaded.spec)))
        model.network = loaded.model
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Compute the rotary tables, which are not stored in files."""
        if isinstance(module, Rotary):
            module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        estimate: Tensor | None = None,
        t: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Prediction:
        """Predict the clean tokens of partly masked sequences.

        Args:
            input_ids: tokens (B, L) int64, with the mask id at masked positions.
            estimate: `Prediction.estimate` of the previous step; None: no conditioning.
            t: time (B,) float64, for models with time conditioning; by default the fraction of masked positions.
            labels: classes (B,) int64, for models with labels; -1: no label.

        Ignore the logits at positions that are not masked: those tokens stay unchanged.
        """
        if estimate is not None and self.network.block_length is not None:
            raise ValueError("estimate is not possible for a model with diffusion.block_length; call `denoise`")
        t_B = (input_ids == self.spec.mask_id).double().mean(1) if t is None else t
        h_BLD = self.network.hidden(State(input_ids, t_B, estimate, labels_B=labels))
        next_BLD = self.network.carried(h_BLD, input_ids)
        return Prediction(self.network.logits(h_BLD.flatten(0, 1)).unflatten(0, input_ids.shape), next_BLD)

    @torch.no_grad()
    def denoise(
        self,
        input_ids: Tensor,
        settings: SamplerSettings | None = None,
        seed: int = 0,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Fill the masked positions of `input_ids` (B, L) int64, as `scmdm sample` does; returns tokens (B, L).

        By default: ancestral sampling with one step per position. `labels` (B,) int64 are as in `forward`.
        """
        if settings is None:
            model, blocks = self.spec.model, self.spec.diffusion.block_length
            settings = SamplerConfig(steps=self.spec.length).settings(
                model.self_conditioned, block_length=blocks, logit_shift=model.logit_shift
            )
        return sample(
            self.network,
            input_ids,
            torch.arange(len(input_ids), device=input_ids.device),
            schedule=self.spec.schedule,
            settings=settings,
            mask_id=self.spec.mask_id,
            seed=seed,
            labels_B=labels,
        ).tokens


AutoConfig.register(HUB_TYPE, MaskedDiffusionConfig)
AutoModel.register(MaskedDiffusionConfig, MaskedDiffusion)
