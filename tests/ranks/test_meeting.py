"""Processes of one start find each other in a store that holds what those before them wrote."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from dni_fx.parallel.mailbox import ParallelError
from dni_fx.parallel.meeting import meet


@pytest.fixture
def store() -> Callable[[], dist.TCPStore]:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False)


def met(store: Callable[[], dist.TCPStore], delays: list[float]) -> list[str]:
    """The names that ranks agree on, which come so late."""
    names = [""] * len(delays)

    def come(rank: int) -> None:
        time.sleep(delays[rank])
        names[rank] = meet(store(), rank, len(delays), 20)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(delays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_whoever_comes_first_all_agree_on_a_new_name(store: Callable[[], dist.TCPStore]) -> None:
    seen = set[str]()
    for delays in ([0, 0, 0], [0.4, 0, 0.2], [0, 0.4, 0.1], [0.3, 0], [0, 0, 0.1, 0.3]):
        names = met(store, delays)  # as many of them, or others, as hosts come and go
        assert len(set(names)) == 1, (delays, names)
        assert names[0] not in seen, delays
        seen.add(names[0])


def test_a_start_that_was_ended_half_way_is_no_harm(store: Callable[[], dist.TCPStore]) -> None:
    with pytest.raises(ParallelError, match="rank 1 did not come"):
        meet(store(), 0, 2, 0.2)
    with pytest.raises(ParallelError, match="rank 0 did not call rank 1"):
        meet(store(), 1, 2, 0.2)  # it answers the call of then
    assert len(set(met(store, [0.3, 0]))) == 1


def test_one_alone_meets_itself(store: Callable[[], dist.TCPStore]) -> None:
    assert meet(store(), 0, 1, 1) != meet(store(), 0, 1, 1)
