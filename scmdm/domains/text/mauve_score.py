"""MAUVE (Pillutla et al., NeurIPS 2021, arXiv 2102.01454): divergence between two sets of texts.

Legend: N texts, D width of the scorer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from scmdm.domains.text.causal_scorer import CausalScorer
from scmdm.errors import UserError
from scmdm.system.package_data import optional

_SCALING = 5  # of the divergences, from the paper


def mauve(
    texts: Sequence[str],
    references: Sequence[str],
    scorer: CausalScorer,
    *,
    device: str = "cpu",
) -> float:
    """Area under the divergence curve of generated and human texts, in [0, 1]; 1 for equal distributions.

    Texts are compared in features of the causal model `scorer` (GPT-2 large in the paper). Raises UserError if the
    package is missing, or if either set is empty.
    """
    if not texts or not references:
        raise UserError(
            f"metrics.mauve=true needs samples and held-out texts; there are {len(texts)} and {len(references)}"
        )
    generated, human = (text_features(group, scorer, device=device) for group in (texts, references))
    return mauve_of_features(generated, human)


def mauve_of_features(generated_ND: np.ndarray, human_ND: np.ndarray) -> float:
    """Compute MAUVE of features (N, D) float32, clustered together into N / 10 clusters."""
    found = optional("mauve", "metrics.mauve=true", "text").compute_mauve(
        p_features=human_ND,
        q_features=generated_ND,
        device_id=-1,
        seed=0,
        mauve_scaling_factor=_SCALING,
        verbose=False,
    )
    return float(found.mauve)


@torch.no_grad()
def text_features(
    texts: Sequence[str], scorer: CausalScorer, *, device: str = "cpu", batch_size: int = 16
) -> np.ndarray:
    """Last hidden state (N, D) float32 of the scorer at the last token of each text; zeros for an empty text."""
    model, tokenizer = scorer.model.to(device), scorer.tokenizer
    rows = [tokenizer(text, truncation=True, max_length=scorer.length)["input_ids"] for text in texts]
    features_ND = np.zeros((len(texts), model.config.hidden_size), np.float32)
    order = sorted((index for index, row in enumerate(rows) if row), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        lengths = torch.tensor([len(rows[index]) for index in chosen], device=device)
        longest = int(lengths.max())
        ids_NL = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in chosen], device=device)
        present_NL = (torch.arange(longest, device=device) < lengths[:, None]).long()
        hidden = model(input_ids=ids_NL, attention_mask=present_NL, output_hidden_states=True).hidden_states[-1]
        last_ND = hidden[torch.arange(len(chosen), device=device), lengths - 1]
        features_ND[chosen] = last_ND.float().cpu().numpy()
    return features_ND
