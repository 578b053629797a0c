"""The connection between machines: messages in order, and who is gone."""

from __future__ import annotations

import queue
import socket
import time
from typing import Any

import pytest

from mlx_redrafter.distributed import launch, wire
from mlx_redrafter.distributed.cluster import Cluster, start
from mlx_redrafter.distributed.sharding import Seat
from mlx_redrafter.distributed.wire import ClusterError, Wire


class Told:
    """Notes the end instead of ending."""

    def __init__(self) -> None:
        self.texts: queue.SimpleQueue[str] = queue.SimpleQueue()

    def now(self, text: str) -> None:
        self.texts.put(text)

    def never(self) -> None:
        pass


def pair() -> tuple[Wire, Wire, Told, Told]:
    one, other = socket.socketpair(socket.AF_UNIX)
    ends = Told(), Told()
    return Wire(one, ends[0].now), Wire(other, ends[1].now), *ends


@pytest.fixture(autouse=True)
def unix_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "setsockopt", lambda *_: None)


def test_messages_come_in_order_and_an_end_is_no_loss() -> None:
    """Seen to fail: a message that comes in two pieces; an end that counts as a loss."""
    first, second, lost, lost_too = pair()
    for number in range(5):
        first.send({"op": "n", "number": number, "more": "x" * 200000})
    assert [second.receive(5)["number"] for _ in range(5)] == list(range(5))
    with pytest.raises(ClusterError, match="nothing was said"):
        second.receive(0.05)
    first.send({"op": "end", "error": ""})
    assert second.receive(5)["op"] == "end"
    first.leave()
    first.close()
    time.sleep(0.1)
    assert lost.texts.empty() and lost_too.texts.empty()


def test_who_does_not_hear_of_the_end_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PARTING", 0.1)
    first, _waits_in_a_collective, _, lost = pair()
    first.send({"op": "end", "error": ""})
    assert lost.texts.get(timeout=5) == "it has ended"


def test_who_closes_or_is_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _, _, lost = pair()
    first.close()
    assert lost.texts.get(timeout=5) == "it closed the connection"
    monkeypatch.setattr(wire, "SILENCE", 0.3)
    one, _silent = socket.socketpair(socket.AF_UNIX)
    told = Told()
    Wire(one, told.now)
    assert "not been heard of for 0.3 s" in told.texts.get(timeout=5)


def test_a_step_that_takes_too_long_is_the_end() -> None:
    told: Any = Told()
    there = Cluster(Seat(0, 1), [], told, patience=0.3)
    with there.whole():
        time.sleep(0.2)
        there.tell("shape")  # it goes on
        time.sleep(0.2)
    assert told.texts.empty()
    with there.whole():
        assert "taken more than 0.3 s" in told.texts.get(timeout=5)
    there.close()
    with pytest.raises(ClusterError, match="were let go"):
        there.tell("next")


def test_after_a_step_was_broken_off_nobody_goes_on() -> None:
    told: Any = Told()
    there = Cluster(Seat(0, 1), [], told)
    with pytest.raises(ValueError), there.whole(lambda: True):
        raise ValueError
    there.tell("next")
    with pytest.raises(KeyboardInterrupt), there.whole():
        raise KeyboardInterrupt
    with pytest.raises(ClusterError, match="start again"):
        there.tell("next")


def test_localhost_is_no_name_for_others() -> None:
    with pytest.raises(ClusterError, match="called localhost"):
        start(launch.named("localhost,mac-2"))
