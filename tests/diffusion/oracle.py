"""An exact denoiser of a tiny joint distribution, and exact enumeration for comparison.

Legend: B batch, L length, V vocabulary (the mask is its last id), D = V: a hidden state is a row of log-probabilities.
"""

import itertools

import torch


class Oracle:
    """Exact conditionals of a joint distribution over V-1 tokens at L positions; a token's embedding is its one-hot."""

    def __init__(self, length=3, tokens=3, seed=0):
        self.length, self.tokens, self.mask_id, self.vocab = length, tokens, tokens, tokens + 1
        self.sequences = torch.tensor(list(itertools.product(range(tokens), repeat=length)))
        generator = torch.Generator().manual_seed(seed)
        self.joint = torch.softmax(2 * torch.randn(len(self.sequences), generator=generator, dtype=torch.float64), 0)
        self.evaluations = 0
        self.estimates, self.times = [], []

    def conditionals(self, z_BL):
        """`p(x_l = v | visible tokens)` (B, L, V) with zero for the mask."""
        agrees = ((self.sequences[None] == z_BL[:, None]) | (z_BL[:, None] == self.mask_id)).all(2)
        weights = self.joint * agrees
        one_hot = torch.nn.functional.one_hot(self.sequences, self.vocab).double()
        marginal = torch.einsum("bs,slv->blv", weights, one_hot)
        return marginal / weights.sum(1)[:, None, None]

    def hidden(self, state):
        self.evaluations += 1
        self.estimates.append(state.estimate_BLD)
        self.times.append(state.t_B)
        return self.conditionals(state.z_BL).log()

    def logits(self, h_ND):
        return h_ND.float()

    def expected_embedding(self, h_ND):
        return h_ND.exp()

    def embed(self, ids):
        return torch.nn.functional.one_hot(ids, self.vocab).double()

    def estimate(self, state, *, dropout=False):
        masked = (state.z_BL == self.mask_id)[..., None]
        return torch.where(masked, self.conditionals(state.z_BL), self.embed(state.z_BL))

    def weighted_nll(self, state, x_BL, weight_BL):
        probability = self.conditionals(state.z_BL).gather(2, x_BL[..., None]).squeeze(2)
        nll = torch.where(state.z_BL == self.mask_id, -probability.log(), 0.0)
        return (nll * weight_BL).sum(), nll
