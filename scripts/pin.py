"""Resolve what flowml needs for development and the examples, and pin it in constraints.txt.

The pins are the full closure, so that an install is `pip install -r constraints.txt`: no resolver at work, and
the same versions everywhere. Run it (`make pins`) with the oldest Python that is supported, because a pin has to
exist for every later one as well.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# The versions of everything that development and the examples need; `make pins` resolves them anew.\n"


def resolve() -> dict[str, str]:
    """Name -> version of everything that `.[dev,examples]` installs on this Python."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), f"{ROOT}[dev,examples]"]
        subprocess.run(command, check=True)
        installs: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    found = {i["metadata"]["name"]: i["metadata"]["version"] for i in installs}
    del found["flowml"]
    return found


def main() -> None:
    pins = resolve()
    names = sorted(pins, key=lambda n: re.sub(r"[-_.]+", "-", n).lower())
    # A local version (`+cpu`) names a build that only some indexes have.
    lines = [f"{name}=={pins[name].split('+')[0]}\n" for name in names]
    (ROOT / "constraints.txt").write_text(HEADER + "".join(lines))
    print(f"constraints.txt: {len(lines)} pins")


if __name__ == "__main__":
    main()
