"""Progress bars on a terminal, and a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scmdm.system.terminal import Terminal

PLAIN_LINES = 5  # printed per task where there is no terminal


@contextlib.contextmanager
def count_up(title: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show progress of `total` items of work. Yields a function to call with the number of items just completed."""
    console, done = Terminal(), 0
    with Progress(
        *(TextColumn("{task.description}", markup=False), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()),
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
                console.print(f"{title}: {done:,} of {total:,}", soft_wrap=True)

        yield advance


class StepDisplay:
    """Progress bar of training with loss, tokens/s and time left; nothing without a terminal."""

    def __init__(self, console: Terminal, steps: int, done: int) -> None:
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]}  left"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        hidden = console.quiet or not console.is_terminal
        self._progress = Progress(*columns, console=console, disable=hidden)
        self._task = self._progress.add_task("train", total=steps, completed=done, loss="-", rate="-")

    def __enter__(self) -> StepDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, loss: float, tokens_per_s: float) -> None:
        self._progress.update(self._task, advance=1, loss=f"{loss:.4f}", rate=f"{tokens_per_s:,.0f} tokens/s")
