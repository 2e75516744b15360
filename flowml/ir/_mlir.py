"""Reads and writes modules of StableHLO, through the MLIR that JAX offers to extensions.

A module is a function of arrays, `main`, for one device. In files and messages it is a portable artifact of StableHLO.
What a module says beside its operations (which arguments it overwrites, where they are, how they lie in memory) is
dropped when it is read, because that is for the worker to say.
"""

from __future__ import annotations

import io
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

Arrays = Sequence[jax.ShapeDtypeStruct]

_SAID = ("sym_name", "mhlo.num_partitions", "mhlo.num_replicas")
"""The attributes of a module that stay."""


def write(module: Any) -> bytes:
    """A module as a portable artifact."""
    code = io.BytesIO()
    module.operation.write_bytecode(file=code)
    with module.context:
        copy = ir.Module.parse(code.getvalue())  # because JAX keeps the module, and the next line overwrites it
    return bytes(stablehlo.serialize_portable_artifact(copy, stablehlo.get_current_version(), True))


def context() -> Any:
    """What modules are read into. Reading several into one saves time; their constants stay in it."""
    return mlir.make_ir_context()


def read(where: Any, data: bytes) -> Any:
    """A module from a portable artifact, in the context `where`. Raises errors of many types for other bytes."""
    with where:
        module = stablehlo.deserialize_portable_artifact(where, data)
        said = module.operation.attributes
        for name in [n for n in said if n not in _SAID]:
            del said[name]
        main = _main(module)
        main.arg_attrs = [ir.DictAttr.get({}) for _ in main.type.inputs]
        main.attributes["res_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get({}) for _ in main.type.results])
    return module


def operations(module: Any) -> list[tuple[str, str]]:
    """Every operation of a module with all its regions: (name, target of a custom call or "")."""
    found: list[tuple[str, str]] = []

    def visit(operation: Any) -> Any:
        target = ""
        if operation.name.endswith("custom_call"):
            target = ir.StringAttr(operation.attributes["call_target_name"]).value
        found.append((operation.name, target))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit, ir.WalkOrder.PRE_ORDER)
    return found


def may_not_end(module: Any) -> bool:
    """Whether a module has a loop that may go on for ever for some values: any but those that count to a constant, as
    JAX writes `scan`, `fori_loop` with fixed bounds, and random numbers."""
    found = False

    def visit(operation: Any) -> Any:
        nonlocal found
        found = found or (operation.name == "stablehlo.while" and not _counts(operation))
        return ir.WalkResult.INTERRUPT if found else ir.WalkResult.ADVANCE

    module.operation.walk(visit, ir.WalkOrder.PRE_ORDER)
    return found


def _counts(loop: Any) -> bool:
    """Whether a loop goes on while a counter is less than a constant, and adds 1 to it, from a constant on."""
    condition, body = (region.blocks[0] for region in loop.regions)
    (goes_on,) = _last(condition).operands
    compared = _made_by(goes_on, "stablehlo.compare")
    if compared is None or "LT" not in str(compared.attributes["comparison_direction"]):
        return False
    counter, bound = compared.operands
    if _made_by(bound, "stablehlo.constant") is None or counter not in list(condition.arguments):
        return False
    number = list(condition.arguments).index(counter)
    added = _made_by(_last(body).operands[number], "stablehlo.add")
    if added is None or added.operands[0] != body.arguments[number] or not _is_one(added.operands[1]):
        return False
    return _made_by(loop.operands[number], "stablehlo.constant") is not None


def _last(block: Any) -> Any:
    """What a block returns."""
    return list(block.operations)[-1].operation


def _made_by(value: Any, name: str) -> Any:
    """The operation of this name that makes a value, or None."""
    owner = getattr(value.owner, "operation", value.owner)
    return owner if getattr(owner, "name", "") == name else None


def _is_one(value: Any) -> bool:
    made = _made_by(value, "stablehlo.constant")
    if made is None or not value.type.element_type.__class__.__name__.startswith("IntegerType"):
        return False
    found = ir.DenseIntElementsAttr(made.attributes["value"])
    return len(found) == 1 and found[0] == 1


def devices(module: Any) -> int:
    """The number of devices that a module is a program for."""
    said = module.operation.attributes
    sizes = [ir.IntegerAttr(said[n]).value for n in _SAID[1:] if n in said]
    return int(np.prod(sizes, dtype=int))


def takes(module: Any, inputs: Arrays, outputs: Arrays) -> bool:
    """Whether a module is a function from arrays of these shapes and dtypes to those."""
    with module.context, ir.Location.unknown():
        found = _main(module).type
        return list(found.inputs) == _types(inputs) and list(found.results) == _types(outputs)


def overwrite(module: Any, arguments: Sequence[int]) -> None:
    """Let a module overwrite arguments, each with the next result of its shape and dtype, as jit pairs them."""
    with module.context:
        main = _main(module)
        kinds = list(main.type.inputs)  # once, because each reading makes a list of all of them
        free: dict[Any, deque[int]] = defaultdict(deque)
        for argument in arguments:
            free[kinds[argument]].append(argument)
        said = [ir.DictAttr.get({})] * len(kinds)
        number = ir.IntegerType.get_signless(32)
        for result, kind in enumerate(main.type.results):
            if free[kind]:
                said[free[kind].popleft()] = ir.DictAttr.get({"tf.aliasing_output": ir.IntegerAttr.get(number, result)})
        main.arg_attrs = said


def _main(module: Any) -> Any:
    return ir.SymbolTable(module.operation)["main"]


def _types(arrays: Arrays) -> list[Any]:
    return [ir.RankedTensorType.get(a.shape, mlir.dtype_to_ir_type(np.dtype(a.dtype))) for a in arrays]
