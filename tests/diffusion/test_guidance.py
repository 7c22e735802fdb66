"""Labels and classifier-free guidance: distributions by exact enumeration, what is carried, what is counted."""

import itertools

import pytest
import torch
from scipy import stats

from scmdm.diffusion.guidance import Guided
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import NO_LABEL, drop_labels
from tests.diffusion.oracle import Oracle

CLASSES = 2


class LabelledOracle(Oracle):
    """Knows the joint of each class, and without a label their mixture."""

    def __init__(self):
        super().__init__(length=3, tokens=3)
        self.joints = [Oracle(length=3, tokens=3, seed=seed).joint for seed in range(1, 1 + CLASSES)]
        self.joints.append(torch.stack(self.joints).mean(0))
        self.seen = []

    def conditionals_of(self, label, z_BL):
        self.joint = self.joints[label]
        return self.conditionals(z_BL)

    def hidden(self, state):
        z_BL = state.z_BL
        labels = [NO_LABEL] * len(z_BL) if state.labels_B is None else state.labels_B.tolist()
        self.seen.append((labels, z_BL, state.estimate_BLD))
        p_BLV = torch.empty(*z_BL.shape, self.vocab, dtype=torch.float64)
        for label in set(labels):
            rows = torch.tensor([at == label for at in labels])
            p_BLV[rows] = self.conditionals_of(label, z_BL[rows])
        return p_BLV.log()


def draw(oracle, labels, guidance, *, n=None, kind="first_hitting", steps=3, carry=False, first_id=0):
    settings = SamplerSettings(kind=kind, steps=steps, guidance=guidance, carry=carry)
    n = len(labels) if n is None else n
    given, ids = torch.full((n, oracle.length), oracle.mask_id), torch.arange(first_id, first_id + n)
    options = {"schedule": LogLinear(), "settings": settings, "mask_id": oracle.mask_id, "seed": 0}
    return sample(oracle, given, ids, labels_B=labels, **options)


def guided_conditional(oracle, state, position, label, guidance):
    z = torch.tensor([state])
    labelled, plain = (oracle.conditionals_of(of, z)[0, position, : oracle.tokens] for of in (label, NO_LABEL))
    weight = labelled**guidance * plain ** (1 - guidance)
    return weight / weight.sum()


def exact(oracle, label, guidance):
    """One token after the other, in every order."""
    orders = list(itertools.permutations(range(oracle.length)))
    found = torch.zeros(len(oracle.sequences), dtype=torch.float64)
    for order in orders:
        for index, sequence in enumerate(oracle.sequences.tolist()):
            state, probability = [oracle.mask_id] * oracle.length, 1.0
            for position in order:
                p = guided_conditional(oracle, state, position, label, guidance)
                probability *= float(p[sequence[position]])
                state[position] = sequence[position]
            found[index] += probability / len(orders)
    return found


def counts(oracle, tokens):
    powers = oracle.tokens ** torch.arange(oracle.length - 1, -1, -1)
    return torch.bincount((tokens * powers).sum(1), minlength=len(oracle.sequences))


@pytest.mark.parametrize(("label", "guidance"), [(0, 1.0), (1, 1.0), (0, 2.0), (1, 0.5), (0, 0.0)])
def test_guided_samples_have_the_exact_distribution(label, guidance):
    oracle, n = LabelledOracle(), 12_000
    expected = exact(oracle, label, guidance)
    joint = oracle.joints[NO_LABEL if guidance == 0 else label]
    assert torch.allclose(expected, joint, atol=1e-9) == (guidance in (0, 1))
    drawn = draw(oracle, torch.full((n,), label), guidance)
    p = stats.chisquare(counts(oracle, drawn.tokens).numpy(), (expected * n).numpy()).pvalue
    assert p > 1e-3
    assert drawn.evaluations == oracle.length * (1 if guidance == 1 else 2)


def test_no_label_is_the_mixture():
    oracle, n = LabelledOracle(), 12_000
    for labels in (None, torch.full((n,), NO_LABEL)):
        found = counts(oracle, draw(oracle, labels, 1.0, n=n).tokens).numpy()
        assert stats.chisquare(found, (oracle.joints[NO_LABEL] * n).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("carry", [False, True])
def test_a_sample_does_not_depend_on_its_batch_and_each_row_has_its_label(carry):
    oracle, labels = LabelledOracle(), torch.arange(64) % CLASSES
    whole = draw(oracle, labels, 3.0, kind="ancestral", steps=4, carry=carry).tokens
    parts = [
        draw(oracle, labels[at : at + 16], 3.0, kind="ancestral", steps=4, carry=carry, first_id=at).tokens
        for at in range(0, 64, 16)
    ]
    assert torch.equal(whole, torch.cat(parts))
    other = draw(oracle, 1 - labels, 3.0, kind="ancestral", steps=4, carry=carry).tokens
    assert not torch.equal(whole, other)


def test_both_predictions_carry_their_own_estimate():
    oracle = LabelledOracle()
    draw(oracle, torch.tensor([0, 1, 0]), 2.0, kind="ancestral", steps=3, carry=True)
    assert oracle.seen[0][2] is None
    for (_, before, _), (labels, z, estimate) in itertools.pairwise(oracle.seen):
        assert labels == [0, 1, 0, NO_LABEL, NO_LABEL, NO_LABEL]
        expected = torch.stack([oracle.conditionals_of(y, row[None])[0] for y, row in zip(labels, before, strict=True)])
        expected = torch.where((z == oracle.mask_id)[..., None], expected, oracle.embed(z))
        torch.testing.assert_close(estimate, expected)


def test_the_mask_stays_impossible():
    oracle = LabelledOracle()
    for guidance in (0.3, 1.0, 4.0):
        view = Guided(oracle, oracle.mask_id, torch.tensor([0]), guidance)
        h = view.hidden(torch.full((1, 3), oracle.mask_id), torch.ones(1), None)
        logits = view.logits(h[0])
        assert logits[:, oracle.mask_id].isneginf().all() and logits[:, : oracle.tokens].isfinite().all()


def test_labels_are_dropped_at_their_rate_by_sample_and_step():
    labels, ids = torch.arange(20_000) % 3, torch.arange(20_000)
    shown = drop_labels(labels, ids, rate=0.1, seed=0, step=5)
    dropped = shown == NO_LABEL
    assert torch.equal(shown[~dropped], labels[~dropped]) and abs(float(dropped.double().mean()) - 0.1) < 0.01
    assert torch.equal(drop_labels(labels[100:], ids[100:], rate=0.1, seed=0, step=5), shown[100:])
    assert not torch.equal(drop_labels(labels, ids, rate=0.1, seed=0, step=6), shown)
    assert torch.equal(drop_labels(labels, ids, rate=0.0, seed=0, step=5), labels)
