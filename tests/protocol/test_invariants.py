"""Invariants of the machines are errors, which hold also where Python leaves assertions out."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import flowml_runtime.protocol

FOLDER = Path(flowml_runtime.protocol.__file__).parent

TAMPERED = """
from flowml_runtime.protocol.errors import InvariantError
from flowml_runtime.protocol.training.ledger import Asked, Ledger, Work

ledger = Ledger(Work(replicas=2, items_per_epoch=4, item_size=8, total_clocks=2, aligned=True))
ledger.step(Asked(0, (0, 1)))
ledger.validate()
ledger._outstanding.popitem()
try:
    ledger.validate()
except InvariantError as error:
    print(error)
"""


def test_no_machine_relies_on_assertions() -> None:
    files = sorted(FOLDER.rglob("*.py"))
    assert len(files) > 10
    found = [
        f"{f.name}:{node.lineno}"
        for f in files
        for node in ast.walk(ast.parse(f.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_an_account_that_is_wrong_is_an_error_also_under_optimised_python() -> None:
    run = subprocess.run([sys.executable, "-O", "-c", TAMPERED], capture_output=True, text=True, timeout=60, check=True)
    assert "an item was neither settled nor given back" in run.stdout
