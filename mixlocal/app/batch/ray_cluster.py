"""A Ray cluster to work on: one started here for the purpose, or one that is there."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from mixlocal.app.batch.ray_places import Node
from mixlocal.app.hardware import TOPOLOGY, Hardware, physical_cores, probe
from mixlocal.errors import NetworkError, RefusedError, UsageError

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray tells of dead workers on stdout, which belongs to the answers. We tell of them ourselves.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".?",
}
# Ray's ports run any code for whoever reaches them. A cluster of ours listens on the loopback interface alone, which
# is what Ray does where it thinks of one machine only; and Ray asks for a token, which it writes into the user's home
# if it is not told one.
ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
TOKEN = "RAY_AUTH_TOKEN"
OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes; requests and replies are small
# Memory is planned by us, and Ray's monitor counts what others use. Idle processes are of no use to actors.
SYSTEM = {"memory_monitor_refresh_ms": 0, "enable_worker_prestart": False}
ATTEMPTS = "RAY_gcs_server_port_wait_time_s"  # to reach a cluster that does not answer: 20 of 40 s each if not told
CONNECT_SECONDS = 5.0
QUIET = {"log_to_driver": False, "logging_level": "CRITICAL"}


class Cluster:
    """Ray, as long as it is needed.

    The processes of a cluster of ours end with the thread that started them, even if that is killed.
    """

    def __init__(self, address: str | None, gpus: bool) -> None:
        """address: of a running cluster ("auto", "host:6379"); None starts one here, with its GPUs or without.

        Raises `UsageError` if Ray is not installed, `NetworkError` if no such cluster answers, `RefusedError` for
        whatever else Ray has against it.
        """
        self.ray = import_ray(local=address is None)
        self._ours = not self.ray.is_initialized()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if not self._ours:  # a program's that uses us
            if address is not None:
                raise RefusedError("this process has joined a Ray cluster already", "name none, to use that one")
            return
        # Short, as it is part of the names of sockets, which have at most 107 characters.
        parent = "/tmp" if Path("/tmp").is_dir() else None
        self._folder = tempfile.TemporaryDirectory(prefix="mixlocal-ray-", dir=parent, ignore_cleanup_errors=True)
        try:
            self._start(address, gpus, self._folder.name)
        except BaseException:
            self.close()
            raise

    def nodes(self) -> list[Node]:
        """Those that are there."""
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        return [
            Node(node["NodeID"], int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
            for node in alive
        ]

    def machine(self, node: Node) -> Hardware:
        """What a node has, now. A process there looks, not this one: with torch loaded that would take of its GPUs."""
        look = self.ray.remote(probe).options(num_cpus=0, scheduling_strategy=self.on(node))
        hardware: Hardware = self.ray.get(look.remote(Path("/")))
        return hardware

    def on(self, node: Node) -> object:
        """Ray's way to say: on this node and on no other."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node.id, soft=False)

    def close(self) -> None:
        if self._ours:
            self.ray.shutdown()
        if self._folder is not None:
            self._folder.cleanup()

    def _connect(self, address: str) -> None:
        _knock(address)
        os.environ[ATTEMPTS] = "1"
        try:
            self.ray.init(address=address, **QUIET)
        finally:
            del os.environ[ATTEMPTS]

    def _start(self, address: str | None, gpus: bool, folder: str) -> None:
        # Workers look for modules in the folder where Ray was started: not in one that holds what the user works on.
        with self._named_errors(address), _own_signals(), contextlib.chdir(folder):
            if address is not None:
                self._connect(address)
                return
            self.ray.init(
                address="local", num_cpus=physical_cores(TOPOLOGY), num_gpus=None if gpus else 0,
                include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder, _system_config=SYSTEM, **QUIET,
            )  # fmt: skip

    @contextlib.contextmanager
    def _named_errors(self, address: str | None) -> Iterator[None]:
        try:
            yield
        except (ConnectionError, TimeoutError, socket.gaierror) as error:
            if address is None:
                raise RefusedError(f"Ray does not start: {_line(error)}") from error
            where = f"no Ray cluster answers at {address}"
            raise NetworkError(f"{where}: {_line(error)}", "start one with: ray start --head") from error
        except (RuntimeError, ValueError, OSError, self.ray.exceptions.RayError) as error:
            raise RefusedError(f"Ray refuses: {_line(error)}") from error


def import_ray(local: bool) -> ModuleType:
    """Ray, with its telemetry off. Raises `UsageError` if it is not installed."""
    os.environ.update(ENVIRONMENT)
    if local:
        os.environ.update(ONE_MACHINE)
        os.environ.setdefault(TOKEN, secrets.token_hex(32))
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray, which is not installed", "pip install 'mixlocal[ray]'") from error
    return ray


def _knock(address: str) -> None:
    """Whether anything listens there: Ray itself takes minutes to find out. Raises what connecting raises."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray installs a handler for SIGTERM; what this process does on it is not Ray's to say."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
