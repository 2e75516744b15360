"""Gives every node a layer: that of its scope, else of its parameter, else of its consumer, else of its data.

The tree path of a parameter gives its layer (`conv1/kernel` belongs to `conv1`). A Flax module also names its
scopes after its parameters (`CNN/conv1` contains `conv1`). A scope that contains a parameter's layer therefore gets
this shorter name, so forward pass, backward pass and parameters share one label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from flowml.ir.graph import Graph, Literal, Node
from flowml.ir.scopes import Scope

_SHAPING = frozenset({"copy", "reduce_sum", "reshape", "transpose", "squeeze", "convert_element_type"})
_COLLECTION = "params/"  # Flax adds this prefix; users write and read paths without it


def parameter_path(name: str) -> str:
    """A parameter's path as users write it, without Flax's collection name."""
    return name.removeprefix(_COLLECTION)


def layer_of(path: str) -> str:
    """The layer of a parameter: its path without the name of the leaf, or the whole path if it has one component.

    Flax nnx stores each array as the `value` of a variable; this component is ignored.
    """
    path = parameter_path(path).removesuffix("/value")
    return path.rsplit("/", 1)[0] if "/" in path else path


def matches(layer: str, pattern: str) -> bool:
    """Whether a pattern matches any run of a layer's components, literally or with wildcards."""
    if f"/{pattern}/" in f"/{layer}/":
        return True
    starts = [0, *(i + 1 for i, c in enumerate(layer) if c == "/")]
    rests = (layer[start:] for start in starts)
    return any(fnmatchcase(rest, pattern) or fnmatchcase(rest, f"{pattern}/*") for rest in rests)


def label(
    graph: Graph,
    parameters: Mapping[int, str],
    output_layers: Sequence[str] = (),
    closed_over: Mapping[int, str] = MappingProxyType({}),
) -> Graph:
    """Give every node a layer.

    `parameters` maps inputs that are parameters to their paths. `closed_over` maps constants that are parameters to
    their layers. `output_layers` holds the layer of each output that is a gradient, and "" for other outputs.
    """
    owner = _owners(graph, {**closed_over, **{v: layer_of(n) for v, n in parameters.items()}})
    known = set(owner.values())
    by_scope = _by_scope({n.scope for n in graph.nodes}, known)
    layers = {n.id: by_scope[n.scope] for n in graph.nodes}
    _from_parameters(graph, layers, owner)
    _from_outputs(graph, layers, output_layers)
    forward = [n for n in graph.nodes if not n.scope.backward]
    backward = [n for n in graph.nodes if n.scope.backward]
    saved = {n.id for n in forward if _is_saved_for_backward(graph, n)}
    # A forward node prepares what its first reader needs, so a norm belongs to the layer that reads it. The loss has
    # no reader and follows its data. A backward node follows the largest value that it reads. Values that the forward
    # pass saves for a backward node belong to the layer of that node.
    _follow_readers(graph, layers, forward, backward_too=False)
    _follow_data(graph, layers, [n for n in forward if n.id not in saved])
    _follow_data(graph, layers, backward)
    _follow_readers(graph, layers, forward, backward_too=True)
    _follow_data(graph, layers, graph.nodes)
    _follow_readers(graph, layers, graph.nodes, backward_too=True)
    nodes = tuple(replace(n, layer=layers[n.id]) for n in graph.nodes)
    return replace(graph, nodes=nodes, parameters=frozenset(owner))


def _owners(graph: Graph, owner: dict[int, str]) -> dict[int, str]:
    """The layer of each value that is a parameter or computed only from parameters of one layer."""
    for node in graph.nodes:
        behind = {owner.get(v) for v in node.reads}
        if len(behind) == 1 and None not in behind:
            owner.update(dict.fromkeys(node.outputs, next(iter(behind)) or ""))
    return owner


def _is_saved_for_backward(graph: Graph, node: Node) -> bool:
    users = [u for v in node.outputs for u in graph.consumers.get(v, ())]
    return bool(users) and all(u.scope.backward for u in users)


def _by_scope(scopes: set[Scope], known: set[str]) -> dict[Scope, str]:
    """The layer that each scope names.

    A scope names no layer if it contains the scopes of several layers (as a model's outermost module does), or if its
    layer has sublayers. Nodes of such a scope that read no parameter of it follow their neighbours.
    """
    longest = max((layer.count("/") + 1 for layer in known), default=0)
    found = {s: _from_scope(s, known, longest) for s in scopes}
    above = {layer[:i] for layer in known for i, c in enumerate(layer) if c == "/"} & known
    inside: dict[tuple[str, ...], set[str]] = {}
    for scope, layer in found.items():
        if layer in known:
            for depth in range(len(scope.labels)):
                inside.setdefault(scope.labels[:depth], set()).add(layer)
    return {
        s: "" if layer in above or (layer not in known and len(inside.get(s.labels, ())) > 1) else layer
        for s, layer in found.items()
    }


def _from_scope(scope: Scope, known: set[str], longest: int) -> str:
    labels = scope.labels
    for length in range(min(len(labels), longest), 0, -1):
        for start in range(len(labels) - length + 1):
            candidate = "/".join(labels[start : start + length])
            if candidate in known:
                return candidate
    return scope.path


def _from_parameters(graph: Graph, layers: dict[int, str], owner: Mapping[int, str]) -> None:
    """A node without a scope that reads exactly one layer's parameters belongs to it."""
    for node in graph.nodes:
        if not layers[node.id]:
            touched = {owner[v] for v in node.reads if v in owner}
            if len(touched) == 1:
                layers[node.id] = touched.pop()


def _from_outputs(graph: Graph, layers: dict[int, str], output_layers: Sequence[str]) -> None:
    """Nodes that only shape a gradient for its output (a sum over the batch, a reshape) belong to its parameter."""
    for output, layer in zip(graph.outputs, output_layers, strict=False):
        node = None if isinstance(output, Literal) else graph.producer.get(output)
        while layer and node is not None and not layers[node.id]:
            layers[node.id] = layer
            behind = graph.producer.get(node.reads[0]) if len(node.reads) == 1 else None
            node = behind if behind is not None and behind.op in _SHAPING else None


def _follow_readers(graph: Graph, layers: dict[int, str], nodes: Sequence[Node], *, backward_too: bool) -> None:
    for node in reversed(nodes):
        if not layers[node.id]:
            users = (u for v in node.outputs for u in graph.consumers.get(v, ()))
            wanted = (layers[u.id] for u in users if backward_too or not u.scope.backward)
            layers[node.id] = next((layer for layer in wanted if layer), "")


def _follow_data(graph: Graph, layers: dict[int, str], nodes: Sequence[Node]) -> None:
    for node in nodes:
        if not layers[node.id]:
            ranked = sorted(_makers(graph, node), key=lambda m: (-m[0], m[1].scope.backward, -m[1].id))
            layers[node.id] = next((layers[m.id] for _, m in ranked if layers[m.id]), "")


def _makers(graph: Graph, node: Node) -> Iterator[tuple[int, Node]]:
    """(bytes, producer) of what a node reads, except constants. All layers may share constants and small values."""
    for value in dict.fromkeys(node.reads):
        maker = graph.producer.get(value)
        if maker is not None and maker.reads:
            yield graph.values[value].nbytes, maker
