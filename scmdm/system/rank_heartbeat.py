"""Signs of life of a job's ranks, for work in which ranks wait for each other for hours.

There is no time limit on waiting for a rank that computes longer than the others, or for rank 0 with its metrics, as
long as they live. So that a collective does not have to wait, all ranks meet before it (`RankHeartbeat.meet`): they
wait at the launcher's store. Meanwhile a thread of each rank writes a sign of life there every `BEAT_S` seconds. Rank 0
reads those of all ranks, and the others read rank 0's, so that the cost of the others does not grow with the number of
ranks.

A rank without a new sign of life for `SILENCE_LIMIT_S` seconds is dead: its process was killed or stopped, its machine
is gone, or its main thread hung and its watchdog has ended it (`scmdm.runtime.watchdog`). Then all other ranks end with
`LOST_RANK_EXIT`, whatever they do, and name it. A second thread decides this, because the store does not answer while
the process that serves it is stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from scmdm.system.lease import SILENCE_LIMIT_S

BEAT_S = 5.0
LOST_RANK_EXIT = 87  # exit status: another rank of the job is dead
_FIRST_BEAT_S, _GROWTH = 0.05, 0.1  # of a rank that waits: the longer it has waited, the longer until it asks again
_NEWS_S = 600.0  # between lines in the log about ranks that are waited for

logger = logging.getLogger("scmdm")


@dataclass(frozen=True)
class Beat:
    """A sign of life of a rank."""

    number: int
    met: int  # calls of `meet` by the rank; of rank 0: those that all ranks have made
    host: str
    lost: tuple[int, ...] = ()  # ranks that rank 0 has found dead

    def encode(self) -> str:
        """Return the text that the store holds."""
        return f"{self.number} {self.met} {self.host} {','.join(map(str, self.lost))}"

    @staticmethod
    def decode(text: bytes) -> Beat:
        """Read `encode`'s text."""
        number, met, host, lost = text.decode().split(" ")
        return Beat(int(number), int(met), host, tuple(map(int, filter(None, lost.split(",")))))


class RankHeartbeat:
    """Context manager: the signs of life of this rank while the block runs, and its meetings with the other ranks.

    `store` is a connection of its own to the job's store: another thread that waits there would block it. All ranks
    enter the block together.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._host = socket.gethostname().replace(" ", "")
        self._peers = list(range(1, size)) if rank == 0 else [0]
        self._found: dict[int, Beat] = {}  # newest sign of life of each peer
        self._beats = self._met = self._opened = 0
        self._lost: tuple[int, ...] = ()
        self._waits_since: float | None = None
        self._news, self._stop = threading.Condition(), threading.Event()
        self._ask = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("heartbeat", self._beat), ("rank liveness", self._watch))
        ]

    def __enter__(self) -> RankHeartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._ask.set()
        for thread in self._threads:
            thread.join(BEAT_S)  # a thread that waits for the store does not end

    def meet(self) -> None:
        """Wait until all ranks have called this as often as this rank, without a limit while they are alive."""
        with self._news:
            self._met += 1
            self._waits_since = told = time.monotonic()
            self._ask.set()
            while self._opened < self._met:
                self._news.wait(_NEWS_S)
                now = time.monotonic()
                if self._rank == 0 and self._opened < self._met and now - told >= _NEWS_S:
                    told = now
                    late = [rank for rank, beat in self._found.items() if beat.met < self._met]
                    minutes = (now - self._waits_since) / 60
                    logger.info("waiting for rank %s for %.0f min; all ranks are alive", _listed(late), minutes)
            self._waits_since = None

    def _beat(self) -> None:
        """Exchange signs of life until the block ends or the store is gone."""
        with contextlib.suppress(dist.DistError):
            while not self._stop.is_set():
                self._exchange()
                self._ask.wait(self._pause())
                self._ask.clear()

    def _pause(self) -> float:
        since = self._waits_since
        return BEAT_S if since is None else min(max(_GROWTH * (time.monotonic() - since), _FIRST_BEAT_S), BEAT_S)

    def _exchange(self) -> None:
        store = self._store
        self._beats += 1
        if self._rank == 0 and self._beats == 1:
            store.set(_key(0), Beat(1, 0, self._host).encode())
        if self._rank != 0:
            store.set(_key(self._rank), Beat(self._beats, self._met, self._host).encode())
        found = dict(zip(self._peers, map(Beat.decode, store.multi_get(list(map(_key, self._peers)))), strict=True))
        with self._news:
            self._found = found
            self._opened = min([beat.met for beat in found.values()] + [self._met] * (self._rank == 0))
            self._news.notify_all()
        if self._rank == 0:
            store.set(_key(0), Beat(self._beats, self._opened, self._host, self._lost).encode())

    def _watch(self) -> None:
        """End this process when a rank is dead, or when rank 0 has found one."""
        poll_s = min(BEAT_S, SILENCE_LIMIT_S / 10)
        seen = dict.fromkeys(self._peers, 0)
        silent_s, before = dict.fromkeys(self._peers, 0.0), time.monotonic()
        while not self._stop.wait(poll_s):
            # A longer gap means that this process was suspended, perhaps with all others, not that one of them died.
            now = time.monotonic()
            gap, before = min(now - before, 2 * poll_s), now
            found = self._found
            for rank, number in seen.items():
                beat = found.get(rank)
                new = beat is not None and beat.number != number
                silent_s[rank] = 0.0 if new else silent_s[rank] + gap
                seen[rank] = beat.number if beat is not None else 0
            lost = [rank for rank in self._peers if silent_s[rank] > SILENCE_LIMIT_S]
            told = [rank for beat in found.values() for rank in beat.lost if rank != self._rank]
            if lost or told:
                self._end(lost or told, found)

    def _end(self, lost: list[int], found: dict[int, Beat]) -> None:
        hosts = sorted({found[rank].host for rank in lost if rank in found})
        logger.error(
            "rank %s of %d%s gave no sign of life for %.0f s: killed, stopped, ended by its watchdog, or its machine "
            "is gone; this is rank %d on %s, which ends with exit status %d; start the command again, finished results "
            "are kept",
            _listed(lost),
            self._size,
            f" on {', '.join(hosts)}" if hosts else "",
            SILENCE_LIMIT_S,
            self._rank,
            self._host,
            LOST_RANK_EXIT,
        )
        if self._rank == 0:  # its end may end the store, from which the other ranks learn who is dead
            self._lost = tuple(lost)
            time.sleep(3 * BEAT_S)
        os._exit(LOST_RANK_EXIT)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


_current: RankHeartbeat | None = None


@contextlib.contextmanager
def beating(heartbeat: RankHeartbeat) -> Iterator[None]:
    """Make `heartbeat` that of this process while the block runs."""
    global _current
    with heartbeat:
        _current = heartbeat
        try:
            yield
        finally:
            _current = None


def meet() -> None:
    """Wait for all ranks if this process has a heartbeat; otherwise they wait in their collective."""
    if _current is not None:
        _current.meet()
