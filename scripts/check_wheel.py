"""Builds the wheel and tests it like a new user: in a new environment, outside the checkout.

Only the wheel is installed in the environment. A `.pth` file adds the packages of the environment that runs this
script, so nothing is downloaded again. The editable install there is not added, because Python does not read `.pth`
files in a folder that a `.pth` file adds.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"flowml", "flowml_runtime", "flowml_tools"}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Return the output of `command`. If it fails, print all its output and exit."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {n.split("/", 1)[0] for n in names}
    expected = PACKAGES | {n for n in top if n.endswith(".dist-info")}
    if top != expected or len(top) != len(PACKAGES) + 1:
        sys.exit(f"{wheel.name} has the top-level names {sorted(top)}; expected {sorted(PACKAGES)} and its dist-info")
    for package in sorted(PACKAGES):
        if f"{package}/py.typed" not in names:
            sys.exit(f"{wheel.name} lacks {package}/py.typed, so its types would be ignored")


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment with the wheel; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    quietly = ("-qq", "--disable-pip-version-check", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *quietly, wheel)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def use(python: Path, folder: Path) -> None:
    """Import from the wheel, run the command, run the first example."""
    where = "import flowml, flowml_tools.main, flowml_runtime.wire as m; print(flowml.__file__, m.__file__)"
    files = run(python, "-c", where, cwd=folder).split()
    strangers = [f for f in files if not Path(f).resolve().is_relative_to(folder.resolve())]
    if strangers:
        sys.exit(f"the environment of the wheel imports {strangers[0]}, which is not the wheel's")
    run(python.parent / "flowml", "--version", cwd=folder)
    example = folder / "quickstart.py"
    example.write_text((ROOT / "examples" / "quickstart.py").read_text())
    run(python, example, cwd=folder)


def main() -> None:
    with TemporaryDirectory(prefix="flowml-wheel-") as name:
        folder = Path(name)
        wheel = build(folder / "dist")
        check_contents(wheel)
        use(install(wheel, folder / "venv"), folder)
        print(f"{wheel.name}: installs, holds {', '.join(sorted(PACKAGES))}, and runs examples/quickstart.py")


if __name__ == "__main__":
    main()
