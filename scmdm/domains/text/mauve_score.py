"""MAUVE (Pillutla et al., NeurIPS 2021, arXiv 2102.01454): how far two sets of texts are apart, both ways.

Legend: N texts, D width of the scorer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from scmdm.domains.text.text_quality import SCORER_LENGTH, check_scorer, load_scorer
from scmdm.errors import UserError

_SCALING = 5  # of the divergences, as in the paper


def check_mauve() -> None:
    """UserError when the package is not there: known before anything is sampled."""
    if importlib.util.find_spec("mauve") is None:
        raise UserError("MAUVE needs the package mauve-text; `pip install mauve-text`, or leave MAUVE out")


def check_measures(scorer: str | None, wanted: bool) -> None:
    """UserError when texts cannot be scored as they are asked to be, with MAUVE if it is `wanted`: known before
    anything is sampled."""
    if scorer is not None:
        check_scorer(Path(scorer))
    if wanted and scorer is None:
        raise UserError("mauve=true needs features of a causal model; give its directory as scorer=...")
    if wanted:
        check_mauve()


def mauve(
    texts: Sequence[str],
    references: Sequence[str],
    scorer: Path,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    seed: int = 0,
) -> float:
    """Area under the divergence curve of generated and human texts, between 0 and 1 (the same distribution).

    Texts are features of the causal model in directory `scorer` (the paper: GPT-2 large). Raises UserError when the
    package or the scorer is not there, or when there are no texts.
    """
    if not texts or not references:
        raise UserError(f"MAUVE compares two sets of texts, and was given {len(texts)} and {len(references)}")
    check_mauve()
    generated, human = (
        text_features(group, scorer, device=device, batch_size=batch_size) for group in (texts, references)
    )
    return mauve_of_features(generated, human, seed=seed)


def mauve_of_features(generated_ND: np.ndarray, human_ND: np.ndarray, *, seed: int = 0) -> float:
    """MAUVE of features (N, D) float32 each, quantised together into a tenth as many clusters as a set has texts."""
    check_mauve()
    from mauve import compute_mauve

    found = compute_mauve(
        p_features=human_ND,
        q_features=generated_ND,
        device_id=-1,
        seed=seed,
        mauve_scaling_factor=_SCALING,
        verbose=False,
    )
    return float(found.mauve)


@torch.no_grad()
def text_features(
    texts: Sequence[str], scorer: Path, *, device: str = "cpu", batch_size: int = 16, max_length: int = SCORER_LENGTH
) -> np.ndarray:
    """The scorer's last hidden state at the last token of each text (N, D) float32; an empty text has zeros."""
    model, tokenizer = load_scorer(scorer)
    model.to(device).eval()
    rows = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
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
