"""The threads of a worker share the arenas of its C library, so that one uses what another has freed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, data, mlp, mlp_loss


@pytest.mark.skipif(sys.platform != "linux", reason="arenas are those of glibc")
def test_runs_of_fits_make_no_new_arenas(tmp_path: Path) -> None:
    path = str(tmp_path / "heaps").encode()

    def arenas(x: Any) -> Any:
        library = ctypes.CDLL(None)
        library.fopen.restype = ctypes.c_void_p
        file = ctypes.c_void_p(library.fopen(path, b"w"))
        library.malloc_info(0, file)
        library.fclose(file)
        return np.float32(Path(path.decode()).read_text().count("<heap nr="))

    with fm.Cluster.local(workers=1, allow_python=True) as cluster:
        count = fm.dataflow(
            lambda x: jax.pure_callback(arenas, jax.ShapeDtypeStruct((), jnp.float32), x), cluster=cluster
        )
        trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster)
        for _ in range(3):
            trainer.fit(mlp(), data(), batch_size=BATCH, steps=10, progress=False)
        assert 1 <= count(jnp.float32(0)) <= 2
