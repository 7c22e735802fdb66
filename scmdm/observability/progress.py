"""Progress of counted work: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINES = 5  # printed per task where there is no terminal


@contextlib.contextmanager
def count_up(title: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields what is to be called with every number that is done: a bar on a terminal, a few plain lines elsewhere."""
    console, done = Console(), 0
    with Progress(
        *(TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as bar:
        task = bar.add_task(title, total=total)

        def advance(count: int) -> None:
            nonlocal done
            before, done = done * PLAIN_LINES // total, done + count
            bar.advance(task, count)
            if shown and not console.is_terminal and done * PLAIN_LINES // total > before:
                console.print(f"{title}: {done:,} of {total:,}", highlight=False, soft_wrap=True)

        yield advance
