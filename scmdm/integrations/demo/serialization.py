"""Conversion of models and trajectories to JSON, for the demo's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scmdm.data.tokenizers import LevelTokenizer, Tokenizer
from scmdm.domains.domain_registry import domain_of_tokenizer
from scmdm.integrations.demo.trajectory import Frame, Trajectory, best_guess
from scmdm.models.model_files import LoadedModel

Json = dict[str, Any]


def describe_model(name: str, path: str, loaded: LoadedModel) -> Json:
    """Describe a model: name, path, step, and how the page displays its token ids."""
    tokenizer = loaded.tokenizer
    specials = {tokenizer.pad_id: "pad", tokenizer.bos_id: "mark", tokenizer.eos_id: "mark"}
    return {
        "name": name,
        "path": path,
        "carries": loaded.spec.model.self_conditioned,
        "step": loaded.spec.step,
        "domain": domain_of_tokenizer(tokenizer.kind),
        "mask_id": tokenizer.mask_id,
        "specials": {str(i): kind for i, kind in specials.items()},
        "layout": _layout(tokenizer),
    }


def _layout(tokenizer: Tokenizer) -> Json | None:
    """Layout of a picture: the ids after [BOS] are levels, row by row. None if sequences are not pictures."""
    if not isinstance(tokenizer, LevelTokenizer) or tokenizer.kind != "levels":
        return None
    layout = tokenizer.layout
    sizes = {"height": layout.height, "width": layout.width, "channels": layout.channels}
    return {**sizes, "levels": layout.levels, "first_id": tokenizer.vocab_size - layout.levels}


def describe_trajectory(trajectory: Trajectory, tokenizer: Tokenizer) -> Json:
    """Describe a sample: frames, text and cost. `pieces` maps each id in a frame to its text."""
    frames = trajectory.frames
    shown = sorted({i for frame in frames for i in (*frame.tokens, *best_guess(frame))})
    drawings, drawing_of = _drawings(frames, tokenizer)
    generated = trajectory.generated
    return {
        "given": trajectory.given,
        "pieces": dict(zip(map(str, shown), tokenizer.tokens(shown), strict=True)),
        "frames": [_frame(frame, drawn) for frame, drawn in zip(frames, drawing_of, strict=True)],
        "drawings": drawings,
        "text": generated.texts[0],
        "framed": generated.framed[0],
        "evaluations": generated.evaluations,
        "seconds": round(generated.seconds, 2),
    }


def _frame(frame: Frame, drawing: int | None) -> Json:
    rounded = [None if value is None else round(value, 3) for value in frame.entropy]
    return {
        "t": round(frame.t, 4),
        "tokens": frame.tokens,
        "revealed": frame.revealed,
        "entropy": rounded,
        "guess": frame.guess,
        "drawing": drawing,
    }


def _drawings(frames: Sequence[Frame], tokenizer: Tokenizer) -> tuple[list[str], list[int | None]]:
    """Draw the distinct molecules among the frames' best guesses; returns SVGs and each frame's index, or None."""
    if domain_of_tokenizer(tokenizer.kind) != "molecules":
        return [], [None] * len(frames)
    from scmdm.domains.molecules.figures import molecule_svg  # needs RDKit

    smiles = [tokenizer.decode(best_guess(frame)) for frame in frames]
    drawn = {text: svg for text in dict.fromkeys(smiles) if (svg := molecule_svg(text)) is not None}
    places = {text: place for place, text in enumerate(drawn)}
    return list(drawn.values()), [places.get(text) for text in smiles]
