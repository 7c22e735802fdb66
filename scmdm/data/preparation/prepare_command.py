"""The command `scmdm prepare`."""

from __future__ import annotations

from pathlib import Path

from scmdm.config.preparation import PrepareConfig
from scmdm.data.manifest import MANIFEST_FILE, Manifest, has_fingerprint, remote_of
from scmdm.data.verification import verify_dataset
from scmdm.errors import UserError
from scmdm.system.terminal import say


def prepare_or_verify(config: PrepareConfig | None, *, verify: Path | None) -> None:
    """Prepare a data set, or check the one at `verify`."""
    if verify is not None:
        _verify(verify)
        return
    if config is None:
        raise UserError("prepare needs a YAML file (see configs/data) or --verify DIR")
    from scmdm.data.preparation.prepare import prepare  # imports torch, which --verify does not need

    prepare(config)


def _verify(root: Path) -> None:
    """Print the problems of a data set, or its sizes. Raises UserError when there are problems."""
    remote, manifest = remote_of(root), Manifest.read(root)
    problems = verify_dataset(root)
    for problem in problems:
        say(problem)
    if problems:
        fetched = f"remove the files, to download them from {remote} again"
        remedy = fetched if remote else "prepare it again with overwrite=true"
        raise UserError(f"{root} has {len(problems)} problem(s); {remedy}")
    if not has_fingerprint(root):
        print(
            f"{root / MANIFEST_FILE} has no fingerprint, because an earlier version wrote it: changes of its values "
            "are not found; prepare again with overwrite=true to have one"
        )
    counts = ", ".join(f"{name} {split.samples}" for name, split in manifest.splits.items())
    cached = f" (the downloaded part of {remote})" if remote else ""
    say(f"{root}{cached} has no problems: {counts} sequences of {manifest.length} tokens")
