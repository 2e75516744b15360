"""What the processes of `transport`'s gRPC rows do; see `roles`: one endpoint each, joined on loopback."""

from __future__ import annotations

import queue
import time

from flowml_tools.bench.orders import orders, say
from flowml_tools.bench.peers import EDGE_BYTES

ARRIVES_S = 30.0
TOKEN = "between two processes of a benchmark"


def target(checksum: str) -> None:
    """Say where we are, learn where the source is, and answer each of its messages when all of it is here."""
    from flowml_runtime.host.grpc_transport import GrpcEndpoint
    from flowml_runtime.messages import Leave

    endpoint = GrpcEndpoint("target", TOKEN, shared_memory=False, checksum=bool(int(checksum)))
    endpoint.start(lambda peer, *_: endpoint.send(peer, Leave(worker="target")), lambda *_: None)
    say(endpoint.address)
    for address in orders():
        endpoint.know({"source": address})
        say("ready")
    endpoint.close()


def source(checksum: str, address: str) -> None:
    """Say where we are, and then how long an array of 64 MiB and the answer to it took, in s."""
    import numpy as np

    from flowml.plan import ArraySpec
    from flowml_runtime.host.grpc_transport import GrpcEndpoint
    from flowml_runtime.messages import Value

    answers: queue.SimpleQueue[object] = queue.SimpleQueue()
    endpoint = GrpcEndpoint("source", TOKEN, shared_memory=False, checksum=bool(int(checksum)))
    endpoint.start(lambda *_: answers.put(None), lambda *_: None)
    endpoint.know({"target": address})
    array = np.ones(EDGE_BYTES // 4, np.float32)
    specs = (ArraySpec(array.shape, "float32"),)
    message = Value(plan_id="wire", step=0, kind="edge", index=0, device="target", specs=specs)
    say(endpoint.address)
    for _ in orders():
        start = time.perf_counter()
        endpoint.send("target", message, [array])
        answers.get(timeout=ARRIVES_S)
        say(time.perf_counter() - start)
    endpoint.close()
