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

    def carried(self, h_BLD, z_BL):
        return torch.where((z_BL == self.mask_id)[..., None], h_BLD.exp(), self.embed(z_BL))

    def embed(self, ids):
        return torch.nn.functional.one_hot(ids, self.vocab).double()

    def lower(self, state, *, dropout=False):
        return None

    def estimate(self, state, *, dropout=False):
        masked = (state.z_BL == self.mask_id)[..., None]
        return torch.where(masked, self.conditionals(state.z_BL), self.embed(state.z_BL))

    def weighted_nll(self, state, x_BL, weight_BL):
        probability = self.conditionals(state.z_BL).gather(2, x_BL[..., None]).squeeze(2)
        nll = torch.where(state.z_BL == self.mask_id, -probability.log(), 0.0)
        return (nll * weight_BL).sum(), nll


class BlockOracle(Oracle):
    """Exact conditionals of each block given its visible tokens and the tokens of earlier blocks, and no others."""

    def __init__(self, block_length, **keys):
        super().__init__(**keys)
        self.block_length = block_length

    def hidden(self, state):
        self.evaluations += 1
        self.estimates.append(state.estimate_BLD)
        if state.window is not None:
            return self._hidden_of_window(state)
        return self._block_by_block(state.z_BL, state.z_BL if state.clean_BL is None else state.clean_BL).log()

    def _hidden_of_window(self, state):
        """The tokens of a window are kept in the cache, as keys and values of a layer are."""
        seen, _ = state.window.cache.update(0, state.window, *[state.z_BL[..., None, None]] * 2)
        seen = torch.nn.functional.pad(seen[..., 0, 0], (0, self.length - state.window.end), value=self.mask_id)
        return state.window.cut(self._block_by_block(seen, seen)).log()

    def _block_by_block(self, z_BL, x_BL):
        found = torch.zeros(*z_BL.shape, self.vocab, dtype=torch.float64)
        for start in range(0, self.length, self.block_length):
            own = slice(start, start + self.block_length)
            seen = torch.full_like(z_BL, self.mask_id)
            seen[:, :start], seen[:, own] = x_BL[:, :start], z_BL[:, own]
            found[:, own] = self.conditionals(seen)[:, own]
        return found

    def estimate(self, state, *, dropout=False):
        masked = (state.z_BL == self.mask_id)[..., None]
        return torch.where(masked, self._block_by_block(state.z_BL, state.clean_BL), self.embed(state.z_BL))

    def weighted_nll(self, state, x_BL, weight_BL):
        probability = self._block_by_block(state.z_BL, state.clean_BL).gather(2, x_BL[..., None]).squeeze(2)
        nll = torch.where(state.z_BL == self.mask_id, -probability.log(), 0.0)
        return (nll * weight_BL).sum(), nll
