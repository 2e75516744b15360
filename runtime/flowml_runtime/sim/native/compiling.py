"""Compiles the rewritten simulator: `python -m flowml_runtime.sim.native.compiling FOLDER -O1`, where the sources are.

mypyc makes C of the modules, all of them one group, and the C compiler makes libraries beside the sources. The
interpreter that runs this must have mypy; the simulator itself needs neither mypy nor a compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flowml_runtime.sim.native.rewriting import ATTRIBUTES, BUILD_S, COMPILED, DRIVER, PACKAGE

_MYPY = (
    "--ignore-missing-imports",
    "--allow-redefinition",
    "--disable-error-code=return",
    "--disable-error-code=var-annotated",
)
_CONFIGURATION = f"""[mypy]
follow_imports = skip
[mypy-flowml.*,flowml_runtime.wire.*,flowml_runtime.protocol.*,msgspec.*,mypy_extensions,{PACKAGE}.{ATTRIBUTES}]
follow_imports = silent
"""
"""Types of other libraries, such as JAX, are not read: that would take most of the time."""


def compile_in(folder: Path, speed: str) -> None:
    """Compile the modules in a folder, which has the sources. `speed` is an option of the C compiler."""
    from mypyc.build import mypycify  # pyright: ignore[reportMissingImports]  # of the extra `compiled`

    import flowml
    import flowml_runtime

    roots = [str(Path(path).parent) for package in (flowml, flowml_runtime) for path in package.__path__]
    os.environ["MYPYPATH"] = os.pathsep.join([str(folder), *dict.fromkeys(roots)])
    os.chdir(folder)
    files = [f"{PACKAGE}/{name.replace('.', '/')}.py" for name in (*COMPILED, *DRIVER)]
    Path("mypy.ini").write_text(_CONFIGURATION)
    options = [*_MYPY, "--config-file=mypy.ini", "--cache-dir=mypy", *files]
    libraries: list[Any] = mypycify(options, multi_file=True, target_dir="c", group_name=PACKAGE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(library, source) for library in libraries for source in library.sources]
        objects = list(pool.map(lambda job: (job[0].name, _object(job[0], job[1], speed)), jobs))
    for library in libraries:
        name = library.name.replace(".", "/") + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
        _run("-shared", *(made for owner, made in objects if owner == library.name), "-o", name)


def _object(library: Any, source: str, speed: str) -> str:
    made = f"{source.removesuffix('.c')}.o"
    include = [f"-I{path}" for path in (*library.include_dirs, sysconfig.get_paths()["include"])]
    _run("-c", "-fPIC", "-w", "-DNDEBUG", speed, *include, source, "-o", made)
    return made


def _run(*arguments: str) -> None:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    subprocess.run([*compiler, *arguments], check=True, timeout=BUILD_S)


if __name__ == "__main__":
    compile_in(Path(sys.argv[1]).resolve(), sys.argv[2])
