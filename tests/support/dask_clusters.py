"""Clusters of Dask that tests start on loopback: a scheduler and its workers, each a process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from distributed import Client

from . import forks
from .forks import Fork


@dataclass
class Cluster:
    """The address of a scheduler, its workers, and what all of them have printed."""

    address: str
    workers: list[Fork]
    log: list[str] = field(default_factory=list)

    def client(self) -> Client:
        return Client(self.address, set_as_default=False)


@contextmanager
def dask_cluster(folder: Path, *sources: Path, workers: int = 2, **env: str) -> Iterator[Cluster]:
    """Start a cluster whose workers find modules in the folders `sources`."""
    with ExitStack() as stack:
        scheduler = _start(stack, folder, ["scheduler", "--host=127.0.0.1", "--port=0"], env)
        assert scheduler.stdout
        log = []
        for line in scheduler.stdout:
            log.append(line)
            if "Scheduler at:" in line:
                break
        else:
            raise RuntimeError("dask scheduler ended:\n" + "".join(log))
        address = line.split()[-1]
        path = os.pathsep.join(map(str, sources))
        command = ["worker", address, "--host=127.0.0.1", "--nthreads=1", "--no-dashboard"]
        started = [
            _start(stack, folder, [*command, "--no-nanny"], {**env, "PYTHONPATH": path})
            for _ in range(workers)
        ]
        cluster = Cluster(address, started, log)
        for process in (scheduler, *started):
            threading.Thread(target=log.extend, args=(process.stdout,), daemon=True).start()
        with cluster.client() as client:
            client.wait_for_workers(workers)
        yield cluster


def _start(stack: ExitStack, folder: Path, words: list[str], env: dict[str, str]) -> Fork:
    process = forks.start("dask", words, folder, os.environ | env)

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        process.wait()

    stack.callback(end)
    return process
