"""Writes docs/methods/: a page for each claim of a paper, and their list. `--check` only compares.

What a run has found comes from docs/reproduce.md, which `flowml reproduce` writes, and the composition from the code.
Run this after either changes. Examples come from `method_examples`, and are run; `--check` takes what they printed from
the pages. Only when a method helps, and when it does not, is written here.
"""

from __future__ import annotations

import inspect
import operator
import re
import sys
from pathlib import Path
from typing import NamedTuple

from method_examples import example, printed

import flowml as fm

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = DOCS / "methods"


class Method(NamedTuple):
    """A method: its name, the calls that make it, and when to use it."""

    title: str
    calls: tuple[str, ...]
    helps: str
    hinders: str


METHODS = {
    "adam": Method(
        "Project Adam",
        ("fm.policies.adam_convolution(100)", "fm.policies.factors()", "fm.policies.adam_epoch(0.75)"),
        "Some machines are slow now and then, and dense layers are large beside a replica's batch.",
        "A replica's batch is so large that B (m + n) is more than m n: then factors send more than the gradient.",
    ),
    "downpour": Method(
        "Downpour",
        ("fm.policies.downpour(4, 2)",),
        "Replicas differ in speed: none waits for a slow one, or for a lost one whose worker is the home of no layer.",
        "The model does not bear stale changes at its rate, or machines are equal and links fast.",
    ),
    "sandblaster": Method(
        "Sandblaster L-BFGS",
        ("fm.policies.speculate(4)",),
        "Batches are large, as for L-BFGS, and some machine is much slower: fast ones take its portions.",
        "Batches are small: each portion is a push of its own, so the bytes grow with their number.",
    ),
    "parameter_server": Method(
        "Parameter Server",
        ("fm.policies.parameter_server(0.1, staleness=4)",),
        "Gradients are sparse and an L1 penalty cancels most of them; steps vary, and a bounded delay is harmless.",
        "Gradients are dense: positions cost bytes, and there is nothing to leave out.",
    ),
    "ssp": Method(
        "Stale synchronous parallel",
        ("fm.policies.ssp(8)",),
        "Each machine is slow now and then: within the bound the others go on.",
        "One machine is always slow: all reach the bound, and then go at its pace.",
    ),
    "chaos": Method(
        "CHAOS and Hogwild",
        ("fm.policies.hogwild()",),
        "Replicas are devices of one worker, and updates are small or touch different elements.",
        "Replicas are on several machines, which share no memory; or all wait for the lock of a layer. Then the time "
        "is predicted too short too: of 60 threads that hold it for 4 ms in steps of 100 ms, by half.",
    ),
    "zinkevich": Method(
        "Parallel SGD with one average",
        ("fm.policies.average_once()",),
        "The loss is convex and links are so slow that only one exchange is affordable.",
        "The loss is not convex: the mean of models that trained alone may be worse than each of them.",
    ),
    "double_buffering": Method(
        "Double buffering",
        ("fm.policies.double_buffer()",),
        "An exchange takes about as long as a step's computation: then a step takes half the time.",
        "An exchange takes hardly any time, or far longer than the computation: then there is little to hide, or too "
        "little to hide it behind.",
    ),
    "local_sgd": Method(
        "Local SGD",
        ("fm.policies.local_sgd(8)",),
        "Exchanging values takes longer than computing, and replicas see alike data.",
        "Replicas see different data and drift apart between two averages, or one is always slow: rounds wait for it.",
    ),
    "elastic": Method(
        "Elastic averaging",
        ("fm.policies.elastic_averaging(16, 0.2)",),
        "Links are slow and replicas differ in speed: exchanges are rare, and none waits.",
        "Few steps are affordable: the pull holds replicas apart from the centre, which follows them slowly.",
    ),
    "backup": Method(
        "Backup workers",
        ("fm.policies.backup_workers(96)",),
        "Step times have a heavy tail, and a few machines can be spared.",
        "Machines are alike: then the spare ones' work is lost for nothing.",
    ),
    "compensation": Method(
        "Live gradient compensation",
        ("fm.policies.compensate(0.75)",),
        "Slow replicas have data that others lack: what comes late counts one step later.",
        "Replicas are late by many steps, so that what is folded in is very old.",
    ),
    "coding": Method(
        "Gradient coding",
        ("fm.policies.coded(1)", 'fm.policies.coded(1, code="cyclic")'),
        "Updates must be exact, some replicas are very late, and computing is cheap beside waiting.",
        "Computing is what takes the time: each example is computed s + 1 times. Gradients are compressed with a loss.",
    ),
    "coded_reduce": Method(
        "CodedReduce",
        ("fm.policies.coded_reduce(4, 3, 1)",),
        "As for gradient coding, with many replicas: a tree computes less for as many stragglers in all.",
        "Stragglers gather under one parent, more than it bears; or parents are late, and those below them with "
        "them. Or links are slow: gradients go up the tree, but parameters go from the home to every replica and "
        "not down the tree, which then takes longer than what the tree saves.",
    ),
    "drop_compute": Method(
        "DropCompute",
        ("fm.policies.drop_compute(1.6)",),
        "There are several microbatches, and any replica may be slow in a step: each stops at the threshold.",
        "There is one microbatch, or communication is slow: a late message is not a late computation.",
    ),
    "rudra": Method(
        "Rudra, n-softsync",
        (
            "fm.policies.softsync(4)",
            "fm.policies.softsync(4, topology=fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), sites=6))",
        ),
        "Replicas differ in speed, and a rate that is divided by the staleness keeps training stable.",
        "The optimizer has momentum or divides by squares: the scaling is then lost, of which a warning tells.",
    ),
    "ring": Method(
        "Ring all-reduce",
        ("fm.policies.ring()",),
        "Layers are large, and the links of one home would be the bottleneck: no link carries more than twice a layer.",
        "Layers are small or latencies long: a sum takes 2 (N - 1) messages in turn. It waits for the slowest replica.",
    ),
    "d_psgd": Method(
        "D-PSGD",
        ('fm.policies.gossip("ring")',),
        "One home would be the bottleneck: each replica talks to its neighbours only.",
        "There are many replicas in a sparse graph and different data: what one learns reaches others slowly.",
    ),
    "no_loco": Method(
        "NoLoCo",
        ("fm.policies.no_loco(32)",),
        "There are hundreds of replicas far from each other: a synchronisation is one exchange of a pair.",
        "Few replicas on fast links: an average over all costs as little, and keeps them equal.",
    ),
    "diloco": Method(
        "DiLoCo",
        ("fm.policies.diloco(500)",),
        "Islands of machines have slow links between them.",
        "Links are fast: then synchronous training learns more from each step. Rounds wait for a slow replica.",
    ),
    "streaming_diloco": Method(
        "Streaming DiLoCo",
        ("fm.policies.diloco(32, fragments=2, delay=4, alpha=0.5)",),
        "Links between islands are so slow that also the rounds of DiLoCo wait for them: fragments in turn need a "
        "fraction of the rate, and the delay hides their exchange.",
        "Links carry a whole round at once. With alpha 0.5 a replica takes half of each outer step, so that a long "
        "fit which gains much by the outer momentum loses some of it: it ends at 1.4 times the loss of DiLoCo, and "
        "with alpha 0 at 1.02 times.",
    ),
    "decoupled": Method(
        "Decoupled DiLoCo",
        ("fm.policies.decoupled_diloco(20, quorum=1)",),
        "Learners fail or differ in speed, and there are enough of them for a round without some.",
        "Few equal learners: a quorum leaves out what could have counted for a short wait. A learner still stops "
        "for its own failures, and the share of time in which it is up bounds the goodput.",
    ),
    "sparse_loco": Method(
        "SparseLoCo",
        ("fm.policies.sparse_loco(32, 1 / 64, 2)",),
        "The way up of each replica is very slow: a change is sent in 1/60 to 1/146 of its bytes.",
        "Training is short: what is left out needs time to be sent. After 600 steps our loss was a quarter higher.",
    ),
    "gaia": Method(
        "Gaia",
        ("fm.policies.gaia(0.1, sites=2, staleness=2)",),
        "Machines are in a few places, such as data centres in several countries: links inside a place are fast, those "
        "between places slow. Most changes of a step are small beside the parameter that they change, and these wait "
        "on their site until they add up to something that matters.",
        "All links are alike: an all-reduce is then as fast, and exact. Or most changes are large beside their "
        "parameters, as at the beginning of a fit or at a high rate, and links carry a small share of a step's "
        "changes: then sites wait for each other again, as they do with two sites and 60 times slower links below.",
    ),
    "admm": Method(
        "Asynchronous ADMM",
        ("fm.policies.admm(1.0, share=2, staleness=8)",),
        "The problem is convex, as a lasso, and each replica keeps its own examples.",
        "The loss is not convex: nothing promises an optimum. Replicas that see new examples in each step.",
    ),
    "ensemble": Method(
        "Ensemble-compression",
        (),
        "Models that trained apart disagree: their mean output is better than their mean parameters.",
        "Distilling costs more than it gains: replicas that exchange often are nearly equal.",
    ),
    "voting": Method(
        "PV-tree voting",
        (),
        "There are many features, of which few matter: only their histograms are sent.",
        "There are few features, or more votes than half of them: then all histograms are sent anyway.",
    ),
    "power_sgd": Method(
        "PowerSGD",
        ("fm.policies.power_sgd(4)",),
        "Layers are large matrices and links are slow: two factors are sent instead.",
        "Layers are vectors or small: there is nothing to factor. Links faster than encoding is.",
    ),
    "one_bit": Method(
        "1-bit SGD",
        ("fm.policies.one_bit()",),
        "Links are slow, and error feedback has the time to repair what a sign loses.",
        "Links faster than encoding is, or contributions that may be dropped together with their error.",
    ),
    "qsgd": Method(
        "QSGD",
        ("fm.policies.qsgd(8)",),
        "Every element matters and links are slow: rounding has no bias, so no error has to be kept for later.",
        "Two bits or fewer: the noise of random rounding is then larger than the gradient. Links faster than encoding.",
    ),
    "top_k": Method(
        "Deep gradient compression",
        ("fm.policies.deep_compression(0.001)",),
        "Links are slow and training is long enough for small elements to be sent later.",
        "Links faster than choosing the largest elements is, or short training.",
    ),
    "skeleton": Method(
        "Random skeleton",
        ("fm.policies.skeleton(0.05)",),
        "Links are slow: positions are drawn on both sides, so only values are sent, and none is left out for ever.",
        "A few elements hold most of a gradient: those of largest magnitude teach more for the same bytes.",
    ),
}


ALSO = {
    "adam": ("adam_auto", "every"),
    "downpour": ("asynchronous",),
    "sandblaster": ("methods.lbfgs", "methods.Minimum", "methods.Vectors", "methods.Portions"),
    "chaos": ("methods.TimeModel",),
    "backup": ("quorum", "synchronous"),
    "decoupled": ("deadline",),
    "ring": ("all_reduce",),
    "d_psgd": ("choco",),
    "ensemble": ("ensemble_compression",),
    "voting": ("vote", "methods.boost", "methods.Boosted", "methods.Tree"),
}
"""Page -> names that belong to it, besides those of its calls: of `fm.policies`, or of `fm.methods`."""


def pages(*, check: bool) -> dict[str, str]:
    """The text of each file of the folder."""
    found = sections((DOCS / "reproduce.md").read_text())
    if list(found) != list(METHODS):
        raise SystemExit(f"docs/reproduce.md has {', '.join(found)}, and here are {', '.join(METHODS)}")
    rows = [f"| [{method.title}]({name}.md) | {_paper(found[name])} |" for name, method in METHODS.items()]
    index = (
        "# Methods of papers, one page each\n\nWritten by `scripts/method_pages.py`.\n\n| method | paper |\n|---|---|\n"
    )
    return {"README.md": index + "\n".join(rows) + "\n"} | {
        f"{name}.md": page(name, method, found[name], check=check) for name, method in METHODS.items()
    }


def sections(text: str) -> dict[str, str]:
    """The section of each claim in docs/reproduce.md."""
    parts = re.split(r"^## (\w+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))


def page(name: str, method: Method, section: str, *, check: bool) -> str:
    paper, _, run = section.partition("\n\n")
    made = "\n".join(f"- `{call}` is `{eval(call, {'fm': fm})!r}`" for call in method.calls)
    code = example(name)
    output = _there(name) if check else printed(code)
    composition = f"## Composition\n\n{made}\n\n" if made else ""
    return (
        f"# {method.title}\n\n{paper}\n\n{composition}**It helps** if: {method.helps}\n\n"
        f"**It does not** if: {method.hinders}\n\n## What you call\n\n{_functions(name, method)}\n\n"
        f"```python\n{code}```\n```text\n{output}```\n\n## What `flowml reproduce {name}` printed\n\n"
        f"{run.replace('](reproduce/', '](../reproduce/')}\n"
    )


def _functions(name: str, method: Method) -> str:
    """A line for each name that a user calls, with the first paragraph of its docstring."""
    called = [found for call in method.calls for found in re.findall(r"fm\.policies\.(\w+)", call)]
    names = [n if "." in n else f"policies.{n}" for n in dict.fromkeys([*called, *ALSO.get(name, ())])]
    return "\n".join(f"- `fm.{n}`: {_summary(n)}" for n in names)


def _summary(name: str) -> str:
    text = inspect.getdoc(operator.attrgetter(name)(fm)) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _there(name: str) -> str:
    """What the page says that its example printed."""
    file = FOLDER / f"{name}.md"
    found = re.search(r"^```text\n(.*?)^```$", file.read_text() if file.exists() else "", re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def _paper(section: str) -> str:
    return section.partition(";")[0]


def main() -> int:
    check = "--check" in sys.argv[1:]
    texts = pages(check=check)
    if check:
        there = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
        return 0 if there == texts else 1
    FOLDER.mkdir(exist_ok=True)
    for name, text in texts.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
