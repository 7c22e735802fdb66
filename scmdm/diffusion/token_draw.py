"""Drawing of tokens from logits, and confidence of predictions.

Legend: N positions, V vocabulary with the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scmdm.diffusion.fused import fused

_NO_CONFIDENCE = -1e9  # finite, to stay above positions that are not candidates
_COLDEST = 1e-200  # float32 differences divided by it decide a draw, and float32 numbers do not overflow


def draw_tokens(
    logits_NV: Tensor,
    uniform_NV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    top_p_first: bool = False,
    top_p_rule: str = "reaching",
    gumbel: str = "float64",
) -> Tensor:
    """Draw tokens (N,) by Gumbel-max from `softmax(logits / temperature)`, restricted to `top_k` and then to `top_p`.

    `top_p_first` exchanges the two restrictions, and `top_p_rule` is that of `nucleus`.

    The noise is float64 by default: a float32 uniform has 24 bits, which truncates the Gumbel tail and lowers the
    effective temperature (arXiv 2409.02908). Temperature 0 takes the most probable token.
    """
    if temperature == 0:
        return logits_NV.argmax(1)
    scaled_NV = shape_logits(logits_NV, temperature, top_k, top_p, top_p_first, top_p_rule)
    if gumbel == "float32":
        return _race_in_float32(scaled_NV.softmax(1), uniform_NV)
    return _largest(scaled_NV, uniform_NV)


def draw_tokens_or_mask(
    logits_NV: Tensor,
    uniform_NV: Tensor,
    reveal_N: Tensor,
    mask_id: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
    top_p_first: bool,
    top_p_rule: str,
) -> Tensor:
    """Draw a token or the mask (N,) in one float32 race, as MDLM's code does (arXiv 2406.07524).

    A token's weight is its probability, shaped as in `draw_tokens`, times `reveal_N`; that of the mask is
    `1 - reveal_N`. A small weight among many wins too rarely, because the noise of a float32 uniform ends at 2^-24: the
    draw also reveals less than `reveal_N` says.
    """
    if temperature == 0:
        p_NV = torch.zeros_like(logits_NV, dtype=torch.float64).scatter_(1, logits_NV.argmax(1, keepdim=True), 1.0)
    else:
        scaled_NV = shape_logits(logits_NV, temperature, top_k, top_p, top_p_first, top_p_rule)
        p_NV = scaled_NV.softmax(1)
    weight_NV = p_NV.mul_(reveal_N[:, None])
    weight_NV[:, mask_id] = 1 - reveal_N
    return _race_in_float32(weight_NV, uniform_NV)


def _race_in_float32(weight_NV: Tensor, uniform_NV: Tensor) -> Tensor:
    """Return the winner (N,) of MDLM's form of the Gumbel-max draw, with the 24 bits of a float32 uniform in [0, 1)."""
    u_NV = uniform_NV.mul(2**24).floor_().mul_(2.0**-24).float()
    return (weight_NV.float() / (1e-10 - (u_NV + 1e-10).log())).argmax(1)


@fused
def _largest(scaled_NV: Tensor, uniform_NV: Tensor) -> Tensor:
    return (scaled_NV - (-uniform_NV.log()).log()).argmax(1)


def shape_logits(
    logits_NV: Tensor, temperature: float, top_k: int | None, top_p: float, top_p_first: bool, top_p_rule: str
) -> Tensor:
    """Return float64 logits of the distribution that tokens are drawn from; temperature 0 does not scale."""
    scaled_NV = logits_NV.double() / (max(temperature, _COLDEST) if temperature else 1.0)
    if top_p_first:
        return most_probable(nucleus(scaled_NV, top_p, top_p_rule), top_k)
    return nucleus(most_probable(scaled_NV, top_k), top_p, top_p_rule)


def without(logits_NV: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Set the logits of tokens to minus infinity."""
    if not ids:
        return logits_NV
    return logits_NV.index_fill(1, torch.tensor(ids, device=logits_NV.device), float("-inf"))


def most_probable(logits_NV: Tensor, top_k: int | None) -> Tensor:
    """Set logits outside the `top_k` most probable tokens to minus infinity; ties with the last one are kept."""
    if top_k is None or top_k >= logits_NV.shape[1]:
        return logits_NV
    least_N1 = logits_NV.topk(top_k, dim=1).values[:, -1:]
    return logits_NV.masked_fill(logits_NV < least_N1, float("-inf"))


def nucleus(logits_NV: Tensor, top_p: float, rule: str = "reaching") -> Tensor:
    """Set logits outside the nucleus of most probable tokens to minus infinity.

    "reaching": it is the smallest set of at least the probability `top_p`; "within": the largest one of at most
    `top_p`, or the most probable token (the codes of MDLM and ReMDM).
    """
    if top_p >= 1:
        return logits_NV
    ordered, order = logits_NV.sort(dim=1, descending=True)
    probability = ordered.softmax(1)
    if rule == "within":
        outside = probability.cumsum(1) > top_p
        outside[:, 0] = False
    else:
        outside = probability.cumsum(1) - probability >= top_p
    return logits_NV.masked_fill(outside.gather(1, order.argsort(1)), float("-inf"))


def certainty(kind: str, logits_NV: Tensor, drawn_N: Tensor, *, late_ids: tuple[int, ...] = ()) -> Tensor:
    """Return the confidence (N,) of each prediction, float64; that without a possible token is below all others.

    "confidence": probability of the drawn token (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992); "margin": that
    of the most probable token minus that of the second (arXiv 2502.06768); "entropy": the negative entropy (Dream).
    The tokens `late_ids` have no probability, and a prediction of one of them is below all others.
    """
    p_NV = without(logits_NV, late_ids).double().softmax(1)
    score_N = _certainty(kind, p_NV, drawn_N).nan_to_num(nan=_NO_CONFIDENCE)
    if not late_ids or kind == "confidence":  # their probability is 0
        return score_N
    late_N = torch.isin(drawn_N, torch.tensor(late_ids, device=drawn_N.device))
    return score_N.masked_fill(late_N, _NO_CONFIDENCE)


def _certainty(kind: str, p_NV: Tensor, drawn_N: Tensor) -> Tensor:
    if kind == "confidence":
        return p_NV.gather(1, drawn_N[:, None]).squeeze(1)
    if kind == "margin":
        best_N2 = p_NV.topk(2, dim=1).values
        return best_N2[:, 0] - best_N2[:, 1]
    assert kind == "entropy", kind
    return -torch.special.entr(p_NV).sum(1)


def most_certain(score_BL: Tensor, candidates_BL: Tensor, count_B: Tensor) -> Tensor:
    """Return a mask (B, L) of the `count_B` candidates per row with the highest scores; ties go to the first."""
    score_BL = score_BL.masked_fill(~candidates_BL, float("-inf"))
    rank_BL = score_BL.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return candidates_BL & (rank_BL < count_B[:, None])


def perturbed(score_BL: Tensor, uniform_BL: Tensor, temperature: float) -> Tensor:
    """Add Gumbel noise to scores divided by `temperature`.

    The positions with the largest results are a draw without replacement from `softmax(score / temperature)`.
    """
    return score_BL / max(temperature, _COLDEST) - (-uniform_BL.log()).log()


def count_confident(score_BL: Tensor, candidates_BL: Tensor, threshold: float) -> Tensor:
    """Return how many candidates (B,) have a score of at least `threshold`: at least one (Fast-dLLM, 2505.22618)."""
    count_B = (candidates_BL & (score_BL >= threshold)).sum(1)
    return torch.where(candidates_BL.any(1), count_B.clamp(min=1), count_B)


def count_by_factor(score_BL: Tensor, candidates_BL: Tensor, factor: float) -> Tensor:
    """Return how many candidates (B,) Fast-dLLM's factor rule reveals (arXiv 2505.22618, section 3.3).

    The n most confident ones, of probabilities `c_1 >= c_2 >= ...`, are revealed while `(n + 1) (1 - c_n) <= factor`,
    and at least one. As in the published code, the last candidate is revealed with all the others.
    """
    total_B = candidates_BL.sum(1)
    ordered_BL = score_BL.masked_fill(~candidates_BL, float("-inf")).sort(dim=1, descending=True).values
    rank_L = torch.arange(score_BL.shape[1], dtype=torch.float64, device=score_BL.device)
    fails_BL = (ordered_BL < 1 - factor / (rank_L + 2)) & (rank_L > 0)
    count_B = torch.where(fails_BL.any(1), fails_BL.int().argmax(1), total_B).minimum(total_B)
    return torch.where(count_B == total_B - 1, total_B, count_B)
