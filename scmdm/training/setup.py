"""Build model, optimizer and engine from a configuration, a data set and optionally a base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from scmdm.checkpoint.train_state import TrainState
from scmdm.config.fields import OnAdapt, renamed_keys, walk_keys
from scmdm.config.loading import flatten, replace_sections
from scmdm.config.model import default_model
from scmdm.config.run import RunConfig
from scmdm.config.stored import StoredConfig, read_stored_config
from scmdm.config.training import TrainConfig
from scmdm.data.loader import canonical_nodes, shuffle_block_of
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture
from scmdm.distributed.deepspeed import DeepspeedEngine, partition, require_deepspeed, shard_rows
from scmdm.distributed.engine import Engine, SingleEngine
from scmdm.distributed.fsdp import FsdpEngine, make_expert_mesh, make_mesh, shard
from scmdm.errors import UserError
from scmdm.models.compilation import compile_model
from scmdm.models.decoder_config import BALANCE_KEYS
from scmdm.models.experts.expert_parallel import expert_ranks_refused
from scmdm.models.experts.router import attach_record
from scmdm.models.initialization import init_weights
from scmdm.models.legacy import upgrade_model_keys
from scmdm.models.linear import multiply_in_fp8
from scmdm.models.lora import freeze, is_added
from scmdm.models.model_files import ModelSpec, StoredModel, allocate, fill_weights, match_weights, validate_spec
from scmdm.models.network import Network
from scmdm.observability.run_metrics import logger
from scmdm.system.process_group import World, machine_count
from scmdm.training.optimizer import lr_factor, make_optimizer


def resolve_config(config: RunConfig, base: StoredModel | None) -> RunConfig:
    """Set keys that follow from others: the conditioner from the rate, an adaptation's architecture from its base.

    Raises UserError when the configuration contradicts the base's architecture or process.
    """
    conditioned = config.self_conditioning.rate > 0
    if config.model.self_conditioned and not conditioned:
        raise UserError(
            "model.self_conditioned=true is not possible with self_conditioning.rate=0; set the rate above 0"
        )
    if base is None:
        _check_experts(config)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, self_conditioned=conditioned))
    if base.spec.model.self_conditioned and not conditioned:
        raise UserError(
            f"base={base.path} is self-conditioned, and self_conditioning.rate=0 would drop its conditioner; set it "
            "above 0"
        )
    if base.spec.model.lora_rank:
        raise UserError(
            f"base={base.path} has unmerged adapters; merge them with `scmdm export RUN OUT` and set base=OUT"
        )
    if (config.train.last_layers or 0) > base.spec.model.layers:
        raise UserError(
            f"train.last_layers={config.train.last_layers} is not possible; it must be at most "
            f"{base.spec.model.layers}, the number of blocks of base={base.path}"
        )
    given, stored = config.model, base.spec.model
    if type(given) is not type(stored) and given.kind != default_model().kind:
        raise UserError(f"model.kind={given.kind}, but base={base.path} has {stored.kind}; leave the key out")
    resolved = replace_sections(
        config,
        model=dataclasses.replace(_adapted("model", config.model, base), self_conditioned=conditioned),
        diffusion=_adapted("diffusion", config.diffusion, base),
    )
    _check_experts(resolved)
    resolved.check_preset()  # a base with a conditioner decides what is carried, and how it is mixed
    return resolved


def _check_experts(config: RunConfig) -> None:
    """Raise UserError for keys that balance experts without experts, and for gradients through a mixture's estimate."""
    if config.model.experts:
        if not config.self_conditioning.stop_gradient:
            raise UserError(
                "self_conditioning.stop_gradient=false is not possible with model.experts: the passes of the estimate "
                "would count in the balance of the experts; leave it out"
            )
        return
    defaults = type(config.model)()
    for name in BALANCE_KEYS:
        if (value := getattr(config.model, name)) != getattr(defaults, name):
            raise UserError(f"model.{name}={value} is not possible with model.experts=0; leave it out")


def _adapted(section: str, given: Any, base: StoredModel) -> Any:
    """Return the base's section with the keys of `given` that an adaptation may set.

    A null keeps the base's value. Raises UserError unless every other key has its default or the base's value.
    """
    stored: Any = getattr(base.spec, section)
    settable = {OnAdapt.OWN} if base.spec.model.self_conditioned else {OnAdapt.OWN, OnAdapt.CONDITIONER}
    own, defaults = {}, {name: value for name, _, value in walk_keys(type(given)())}
    expected_values = {name: value for name, _, value in walk_keys(stored)}
    for name, rules, value in walk_keys(given):
        expected = expected_values.get(name)
        if rules.on_adapt in settable and name in expected_values:
            if value is not None:
                own[name] = value
        elif value not in (defaults[name], expected):
            raise UserError(f"{section}.{name}={value!r}, but base={base.path} has {expected!r}; leave the key out")
    return dataclasses.replace(stored, **own)


def build_spec(config: RunConfig, manifest: Manifest, base: StoredModel | None) -> ModelSpec:
    """Specify the model to build. Raises UserError if data set, base and configuration do not match."""
    if base is not None and base.spec.vocab_size != manifest.vocab_size:
        raise UserError(
            f"base={base.path} has {base.spec.vocab_size} tokens, but {config.data.label} has {manifest.vocab_size}; "
            "prepare the data with the base's tokenizer, or take another base"
        )
    if base is not None and base.manifest.tokenizer.sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{config.data.label} and base={base.path} have different tokenizers; "
            "prepare the data with the base's tokenizer, or take another base"
        )
    if base is not None and base.spec.length != manifest.length and not config.any_length:
        raise UserError(
            f"{config.data.label} has samples of length {manifest.length}, but base={base.path} was trained at "
            f"length {base.spec.length}; prepare the data with that length, or set any_length=true"
        )
    if base is not None and base.manifest.bos_policy == "given" and manifest.bos_policy == "loss":
        raise UserError(
            f"{config.data.label} has bos_policy=loss, but base={base.path} has never seen [BOS] masked; "
            "prepare the data with bos_policy=given"
        )
    _check_labels(config, manifest, base)
    _check_padding(config, manifest)
    if config.model.logit_shift and config.fsdp.context > 1:  # an adaptation has it from its base
        raise UserError("fsdp.context is not possible with model.logit_shift=true; set it to 1")
    if config.diffusion.block_length is not None and config.fsdp.context > 1:
        raise UserError("fsdp.context is not possible with diffusion.block_length; set it to 1")
    if config.diffusion.block_length is not None and config.train.causal_steps:
        raise UserError("train.causal_steps is not possible with diffusion.block_length; set it to 0")
    for what, number in ((f"the length of {config.data.label}", manifest.length), ("model.heads", config.model.heads)):
        if number % config.fsdp.context:
            raise UserError(f"fsdp.context={config.fsdp.context} is not possible; it must divide {what} = {number}")
    if (reason := expert_ranks_refused(config.model, config.fsdp.experts)) is not None:
        raise UserError(reason)
    classes = len(manifest.labels) if config.model.labels else 0
    spec = ModelSpec(
        config.model, config.diffusion, manifest.vocab_size, manifest.mask_id, manifest.length, classes=classes
    )
    validate_spec(spec)
    return spec


def _check_labels(config: RunConfig, manifest: Manifest, base: StoredModel | None) -> None:
    """Raise UserError if the data's labels do not match model and base, or `train.label_dropout` needs labels."""
    if not config.model.labels:
        rate = config.train.label_dropout
        if rate not in (0, TrainConfig().label_dropout):
            raise UserError(f"train.label_dropout={rate} is not possible with model.labels=false; leave it out")
        return
    if not manifest.labels:
        raise UserError(
            f"model.labels=true, but the samples of {config.data.label} have no labels; prepare data with classes, or "
            "leave the key out"
        )
    if base is not None and base.manifest.labels != manifest.labels:
        raise UserError(
            f"base={base.path} has the labels {', '.join(base.manifest.labels)}, but {config.data.label} has "
            f"{', '.join(manifest.labels)}; prepare data with the base's classes"
        )


def _check_padding(config: RunConfig, manifest: Manifest) -> None:
    """Raise UserError if samples of their own lengths do not match the data or the engine."""
    if config.train.padding == "length":
        return
    if manifest.framing in ("packed", "concatenate"):
        raise UserError(
            f"train.padding={config.train.padding} is not possible with the framing {manifest.framing} of "
            f"{config.data.label}, whose samples are filled; set it to length"
        )
    if config.fsdp.context > 1:
        raise UserError(f"train.padding={config.train.padding} is not possible with fsdp.context; set it to length")


def build_engine(
    config: RunConfig, spec: ModelSpec, base: StoredModel | None, device: torch.device, dtype: torch.dtype
) -> Engine:
    """Build the model, with new weights or the base's, its optimizer and its engine.

    For FSDP2 and ZeRO stage 3 the model is sharded on the meta device, and each rank then fills only its own shards.
    With `self_conditioning.carried_from=base` the engine also gets the frozen base.
    """
    engine = _engine_of_model(config, spec, base, device, dtype)
    if config.copies_base:
        assert base is not None
        engine.add_base(_frozen_base(config, spec, base, device, dtype))
    elif config.self_conditioning.rate > 0 and config.self_conditioning.carried_from == "base":
        engine.add_base(None)
    return engine


def _frozen_base(
    config: RunConfig, spec: ModelSpec, base: StoredModel, device: torch.device, dtype: torch.dtype
) -> Network:
    """Build the base without gradients, computed and sharded as the trained model, in evaluation mode."""
    conditioned = base.spec.model.self_conditioned
    own = dataclasses.replace(spec.model, self_conditioned=conditioned, lora_rank=0, matmul_precision="compute")
    model = dataclasses.replace(spec, model=own).build().requires_grad_(False).eval()
    compile_model(model, config.model.compile)
    offload = config.engine == "fsdp2" and config.fsdp.offload
    if config.engine == "fsdp2":
        _shard(model, config, device, dtype)
    found = match_weights(model, base.path)
    allocate(model, device, weights_on=torch.device("cpu") if offload else None)
    fill_weights(model, found)
    return model


def _engine_of_model(
    config: RunConfig, spec: ModelSpec, base: StoredModel | None, device: torch.device, dtype: torch.dtype
) -> Engine:
    model = spec.build()
    _record_routing(model, config)
    freeze(model, config)
    if config.model.matmul_precision == "fp8":
        multiply_in_fp8(model.blocks, emulated=device.type != "cuda")
    compile_model(model, config.model.compile)
    if config.engine == "fsdp2":
        _shard(model, config, device, dtype)
    zero_3 = config.engine == "deepspeed" and config.deepspeed.stage == 3
    if zero_3:
        shard_rows(model, device)
    offload = config.engine == "fsdp2" and config.fsdp.offload
    found = match_weights(model, base.path, new_conditioner=True) if base is not None else None
    allocate(model, device, weights_on=torch.device("cpu") if offload else None)
    if found is None:
        init_weights(model, config.seed)
    else:
        init_weights(model, config.seed, only=is_added)
        fill_weights(model, found)
    if zero_3:
        partition(model, config, device, dtype)
    optimizer = make_optimizer(model, config.optimizer)
    if config.engine == "single":
        return SingleEngine(model, optimizer, device, dtype)
    if config.engine == "deepspeed":
        return DeepspeedEngine(model, optimizer, device, dtype, config)
    return FsdpEngine(model, optimizer, device, dtype, config.fsdp)


def _shard(model: Network, config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    experts = make_expert_mesh(config.fsdp, device)
    shard(model, make_mesh(config.fsdp, device), dtype, offload=config.fsdp.offload, experts=experts)


def _record_routing(model: Network, config: RunConfig) -> None:
    """Let the routers of a model with experts record their decisions in training."""
    own = config.model
    record = attach_record(model, balance_loss=own.router_loss, z_loss=own.router_z_loss)
    if record is not None and config.engine == "deepspeed":
        raise UserError("engine=deepspeed is not possible with model.experts; use engine=fsdp2")
    if own.router_loss and config.fsdp.context > 1:
        raise UserError(
            "fsdp.context is not possible with model.router_loss, which balances whole sequences; set it to 1, or use "
            "model.router_bias=true"
        )


def resolve_engine(config: RunConfig, world: World) -> RunConfig:
    """Replace engine=auto by an engine for the number of processes. Raises UserError if the batch cannot be divided."""
    config.check_ranks(world.size)
    engine = config.engine_on(world.size)
    if engine == "deepspeed":
        require_deepspeed()
    if engine == "fsdp2" and config.model.compile == "trunk":
        raise UserError(
            "model.compile=trunk is not possible with engine=fsdp2, which gathers the weights of one block after the "
            "other; use model.compile=block"
        )
    return dataclasses.replace(config, engine=engine)


def resolve_sample_order(config: RunConfig, data: DataMixture, checkpoint: Path | None) -> RunConfig:
    """Set `data.num_canonical_nodes` and `data.shuffle_block` if they are null: a run keeps those of its start."""
    own = config.data
    if checkpoint is not None:
        stored = read_stored_config(checkpoint)
        nodes = own.num_canonical_nodes or stored.get("data.num_canonical_nodes", int)
        block = own.shuffle_block or stored.get("data.shuffle_block", int)
    else:
        nodes = own.num_canonical_nodes or canonical_nodes(data, own.train_split, machine_count())
        chosen = own.num_canonical_nodes is None and nodes > 1
        block = own.shuffle_block or (shuffle_block_of(data, own.train_split, nodes) if chosen else None)
    return dataclasses.replace(config, data=dataclasses.replace(own, num_canonical_nodes=nodes, shuffle_block=block))


def check_same_run(config: RunConfig, checkpoint: Path) -> None:
    """Raise UserError for the first key that differs from the checkpoint's, has an effect, and may not change."""
    renamed = renamed_keys(type(config))
    stored_config = read_stored_config(checkpoint)
    stored = flatten(stored_config.content | {"model": upgrade_model_keys(stored_config.need("model", dict))})
    # A key that the checkpoint lacks is newer than the run, which behaved as with the key's default.
    defaults = flatten(dataclasses.asdict(RunConfig(model=type(config.model)())))
    gone = {name for name, value in config.removed_defaults.items() if stored.get(name) == value}
    before = defaults | {renamed.get(name, name): stored[name] for name in stored if name not in gone}
    now = flatten(dataclasses.asdict(config))
    changeable = {name for name, rules, _ in walk_keys(config) if rules.on_resume}
    for name in sorted((before.keys() | now.keys()) - changeable - config.unused_keys.keys()):
        if before.get(name) != now.get(name):
            raise UserError(
                f"{name}={now.get(name)!r}, but run_dir={config.run_dir} was started with {before.get(name)!r}; "
                "give the old value to resume the run, or another run_dir to start a new one"
            )


def check_dependent_settings(config: RunConfig, checkpoint: Path, state: TrainState) -> None:
    """Raise UserError if a key that may change on resume changes another quantity that the user has not named.

    `train.steps` moves the end of a decaying learning rate, and `train.validation_samples` changes the NELBO of which
    `train.keep_best` keeps the lowest.
    """
    stored = read_stored_config(checkpoint)
    _check_decay(config, stored, state.step)
    samples, before = config.train.validation_samples, stored.get("train.validation_samples", int)
    if config.train.keep_best and state.best_nelbo is not None and before not in (None, samples):
        raise UserError(
            f"train.validation_samples={samples}, but train.keep_best compares with a NELBO of {before} samples at "
            f"step {state.best_step} of run_dir={config.run_dir}; give {before}, or train.keep_best=false"
        )


def _check_decay(config: RunConfig, stored: StoredConfig, step: int) -> None:
    schedule = config.schedule
    before = stored.get("schedule.steps", int) or stored.need("train.steps", int)
    after = schedule.steps or config.train.steps
    if schedule.kind == "constant" or before == after:
        return
    rates = [
        config.optimizer.lr * lr_factor(step, end, dataclasses.replace(schedule, steps=None)) for end in (before, after)
    ]
    change = f"at step {step} the learning rate changes from {rates[0]:.3g} to {rates[1]:.3g}"
    if schedule.steps is None:
        raise UserError(
            f"train.steps={config.train.steps} would move the end of the {schedule.kind} decay of "
            f"run_dir={config.run_dir} from step {before} to {after}: {change}; give schedule.steps={before} to keep "
            f"the decay, or schedule.steps={after} to move its end"
        )
    logger.warning("schedule.steps=%d, but the decay ended at step %d until now: %s", after, before, change)
