"""The README.md of an export: description, loading, training configuration and architecture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import PurePath

import yaml

from scmdm.config.conversion import ExportConfig
from scmdm.config.model import ModelConfig
from scmdm.config.stored import read_stored_config
from scmdm.convert.importer import field_of
from scmdm.convert.layout import PublishedLayout
from scmdm.models.model_files import StoredModel
from scmdm.models.network import count_parameters
from scmdm.system.run_directory import CONFIG_FILE

_SHOWN = ("base", "self_conditioning", "optimizer", "schedule", "train.steps", "train.global_batch_size", "ema.decay")


def model_card(stored: StoredModel, config: ExportConfig, layout: PublishedLayout | None) -> str:
    """Return Markdown with the front matter of the Hugging Face hub. `layout` is that of a published format."""
    spec, model = stored.spec, stored.spec.model
    adapted = "self-conditioned" if model.self_conditioned else "vanilla"
    front = {"library_name": "scmdm", "tags": ["masked-diffusion", model.kind, adapted]}
    name = " ".join(stored.manifest.name.split())  # a line break would begin a paragraph of its own
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}: {adapted} masked diffusion model",
        _description(stored),
        "## Loading\n\n" + _loading(stored, config, layout),
        "## Training\n\n" + _training(stored),
        "## Architecture\n\n```json\n" + json.dumps(asdict(model), indent=1) + "\n```",
    ]
    if spec.tokens:
        parts.insert(3, f"Trained for {spec.step:,} steps on {spec.tokens:,} tokens in its last run.")
    return "\n\n".join(parts) + "\n"


def _description(stored: StoredModel) -> str:
    spec, manifest = stored.spec, stored.manifest
    parameters = count_parameters(spec.build())
    lines = [
        f"- {parameters:,} parameters, {spec.vocab_size:,} tokens with the mask ({spec.mask_id}), length {spec.length}",
        f"- tokenizer: {manifest.tokenizer.kind}; samples are {manifest.framing}; beginning of a sample: "
        f"{manifest.bos_policy}",
        f"- noise: {spec.diffusion.schedule}, eps {spec.diffusion.eps:g}",
    ]
    if (size := spec.diffusion.block_length) is not None:
        lines.append(
            f"- blocks of {size} tokens, generated from left to right: attention must hide later blocks, which\n"
            "  programs for models without blocks do not do"
        )
    if spec.model.self_conditioned:
        lines.append(
            "- self-conditioned (SCMDM, arXiv 2604.26985): a conditioner feeds each prediction of the clean sequence\n"
            f"  to the next denoising step ({_way_in(spec.model)}); without it the weights are a plain model"
        )
    return "\n".join(lines)


def _way_in(model: ModelConfig) -> str:
    if model.mixing == "interpolated":
        return f"interpolated with the mask by {model.confidence}"
    carried = "last hidden state, " if model.carried == "hidden" else ""
    return carried + model.conditioner + (f", before block {model.inject_layer}" if model.inject_layer else "")


def _loading(stored: StoredModel, config: ExportConfig, layout: PublishedLayout | None) -> str:
    if config.format == "scmdm":
        return '```python\nimport scmdm\n\nloaded = scmdm.load("THIS DIRECTORY")\n```'
    if config.format == "peft":
        return (
            "Low-rank adapters and the conditioner as `peft` writes them; `adapter_config.json` names the base:\n\n"
            '```python\npeft.PeftModel.from_pretrained(scmdm.load("BASE").model, "THIS DIRECTORY")\n```'
        )
    if config.format == "hub":
        return (
            "```python\nimport scmdm.integrations.transformers  # registers the class\n"
            "from transformers import AutoModel\n\n"
            'model = AutoModel.from_pretrained("THIS DIRECTORY")\n```'
        )
    commands = "```bash\nscmdm import THIS_DIRECTORY NEW\nscmdm sample NEW num=8\n```"
    text = f"The weights are in the layout `{config.format}`. With scmdm:\n\n{commands}"
    if stored.spec.model.self_conditioned:
        text += (
            "\n\nThis restores the conditioner from `scmdm/`. Programs that read only the published layout get the "
            "denoiser without self-conditioning."
        )
    note = layout.card_note(stored.spec.model) if layout is not None else ""
    return f"{text}\n\n{note}" if note else text


def _training(stored: StoredModel) -> str:
    """Return the training configuration, if the model comes from a run."""
    if not (stored.path / CONFIG_FILE).is_file():
        origin = stored.manifest.source.get("imported_from")
        return f"Imported from the layout {origin} and not trained since." if origin else "Not recorded in this model."
    run = read_stored_config(stored.path).content
    shown = {key: field_of(run, key) for key in _SHOWN}
    if isinstance(base := shown["base"], str):
        shown["base"] = PurePath(base).name
    return "```yaml\n" + yaml.safe_dump(shown, sort_keys=False) + "```"
