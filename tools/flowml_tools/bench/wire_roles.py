"""The programs of the processes in `transport`'s gRPC rows: two endpoints on loopback, or gRPC alone; see `roles`."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flowml_runtime.transport.buffers import keep_freed_memory
from flowml_tools.bench.orders import orders, say
from flowml_tools.bench.peers import EDGE_BYTES

ARRIVES_S = 30.0
TOKEN = "between two processes of a benchmark"


def target(checksum: str) -> None:
    """Print the own address, read that of the source, and answer each of its messages when it is complete."""
    from flowml_runtime import wire
    from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint

    endpoint = GrpcEndpoint("target", TOKEN, shared_memory=False, checksum=bool(int(checksum)))
    endpoint.start(lambda peer, *_: endpoint.send(peer, wire.Leave(worker="target")), lambda *_: None)
    say(endpoint.address)
    for address in orders():
        endpoint.know({"source": address})
        say("ready")
    endpoint.close()


def source(checksum: str, address: str) -> None:
    """Print the own address, and for each order the time of an array of 64 MiB and its answer, in s."""
    import numpy as np

    from flowml.plan import ArraySpec
    from flowml_runtime import wire
    from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint

    answers: queue.SimpleQueue[object] = queue.SimpleQueue()
    endpoint = GrpcEndpoint("source", TOKEN, shared_memory=False, checksum=bool(int(checksum)))
    endpoint.start(lambda *_: answers.put(None), lambda *_: None)
    endpoint.know({"target": address})
    array = np.ones(EDGE_BYTES // 4, np.float32)
    specs = (ArraySpec(array.shape, "float32"),)
    message = wire.Value(plan_id="wire", step=0, kind="edge", index=0, device="target", specs=specs)
    say(endpoint.address)
    for _ in orders():
        start = time.perf_counter()
        endpoint.send("target", message, [array])
        answers.get(timeout=ARRIVES_S)
        say(time.perf_counter() - start)
    endpoint.close()


PIECE_BYTES = 2**20
METHOD = "/bench.Wire/push"
UNBOUNDED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


def bare_target() -> None:
    """Copy pieces into one buffer, and answer when it is full. This is gRPC for Python without flowml."""
    import grpc

    buffer = memoryview(bytearray(EDGE_BYTES))

    def receive(pieces: Iterator[bytes], _: object) -> Iterator[bytes]:
        at = 0
        for piece in pieces:
            buffer[at : at + len(piece)] = piece
            at += len(piece)
            if at == EDGE_BYTES:
                at = 0
                yield b"k"

    class Handler(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(receive)

    keep_freed_memory()
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Handler()], options=UNBOUNDED)
    say(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    for _ in orders():
        pass  # only their end counts
    server.stop(None).wait(1.0)


def bare_source(port: str) -> None:
    """For each order, send one array in pieces, and print the time until the answer, in s."""
    import grpc

    keep_freed_memory()
    array = memoryview(bytearray(b"x") * EDGE_BYTES)
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def pieces() -> Iterator[bytes]:
        while asked.get():
            for at in range(0, EDGE_BYTES, PIECE_BYTES):
                yield bytes(array[at : at + PIECE_BYTES])

    with grpc.insecure_channel(f"127.0.0.1:{port}", options=UNBOUNDED) as channel:
        answers = channel.stream_stream(METHOD)(pieces())
        say("ready")
        for _ in orders():
            start = time.perf_counter()
            asked.put(True)
            next(answers)
            say(time.perf_counter() - start)
        asked.put(False)
