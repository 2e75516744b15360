"""Bare worker processes joined by gRPC, without the cluster that usually starts and watches them.

Run as a module this is the worker: `python -m tests.processes NAME`. It is told the token and its peers on
standard input, one JSON object a line, says its address on standard output, and ends when its input does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

from flowml.devices import as_devices
from flowml_runtime.host.grpc_transport import GrpcEndpoint
from flowml_runtime.host.security import new_token
from flowml_runtime.host.session import Session
from flowml_runtime.host.worker import Worker


class Processes:
    """`workers` worker processes of one device each, and the driver's session. Use as a context manager."""

    def __init__(self, workers: int = 2) -> None:
        token = new_token()
        self.devices = as_devices([f"worker:{n}" for n in range(workers)])
        self.endpoint = GrpcEndpoint("driver", token)
        self.session = Session(self.endpoint, self.devices)
        self.endpoint.start(self.session.on_message, self.session.on_lost)
        self.workers = {d.worker: _start(d.worker) for d in self.devices}
        for worker in self.workers.values():
            _tell(worker, {"token": token})
        self.addresses = {name: str(_hear(worker)["address"]) for name, worker in self.workers.items()}
        self.endpoint.know(self.addresses)
        for worker in self.workers.values():
            _tell(worker, self.addresses | {"driver": self.endpoint.address})

    def kill(self, name: str) -> None:
        """kill -9."""
        self.workers[name].kill()
        self.workers[name].wait()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()
        for worker in self.workers.values():
            worker.communicate(timeout=30)  # closes its standard input
        self.endpoint.close()


def _start(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.processes", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def _tell(worker: subprocess.Popen[str], what: Mapping[str, str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(what) + "\n")
    worker.stdin.flush()


def _hear(worker: subprocess.Popen[str]) -> Any:
    assert worker.stdout is not None
    return json.loads(worker.stdout.readline())


def main(name: str) -> None:
    endpoint = GrpcEndpoint(name, json.loads(sys.stdin.readline())["token"])
    worker = Worker(name, {f"{name}/cpu:0": jax.local_devices()[0]}, endpoint, python=True)
    endpoint.start(worker.on_message, worker.on_lost)
    print(json.dumps({"address": endpoint.address}), flush=True)
    for line in sys.stdin:
        endpoint.know(json.loads(line))
    worker.close()
    endpoint.close()


if __name__ == "__main__":
    main(sys.argv[1])
