"""What all tests share: seeds, signals, clusters that are started once, and a check that nothing is left behind.

Every test runs on the CPU. The header of a run prints its seeds: those of random, numpy and jax are fixed, and
Hypothesis draws fresh examples in every run. `FLOWML_TEST_SEED=7 make test` sets all of them, and so repeats a run.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import atexit
import hashlib
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import psutil
import pytest

if TYPE_CHECKING:
    import flowml as fm

CACHE = tempfile.mkdtemp(prefix="flowml-tests-")
"""What tests and the programs that they start remember, in place of the user's cache directory."""
os.environ["XDG_CACHE_HOME"] = CACHE
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def _programs() -> Path:
    """Where compiled programs are kept: in the checkout, for processors of this kind; `make clean` removes it. If the
    checkout cannot be written, for this run."""
    root = Path(__file__).resolve().parent.parent
    processor = Path("/proc/cpuinfo")
    able = [x for x in processor.read_text().splitlines() if x.startswith("flags")][:1] if processor.exists() else []
    place = root / ".jax_cache" / hashlib.sha256("".join([platform.machine(), *able]).encode()).hexdigest()[:16]
    return place if os.access(root, os.W_OK) else Path(CACHE, "programs")


# Tests and their processes compile many equal programs, which takes half of the time of a first run: what one has
# compiled, the others and later runs load. JAX's key of a program is its StableHLO, the options and the versions.
# The workers of a parallel run inherit the directory from the process that starts them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_programs()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tests start many interpreters. Where the environment forbids byte code, each one would compile all modules of flowml.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.dont_write_bytecode = False

SEED = int(os.environ.get("FLOWML_TEST_SEED", "0"))
EXAMPLES_SEED = SEED if "FLOWML_TEST_SEED" in os.environ else random.SystemRandom().randrange(2**31)
"""Of Hypothesis."""

MOST_PROGRAMS_BYTES = 2**30
"""When more programs are kept, as after many changes, a run starts without them."""

LEAK_DEADLINE_S = 10.0
SHARED_MEMORY = Path("/dev/shm")

hypothesis.settings.register_profile(
    "flowml",
    deadline=None,  # a first call compiles: a deadline would test the compiler's speed
    database=None,
    print_blob=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("flowml")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    _heed_signals()
    if not hasattr(config, "workerinput"):
        _discard_programs(_programs())
    if config.getoption("--hypothesis-seed", None) is None:
        config.option.hypothesis_seed = str(EXAMPLES_SEED)


def _heed_signals() -> None:
    """A parent that ignores or blocks signals (`nohup make test &`, a service manager) hands that on to the tests, and
    they to the programs that they start and interrupt. Not done on import, which workers do on other threads too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _discard_programs(place: Path) -> None:
    if place.is_dir() and sum(entry.stat().st_size for entry in os.scandir(place)) > MOST_PROGRAMS_BYTES:
        shutil.rmtree(place, ignore_errors=True)


def pytest_report_header(config: pytest.Config) -> str:
    examples = config.getoption("--hypothesis-seed", None)
    again = f"FLOWML_TEST_SEED={examples}" if examples == str(SEED) else f"PYTEST_ADDOPTS=--hypothesis-seed={examples}"
    return f"seeds: {SEED} for random, numpy and jax; {examples} for Hypothesis (repeat with {again})"


@pytest.fixture
def seed() -> int:
    """The seed of this run, for `jax.random.key(seed)` and for `fit(seed=seed)`."""
    return SEED


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def _fixed_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)


@pytest.fixture(scope="session", autouse=True)
def _checked_messages() -> None:
    """Every message that this process sends is decoded again by its sender, so that none is sent that is refused."""
    from flowml_runtime.transport import refusals

    refusals.checks_all = True


@contextmanager
def compiled_anew() -> Generator[None]:
    """In the block this process compiles every program itself, for tests of what is compiled."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def use(cache: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()

    use(cache=False)
    try:
        yield
    finally:
        use(cache=True)


@pytest.fixture(scope="session")
def threads_cluster() -> Iterator[fm.Cluster]:
    """Four workers inside this process. Shared by all tests, so not the current one: give `cluster=`."""
    import flowml as fm

    with closing(fm.Cluster.threads(workers=4)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def process_cluster() -> Iterator[fm.Cluster]:
    """Two worker processes. Shared by all tests, so not the current one: give `cluster=`; kill none of them."""
    import flowml as fm

    with closing(fm.Cluster.local(workers=2)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def grpc_cluster() -> Iterator[fm.Cluster]:
    """As `process_cluster`, talking by gRPC as the processes of several machines do."""
    import flowml as fm

    with closing(fm.Cluster.local(workers=2, transport="grpc")) as cluster:
        yield cluster


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = LEAK_DEADLINE_S) -> None:
    """Return as soon as `condition()` is true; fail with `what` after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {deadline_s:g} s: {what}")
        threading.Event().wait(0.01)


@pytest.fixture
def no_leaks() -> Callable[[], AbstractContextManager[None]]:
    """`with no_leaks(): …`: what the block started is gone soon after it: threads, processes, ports, shared memory."""
    return _no_leaks


@contextmanager
def _no_leaks() -> Generator[None]:
    before = _held()
    yield
    wait_until(lambda: _held() <= before, "everything that was started is gone", LEAK_DEADLINE_S)


def _held() -> set[str]:
    """Names of what this process holds now: threads, child processes, listening ports, shared memory files."""
    process = psutil.Process()
    held = {f"thread {t.ident} {t.name}" for t in threading.enumerate()}
    held |= {f"process {p.pid} {p.name()}" for p in process.children(recursive=True)}
    held |= {f"port {c.laddr.port}" for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    return held | {f"shared memory {p.name}" for p in SHARED_MEMORY.glob("*flowml*")}
