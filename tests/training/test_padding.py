"""Padding by batch or sample, and the loss per sample: what counts, and that no division of a batch changes it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from scmdm.config.training import TrainConfig
from scmdm.data.preparation.shard_writer import Description, write_dataset
from scmdm.data.tokenizers import CharacterTokenizer
from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch, stratified_times
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import State
from scmdm.training.padding import own_lengths
from scmdm.training.step import train_step
from scmdm.training.validation import ValidationSet, to_device
from tests.training.test_step import MASK, make

LENGTH, PAD, EOS, BOS = 24, 8, 7, 6
CPU = torch.device("cpu")


def described(policy):
    padding = EOS if policy == "eos" else PAD
    counts = policy in ("loss", "eos")
    ids = {"padding_id": padding, "pad_id": PAD, "eos_id": EOS}
    return SimpleNamespace(pad_policy=policy, counts_padding=counts, bos_policy="given", **ids)


def rows(policy):
    """Answers of 1 to 15 tokens, [EOS] and padding after a prompt of two tokens."""
    dice = torch.Generator().manual_seed(0)
    found = torch.full((64, LENGTH), described(policy).padding_id)
    for i, row in enumerate(found):
        row[0], row[1 : 4 + i % 15], row[4 + i % 15] = BOS, torch.randint(0, 6, (3 + i % 15,), generator=dice), EOS
    return {"tokens": found, "index": torch.arange(64), "given": torch.full((64,), 3)}


def sequences(policy, config, width=LENGTH):
    batch = rows(policy)
    batch["tokens"] = torch.nn.functional.pad(batch["tokens"], (0, width - LENGTH), value=described(policy).padding_id)
    lengths = own_lengths(batch["tokens"], described(policy), config)
    return to_device(batch, described(policy), CPU, lengths_B=lengths)


def trained(policy, micro, steps=2, width=LENGTH, **keys):
    engine, config = make(micro, 0.5)
    config.train.pad_multiple = 4
    for name, value in keys.items():
        setattr(config.train, name, value)
    data = sequences(policy, config.train, width)
    found = [train_step(engine, config, LogLinear(), MASK, data, step) for step in range(steps)]
    return found, list(engine.model.parameters())


@pytest.mark.parametrize("policy", ["loss", "eos", "ignore", "masked"])
@pytest.mark.parametrize("padding", ["length", "batch", "sample"])
@pytest.mark.parametrize("loss_per", ["token", "sample"])
def test_micro_batches_change_neither_loss_nor_update(policy, padding, loss_per):
    one, ours = trained(policy, 64, padding=padding, loss_per=loss_per)
    for micro in (16, 5):
        other, theirs = trained(policy, micro, padding=padding, loss_per=loss_per)
        for a, b in zip(one, other, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.tokens == b.tokens
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["loss", "eos", "ignore", "masked"])
@pytest.mark.parametrize("padding", ["batch", "sample"])
def test_the_length_of_the_data_changes_nothing(policy, padding):
    """The same samples, padded to another length: same noise, same loss."""
    (one, *_), _ = trained(policy, 16, 1, padding=padding)
    (other, *_), _ = trained(policy, 16, 1, padding=padding, width=3 * LENGTH)
    assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.tokens == other.tokens
    short, long = (keyed_uniform(1, "mask", 2, torch.arange(9), n) for n in (7, 20))
    assert torch.equal(short, long[:, :7])


def test_what_counts():
    config = TrainConfig(steps=1, padding="sample", pad_multiple=4)
    ends = 5 + torch.arange(64) % 15  # with [EOS]
    own = (ends + 3) // 4 * 4
    for policy in ("loss", "eos"):
        found = sequences(policy, config)
        assert torch.equal(found.lengths, own)
        assert torch.equal(found.valid.sum(1), own - 3), "padding up to the sample's own length counts"
        config.padding = "batch"
        assert torch.equal(sequences(policy, config).lengths, torch.full((64,), 20))
        assert int(sequences(policy, config).valid.sum()) == 64 * 17, "LLaDA: up to the longest of the batch"
        config.padding = "sample"
    for policy in ("ignore", "masked"):
        assert torch.equal(sequences(policy, config).valid.sum(1), ends - 3)
    assert sequences("ignore", config).maskable is None
    assert torch.equal(sequences("masked", config).maskable.sum(1), own - 3)


def test_masked_padding_is_noised_and_not_in_the_loss():
    """MDLM's LM1B: `nlls = loss * attention_mask`, divided by `attention_mask.sum()`."""
    engine, config = make(64, 0.0)
    data = to_device(rows("masked") | {"given": torch.zeros(64)}, described("masked"), CPU)
    padding = data.tokens == PAD
    assert torch.equal(data.valid | padding, data.maskable) and not (data.valid & padding).any()
    times = stratified_times(config.seed, 0, data.ids, config.diffusion.t_min)
    draws = {"mask_id": MASK, "seed": config.seed, "step": 0, "rate": 0.0}
    noised = noise_batch(data, times, schedule=LogLinear(), **draws)
    masked = noised.z == MASK
    everything = noise_batch(replace(data, valid=data.maskable, maskable=None), times, schedule=LogLinear(), **draws)
    assert torch.equal(noised.z, everything.z) and masked[padding].sum() > 100
    model = engine.model
    logits = model.logits(model.hidden(State(noised.z, times)).flatten(0, 1)).view(64, LENGTH, -1)
    nll = -logits.log_softmax(-1).gather(-1, data.tokens[..., None])[..., 0]
    expected = (torch.where(masked, nll, 0) / times[:, None])[data.valid].sum() / data.valid.sum()
    result = train_step(engine, config, LogLinear(), MASK, data, 0)
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert result.tokens == data.valid.sum() < data.maskable.sum()


def test_a_part_of_a_batch_keeps_what_may_be_masked():
    data = sequences("masked", TrainConfig(steps=1, padding="sample", pad_multiple=4))
    part = data[2:6].cropped()
    assert torch.equal(part.maskable, data.maskable[2:6, : part.tokens.shape[1]])


@pytest.mark.parametrize("padding_is", ["pad", "bos", "eos", "bos-eos"])
@pytest.mark.parametrize("bos_policy", ["given", "loss"])
@pytest.mark.parametrize("pad_policy", ["loss", "eos", "ignore", "masked"])
def test_a_manifest_counts_what_is_valid(tmp_path, pad_policy, bos_policy, padding_is):
    """Also where [BOS] or [EOS] has the id of the padding."""
    tokenizer = CharacterTokenizer("abcdefgh")
    tokenizer.bos_id = tokenizer.pad_id if "bos" in padding_is else tokenizer.bos_id
    tokenizer.eos_id = tokenizer.pad_id if "eos" in padding_is else tokenizer.eos_id
    dice = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 12, (1 + i % 6,), generator=dice).tolist() for i in range(20)]
    samples = [[tokenizer.bos_id, *text, tokenizer.eos_id] for text in texts]
    description = Description("a", 8, pad_policy, bos_policy, {})
    manifest = write_dataset(tmp_path / "a", tokenizer, {"train": samples}, description, shard_bytes=2**20)
    held_out = ValidationSet.at(tmp_path / "a", "train", manifest, len(samples))
    (batch,) = held_out.batches(CPU, size=len(samples))
    assert manifest.splits["train"].tokens == batch.valid.sum()
    counted = 8 * len(samples) if pad_policy in ("loss", "eos") else sum(map(len, samples))
    assert batch.valid.sum() == counted - len(samples) * (bos_policy == "given")


def test_the_end_counts_where_padding_has_its_id():
    """A model's tokenizer without a padding token pads with [EOS], of which the first ends the sample."""
    manifest = described("ignore")
    manifest.pad_id = manifest.padding_id = EOS
    batch = rows("eos")
    assert torch.equal(to_device(batch, manifest, CPU).valid.sum(1), 2 + torch.arange(64) % 15)
    whole = {**batch, "tokens": torch.zeros_like(batch["tokens"])}
    assert to_device(whole, manifest, CPU).valid.sum() == 64 * (LENGTH - 3)


def test_a_micro_batch_is_as_long_as_its_longest_sample():
    config = TrainConfig(steps=1, padding="sample", pad_multiple=4)
    part = sequences("eos", config)[0:3].cropped()
    assert part.tokens.shape == (3, 8) and part.documents is None, "5 to 7 tokens: nothing is hidden"
    part = sequences("eos", config)[0:6].cropped()
    assert part.tokens.shape == (6, 12)
    assert part.documents.sum(1).tolist() == [4, 4, 4, 4, 0, 0]
    assert not part.valid[:4, 8:].any()


def test_all_ranks_agree_on_the_longest():
    config = TrainConfig(steps=1, padding="batch", pad_multiple=1)
    batch = rows("eos")["tokens"]
    found = own_lengths(batch[:3], described("eos"), config, lambda value: max(value, 19))
    assert found.tolist() == [19] * 3 and own_lengths(batch, described("eos"), config).tolist() == [19] * 64


def test_the_loss_per_sample_is_the_mean_of_the_means_of_the_samples():
    (result, *_), _ = trained("ignore", 16, 1, padding="sample", loss_per="sample")
    engine, config = make(16, 0.5)
    config.train.pad_multiple, config.train.padding = 4, "sample"
    data = sequences("ignore", config.train).cropped()
    times = stratified_times(config.seed, 0, data.ids, config.diffusion.t_min)
    draws = {"mask_id": MASK, "seed": config.seed, "step": 0, "rate": 0.5}
    noised = noise_batch(data, times, schedule=LogLinear(), **draws)
    sums = self_conditioned_nelbo(engine.denoiser, noised, LogLinear(), condition=True).weighted_nll_B
    assert result.loss == pytest.approx(float((sums / data.valid.sum(1)).mean()), rel=1e-5)
    assert result.loss != pytest.approx(float(sums.sum() / data.valid.sum()), rel=1e-3)
