"""The threads that fetch: none of them may die unheard, and none may wait for ever."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import pytest
import tiny
from hub_double import HubDouble
from hub_faults import Fault

from mixlocal.errors import CorruptError, NetworkError
from mixlocal.store import download
from mixlocal.store.download import Arrived, Event, Failed, Fetcher, FileDownload, Remote, Waiting, fetch_bytes
from mixlocal.store.http import Client, Endpoint
from mixlocal.store.hub import list_repository
from mixlocal.store.listing import Listing
from mixlocal.store.part_file import PartFile
from mixlocal.store.patience import Cancellation, CancelledError, Patience, RateLimit

HURRIED = Patience(give_up=1.0, reach=0.5, read=0.3, longest_wait=0.05, slowest=1000.0, window=0.3)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("hub") / "m")


def connect(hub: HubDouble) -> tuple[Client, Listing, Remote]:
    client = Client(Endpoint(hub.endpoint), HURRIED, Cancellation())
    listing = list_repository(client, "org/m", "main", lambda _: None)
    return client, listing, Remote(client, "org/m", listing.commit)


def fetched(hub: HubDouble, folder: Path) -> list[Event]:
    """What is told of fetching the weights; raises what ends it."""
    _, listing, remote = connect(hub)
    events: list[Event] = []
    part = PartFile(folder, listing.files["model.safetensors"], listing.commit)
    try:
        FileDownload(remote, part, events.append, RateLimit(None)).run()
    finally:
        part.close()
    return events


@pytest.mark.parametrize("error", [ZeroDivisionError(), MemoryError(), CorruptError("bad"), OSError(5, "gone")])
def test_a_thread_that_dies_of_anything_is_heard_of(error: Exception) -> None:
    class Broken:
        def run(self) -> None:
            raise error

    events: deque[Event] = deque()
    fetcher = Fetcher([Broken()], 2, 2, events.append)  # type: ignore[list-item]
    fetcher.start()
    fetcher.stop(1)
    assert list(events) == [Failed(error)]


def test_a_file_arrives_over_broken_connections(folder: Path, tmp_path: Path) -> None:
    nbytes = (folder / "model.safetensors").stat().st_size
    hub = HubDouble({"org/m": folder}, faults=[Fault("cut", at=at, how="rst") for at in (10, 1000, 50_000)])
    with hub:
        events = fetched(hub, tmp_path)
    assert [type(event) for event in events] == [Waiting, Waiting, Waiting, Arrived]
    assert (tmp_path / "model.safetensors.part").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sum(request.start for request in hub.requests if request.where == "cdn") > 1000
    assert nbytes > 50_000


def test_silence_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    """Not longer than patience says."""
    with HubDouble({"org/m": folder}, faults=[Fault("cut", at=0, how="stall", times=-1)]) as hub:
        begun = time.monotonic()
        with pytest.raises(NetworkError, match="no data in time"):
            fetched(hub, tmp_path)
        assert time.monotonic() - begun < 5


def test_a_connection_that_trickles_is_replaced(folder: Path, tmp_path: Path) -> None:
    with HubDouble({"org/m": folder}, faults=[Fault("drip", step=10, seconds=0.05)]) as hub:
        events = fetched(hub, tmp_path)
    assert isinstance(events[0], Waiting)
    assert "bytes/s came" in events[0].text
    assert isinstance(events[-1], Arrived)


def test_a_wait_that_a_server_asks_for_is_bounded(folder: Path, tmp_path: Path) -> None:
    with HubDouble({"org/m": folder}, faults=[Fault("retry_after", how="huge")]) as hub:
        begun = time.monotonic()
        events = fetched(hub, tmp_path)
        assert time.monotonic() - begun < 5
    assert isinstance(events[0], Waiting)
    assert events[0].seconds <= HURRIED.longest_wait


def test_cancelling_ends_a_read_that_is_going_on(folder: Path, tmp_path: Path) -> None:
    with HubDouble({"org/m": folder}, faults=[Fault("cut", at=1000, how="stall", times=-1)]) as hub:
        client, listing, remote = connect(hub)
        client.patience = Patience(read=60.0)
        part = PartFile(tmp_path, listing.files["model.safetensors"], listing.commit)
        events: deque[Event] = deque()
        fetcher = Fetcher([FileDownload(remote, part, events.append, RateLimit(None))], 1, 1, events.append)
        fetcher.start()
        while part.path.stat().st_size < 1000 and not hub.fired:
            time.sleep(0.01)
        time.sleep(0.3)
        begun = time.monotonic()
        client.cancellation.cancel()
        fetcher.stop(5)
        assert time.monotonic() - begun < 1
        part.close()
    assert part.landed == 1000
    assert not any(isinstance(event, Failed) for event in events)
    with pytest.raises(CancelledError):
        fetch_bytes(remote, listing.files["config.json"], events.append)
