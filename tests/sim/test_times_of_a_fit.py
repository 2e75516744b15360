"""The time of a fit is that of its simulated runs, one after the other."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from flowml_runtime.sim.session import since

TIMES = st.floats(0, 1e9)


@given(TIMES, TIMES)
@example(2.023629618484874, 6.488637436875902)
@example(1e6, 1e6 + 1e-3)
def test_a_time_has_come_when_its_rest_has_passed(passed: float, rest: float) -> None:
    """It had not, by one bit, where the difference was rounded down, and a fit waited for ever."""
    until = max(passed, rest)
    end = since(passed, until)
    assert passed + end >= until
    assert end - (until - passed) <= until * 2**-52
