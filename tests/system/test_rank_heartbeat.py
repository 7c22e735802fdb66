"""Signs of life of two ranks in one process. Ranks that die: tests/distributed/test_heartbeat_ranks.py."""

import logging
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from scmdm.system import rank_heartbeat
from scmdm.system.rank_heartbeat import RankHeartbeat


def test_rank_0_names_the_rank_that_it_waits_for(caplog, monkeypatch):
    """Signs of life arrive more often than the lines in the log."""
    monkeypatch.setattr(rank_heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(rank_heartbeat, "_NEWS_S", 0.5)
    store = dist.TCPStore("localhost", 0, 1, is_master=True, wait_for_workers=False)
    own = [store] + [dist.TCPStore("localhost", store.port, timeout=timedelta(seconds=60)) for _ in range(2)]
    ranks = [RankHeartbeat(own[1 + rank], rank, 2) for rank in range(2)]
    began = time.monotonic()
    with caplog.at_level(logging.INFO, logger="scmdm"), ranks[0], ranks[1]:
        waiting = threading.Thread(target=ranks[0].meet)
        waiting.start()
        time.sleep(1.8)
        ranks[1].meet()
        waiting.join(30)
        assert not waiting.is_alive()
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= len(lines) <= (time.monotonic() - began) / rank_heartbeat._NEWS_S and all(
        "rank 1 " in line for line in lines
    ), lines
