"""A saved plan is read as it was written, or refused with one sentence that says why."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import msgspec
import pytest

import flowml as fm
from flowml.plan import FORMAT
from tests.plans import chain, one_device

MAGIC_BYTES, HEAD_BYTES = 12, 32


@pytest.fixture(scope="module")
def whole() -> bytes:
    return chain().encode()


def refused(data: bytes) -> str:
    with pytest.raises(fm.PlanError) as caught:
        fm.Plan.decode(data, "x.plan")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_flipped_bit_is_found() -> None:
    plan = msgspec.structs.replace(one_device(), executables={"xla-only": b"executable"})
    data = plan.encode()
    assert fm.Plan.decode(data) == plan
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(fm.PlanError):
            fm.Plan.decode(bytes(flipped))


def test_flipped_bits_of_a_plan_with_its_executables_are_found(whole: bytes) -> None:
    chosen = random.Random(0)
    for count in (1, 2, 3, 8):
        for _ in range(250):
            flipped = bytearray(whole)
            for bit in chosen.sample(range(8 * len(whole)), count):
                flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(fm.PlanError):
                fm.Plan.decode(bytes(flipped))


def test_every_place_to_cut_it_short_is_found(whole: bytes) -> None:
    for length in [*range(HEAD_BYTES + 64), *range(HEAD_BYTES, len(whole), 97), len(whole) - 1]:
        refused(whole[:length])
    assert "is damaged or cut short" in refused(whole[:-20])
    assert "is damaged or cut short" in refused(whole + b"\0")
    assert "is damaged or cut short" in refused(whole[:200] + whole[201:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "x.plan is not a flowml plan: it is empty; write one with plan.save()"),
        (lambda data: b"PK\3\4" + data, r"x.plan is not a flowml plan: it begins with b'PK\x03\x04flow'"),
        (lambda data: b"x" + data[1:], "x.plan is not a flowml plan"),
        (lambda data: with_format(data, FORMAT + 1), f"has plan format {FORMAT + 1}, this flowml reads {FORMAT}"),
        (lambda data: data[:MAGIC_BYTES] + data[HEAD_BYTES:], f"has plan format 1, this flowml reads {FORMAT}"),
    ],
)
def test_what_is_no_plan_of_this_format_is_named(
    change: Callable[[bytes], bytes], message: str, whole: bytes, tmp_path: Path
) -> None:
    assert message in refused(change(whole))
    (tmp_path / "x.plan").write_bytes(change(whole))
    with pytest.raises(fm.PlanError, match=r"x\.plan"):
        fm.Plan.load(tmp_path / "x.plan")


def with_format(data: bytes, number: int) -> bytes:
    return data[:MAGIC_BYTES] + number.to_bytes(4, "big") + data[MAGIC_BYTES + 4 :]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(fm.PlanError, match="cannot be read as a plan: Is a directory; give a file from plan"):
        fm.Plan.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        fm.Plan.load(tmp_path / "nothing")


def test_saving_gives_what_loading_reads(tmp_path: Path) -> None:
    plan = fm.compile(jnp.sin, jnp.ones(3), devices=["worker:0"])
    plan.save(tmp_path / "p")
    assert fm.Plan.load(tmp_path / "p") == plan
    assert (tmp_path / "p").read_bytes() == plan.encode()
