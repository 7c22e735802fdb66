"""Figures of molecules: a grid of structures, and one structure as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rdkit import Chem
from rdkit.Chem import QED, Draw
from rdkit.Chem.Draw import rdMolDraw2D

from scmdm.domains.molecules.metrics import parse_molecule
from scmdm.system.files import atomic_write_bytes

_COLUMNS, _ROWS, _CELL = 8, 3, 180  # of the grid; a cell in pixels
_WIDTH, _HEIGHT, _BOND = 320, 220, 42  # pixels of one structure


def molecule_grid(smiles: Sequence[str], path: Path) -> int:
    """Draw the first distinct valid molecules, with their QED, as a PNG; returns the number drawn."""
    distinct: dict[str, Chem.Mol] = {}
    for molecule in filter(None, map(parse_molecule, smiles)):
        distinct.setdefault(Chem.MolToSmiles(molecule), molecule)
    molecules = list(distinct.values())[: _COLUMNS * _ROWS]
    legends = [f"QED {QED.qed(molecule):.2f}" for molecule in molecules]
    image = Draw.MolsToGridImage(
        molecules or [Chem.MolFromSmiles("")], molsPerRow=_COLUMNS, subImgSize=(_CELL, _CELL), legends=legends or [""]
    )
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    atomic_write_bytes(path, buffer.getvalue())
    return len(molecules)


def molecule_svg(smiles: str) -> str | None:
    """Draw one molecule as an SVG element; None if the SMILES is invalid."""
    molecule = parse_molecule(smiles)
    if molecule is None:
        return None
    canvas = rdMolDraw2D.MolDraw2DSVG(_WIDTH, _HEIGHT)
    canvas.drawOptions().fixedBondLength = _BOND  # type: ignore[assignment]
    rdMolDraw2D.PrepareAndDrawMolecule(canvas, molecule)
    canvas.FinishDrawing()
    svg: str = canvas.GetDrawingText()
    return svg[svg.index("<svg") :]
