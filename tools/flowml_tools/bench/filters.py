"""Measures what filters cost and save: the time to encode and decode an array, as JAX tasks and with NumPy, and bytes.

A filter pays on a link that is slower than the bytes that it saves in a second of its own work: with n bytes of which w
are sent, and t seconds to encode and decode, below (n - w) / t bytes a second. The faster of the two ways counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from flowml.policy import filters as f
from flowml_tools.bench.rows import Peer, Row, Sample
from flowml_tools.bench.timing import tell

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

SUMMARY = "time and bytes of each filter; as JAX tasks against NumPy"
REPEATS = 7
SIDES = (64, 256, 1024)
CHAINS: tuple[tuple[f.Filter, ...], ...] = (
    (f.top_k(0.01).with_error_feedback(),),
    (f.random_k(0.01).with_error_feedback(),),
    (f.random_skip(0.1),),
    (f.significance(0.01),),
    (f.kkt(1.0),),
    (f.low_rank(4).with_error_feedback(),),
    (f.quantise(8),),
    (f.quantise(4),),
    (f.quantise(2, stochastic=True),),
    (f.sign().with_error_feedback(),),
    (f.top_k(0.1).with_error_feedback(), f.quantise(4)),
    (f.compress(),),
)
_HEADINGS: tuple[str, ...] = ("filter", "elements", "JAX", "NumPy", "bytes", "pays below")


def rows(repeats: int | None, sides: Sequence[int] = SIDES) -> list[Row]:
    import jax

    from flowml_runtime.execution.kernels import Kernels

    device = jax.local_devices()[0]
    ways = Kernels(device, "jax"), Kernels(device, "numpy")
    found: list[Row] = []
    for side in sides:
        for chain in CHAINS:
            name = ", ".join(map(str, chain))
            tell(f"filters: {name} of {side} x {side}")
            value = np.random.default_rng(0).normal(size=(side, side)).astype(np.float32)
            ours, theirs = (sample(run, chain, value, repeats or REPEATS) for run in ways)
            wire = sent(ways[1], chain, value)
            seconds = min(ours.median, theirs.median)
            pays = f"{(value.nbytes - wire) / seconds / 1e6:,.0f} MB/s" if wire < value.nbytes else "never"
            group = (name, f"{value.size:,}", f"{value.nbytes / wire:.1f} x fewer", pays)
            found.append(Row(f"{name}, {value.size:,}", "s", ours, Peer("NumPy", theirs), group=group))
    return found


def render(benchmark: str, rows: Sequence[Row]) -> str:
    """A line for each filter and size."""
    lines = [_HEADINGS]
    for row in rows:
        name, size, fewer, pays = row.group
        theirs = row.peer.sample or row.ours
        lines.append((name, size, _milliseconds(row.ours), _milliseconds(theirs), fewer, pays))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    title = f"{benchmark} (encode and decode, median; of float32)"
    return "\n".join([title, *(f"  {line}".rstrip() for line in padded)])


def _milliseconds(sample: Sample) -> str:
    return f"{sample.median * 1e3:.2f} ms"


def _context(run: f.Run, chain: f.Chain, value: Array, clock: int) -> f.Context:
    """Parameters are zero for `kkt`, whose condition is about those, and large for `significance`."""
    return f.Context((clock,), clock, 1.0, np.full_like(value, 0.0 if isinstance(chain[0], f.KKT) else 100.0), run=run)


def sample(run: f.Run, chain: f.Chain, value: Array, repeats: int) -> Sample:
    """The seconds of encoding and decoding, after two pushes that may compile."""
    import jax

    state: f.State = {}
    found: list[float] = []
    for clock in range(repeats + 2):
        context = _context(run, chain, value, clock)
        began = time.perf_counter()
        wire, state = f.encode(chain, value, state, context)
        decoded, _ = f.decode(chain, iter(wire), f.Form(value.shape, value.dtype), {}, run)
        jax.block_until_ready(decoded)
        found.append(time.perf_counter() - began)
    return Sample(tuple(found[2:]))


def sent(run: f.Run, chain: f.Chain, value: Array) -> int:
    """The bytes that are sent of one array."""
    wire, _ = f.encode(chain, value, {}, _context(run, chain, value, 1))
    return max(sum(a.nbytes for a in wire), 1)
