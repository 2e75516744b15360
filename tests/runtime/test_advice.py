"""Commands in errors and warnings are complete, can be copied, and never have the token."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowml_runtime.membership.advice import start_worker, waits
from flowml_runtime.transport.security import TLS, TOKEN_FILE_VARIABLE


def test_how_to_start_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_FILE_VARIABLE, raising=False)
    begin = "start another with `flowml worker h:1 --token-file "
    assert start_worker("h:1", "secret", None) == f"{begin}FILE`"
    assert start_worker("h:1", Path("/a b/token"), None) == f"{begin}'/a b/token'`"
    (file := tmp_path / "token").touch()
    assert start_worker("h:1", str(file), None) == f"{begin}{file}`"
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, "/named")
    assert start_worker("h:1", None, None) == f"{begin}/named`"
    tls = TLS(Path("/own.pem"), Path("/key.pem"), Path("/ca.pem"))
    assert start_worker("h:1", None, tls).endswith("--tls-cert PEM --tls-key PEM --tls-ca /ca.pem`")


def test_what_a_fit_waits_for() -> None:
    assert waits({"worker:1"}, 60.0, "start one", launched=False) == (
        "worker:1 was lost; waiting up to 60 s for another in its place; start one"
    )
    assert waits({"worker:1", "worker:0"}, 60.0, "start one", launched=True) == (
        "worker:0 and worker:1 were lost; waiting up to 60 s for others in their places; the launcher starts them"
    )
