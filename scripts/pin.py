"""Resolves the dependencies of development and the examples, and pins them in constraints.txt.

The pins are the full closure, so that `pip install -r constraints.txt` needs no resolver and gives the same versions
everywhere. Run it (`make pins`) with the oldest supported Python, because a pinned version has to exist for every later
one as well.
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
    """Name -> version of every package that `.[dev,examples]` installs on this Python."""
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
    # A local version (`+cpu`) names a build that only some package indexes have.
    lines = [f"{name}=={pins[name].split('+')[0]}\n" for name in names]
    (ROOT / "constraints.txt").write_text(HEADER + "".join(lines))
    print(f"constraints.txt: {len(lines)} pins")


if __name__ == "__main__":
    main()
