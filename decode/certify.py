"""Certifies that rules and methods write exactly what the target would have written.

    python decode/certify.py                                     # configs/certify.py

Rules: each verifier of `config.rules` behind each drafter of `laboratory.PROPOSALS` whose law it
declares, by enumeration of all it can do, in float32 and in float64. A law that it does not declare
is refused, which is no failure unless `config.laws` asks for that law. Methods: each drafter and
verifier of `config.methods`, "@draft" being the laboratory's draft model, by all checks of
`exactness.certify`.

A rule of your own needs no config; its module has to be found, so from its directory

    PYTHONPATH=. python decode/certify.py --config.rules.mine.call=module.rule --config.only=mine

The method that it is made for takes a config, and so do arguments:

    from configs import certify
    from configs.bench import demo

    def get_config():
        c = certify.get_config()
        rule = {"call": "module.rule", "width": 3}
        c.rules = {"mine": rule}
        c.methods = {"mine on a tree": certify.method(demo.tree("independent"), rule)}
        return c

Exits with status 1 and a line that names what failed, or else with status 0. Writes results.json,
results.md and, of rules, results.png into `config.output`; what is known so far, after every check.
"""

import contextlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specjax import exactness, laboratory, plots, scripts
from specjax.build import build, mentions
from specjax.laboratory import Check, Factory, Pair, Parts
from specjax.types import LAWS, Drafter, Verifier

_DTYPES = ("float32", "float64")
_PATIENCE = 1200.0  # seconds over which the time left is estimated


class Method(NamedTuple):
    """A drafter and a verifier."""

    factory: Factory
    about: dict[str, Any]
    num_checks: int


def main(c: ConfigDict) -> None:
    try:
        failed = run(c)["failed"]
    except KeyboardInterrupt:
        print(f"interrupted; {c.output} has what was found", file=sys.stderr, flush=True)
        os._exit(130)  # XLA goes on making draws, which would crash an interpreter in its last acts
    if failed:
        sys.exit(f"not certified: {'; '.join(failed)}")


def run(c: ConfigDict) -> dict[str, Any]:
    """Certifies, writes and prints. Returns what results.json holds."""
    _refuse_unknown(c)
    rules = {name: _built(name, spec, Verifier) for name, spec in _chosen(c, c.rules).items()}
    methods = {name: _method(c, name, spec) for name, spec in _chosen(c, c.methods).items()}
    if not rules and not methods:
        raise ValueError("There is nothing to certify; name a rule or a method.")
    behind = [(rule, name) for rule in rules for name in c.proposals]
    declared = [pair for pair in behind if _declares(rules[pair[0]], pair[1])]
    num_checks = len(declared) * len(c.dtypes) + sum(m.num_checks for m in methods.values())
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=_PATIENCE,
    )
    output = _empty(Path(c.output))
    start = time.perf_counter()
    certificate: dict[str, Any] = {
        "passed": False,
        "complete": False,
        "failed": [],
        "seconds": 0.0,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rules": [],
        "methods": [],
    }

    def found(failure: str | None = None) -> None:
        certificate["failed"] += [failure] if failure else []
        certificate["seconds"] = time.perf_counter() - start
        _write(output, certificate)

    found()
    try:
        with progress, jax.default_matmul_precision("highest"):
            task = progress.add_task("", total=num_checks)
            for rule, proposal in behind:
                for dtype in c.dtypes:
                    name = f"{rule} on {proposal} in {dtype}"
                    progress.update(task, description=name)
                    record = _enumerated(c, rule, rules[rule], proposal, dtype)
                    certificate["rules"].append(record)
                    found(name if record["outcome"] == "failed" else None)
                    progress.advance(task, int((rule, proposal) in declared))
                jax.clear_caches()  # about a hundred live programs exhaust LLVM
            for name, method in methods.items():
                progress.update(task, description=name)
                checks: list[dict[str, Any]] = []
                certificate["methods"].append({"method": name, **method.about, "checks": checks})
                every = exactness.certify(name, method.factory, len(methods), c.bfloat16)
                for check in _guarded(every):
                    checks.append(_plain(check._asdict()))
                    found(None if check.passed else f"{name}: {check.name}")
                    progress.advance(task)
                jax.clear_caches()
        certificate.update(complete=True, passed=not certificate["failed"])
        found()
    finally:
        if certificate["rules"]:
            plots.distances(certificate["rules"], output / "results.png")
    _show(output, certificate, console)
    return certificate


# ------------------------------------------------------------------------------- what is asked for


def _refuse_unknown(c: ConfigDict) -> None:
    for what, names, known in (
        ("proposal", c.proposals, [*laboratory.PROPOSALS]),
        ("law", c.laws, LAWS),
        ("dtype", c.dtypes, _DTYPES),
        ("rule or method", c.only, [*c.rules, *c.methods]),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"There is no {what} {name!r}; need one of {', '.join(known)}.")
    if c.rules and not (c.proposals and c.dtypes):
        raise ValueError("A rule is certified behind proposals, in a dtype; name one of each.")


def _chosen(c: ConfigDict, specs: ConfigDict) -> dict[str, Any]:
    """Those of `config.only`, if it names any; a rule whose call is "" is a blank."""
    return {
        name: spec
        for name, spec in specs.items()
        if (not c.only or name in c.only) and getattr(spec, "call", None) != ""
    }


def _built(name: str, spec: Any, kind: type, **given: Any) -> Any:
    try:
        built = build(spec, **given)
    except Exception as error:  # what a config calls may raise anything
        kind_of_error = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{name!r} cannot be built: {kind_of_error}{error}") from error
    if not isinstance(built, kind):
        raise ValueError(f"{name!r} builds a {type(built).__name__}; need a {kind.__name__}.")
    return built


def _method(c: ConfigDict, name: str, spec: Any) -> Method:
    for part in ("drafter", "verifier"):
        if part not in spec:
            raise ValueError(f"Method {name!r} has no {part}.")

    def factory(pair: Pair) -> Parts:
        given = {"target": pair.target, "draft": pair.draft}
        return Parts(
            _built(name, spec.drafter, Drafter, **given),
            pair.draft_params if mentions(spec.drafter, "draft") else (),
            _built(name, spec.verifier, Verifier, **given),
        )

    drafter, _, verifier = factory(laboratory.tabular_pair())  # finds mistakes before all else
    about = {
        "drafter": spec.drafter.call,
        "verifier": spec.verifier.call,
        "law": drafter.proposal.law,
        "num_nodes": drafter.proposal.num_nodes,
        "depth": drafter.proposal.depth,
    }
    return Method(factory, about, 7 + verifier.drafter_invariant + bool(c.bfloat16))


def _declares(verifier: Verifier, proposal: str) -> bool:
    laws = laboratory.PROPOSALS[proposal].build.proposal.laws
    return bool(set(laws) & set(verifier.laws))


# ------------------------------------------------------------------------------------------ checks


def _enumerated(
    c: ConfigDict, rule: str, verifier: Verifier, proposal: str, dtype: str
) -> dict[str, Any]:
    """The record of a rule behind a proposal, in a precision."""
    how = laboratory.PROPOSALS[proposal]

    def run() -> Iterator[Check]:
        with exactness.float64() if dtype == "float64" else contextlib.nullcontext():
            pair = laboratory.tabular_pair(how.vocab_size, jnp.dtype(dtype), zeros=how.zeros)
            check = exactness.enumeration(laboratory.proposing(proposal, verifier), pair)
        yield check

    (check,) = _guarded(run())
    laws = how.build.proposal.laws
    is_refused = not _declares(verifier, proposal) and not set(laws) & set(c.laws)
    outcome = "refused" if is_refused else "passed" if check.passed else "failed"
    about = {"rule": rule, "proposal": proposal, "law": laws[0], "dtype": dtype}
    return {**about, "outcome": outcome, **_plain(check._asdict())}


def _guarded(checks: Iterator[Check]) -> Iterator[Check]:
    """The checks; one that raises has failed and is the last."""
    start = time.perf_counter()
    try:
        for check in checks:
            yield check
            start = time.perf_counter()
    except Exception as error:
        if "KeyboardInterrupt" in str(error):  # came while the laboratory made a draw
            raise KeyboardInterrupt from error
        verdict = f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        figures = {"traceback": traceback.format_exc()}
        yield Check("running", False, verdict, figures, time.perf_counter() - start)


def _plain(x: Any) -> Any:
    """As JSON can have it: what is not finite is null."""
    if isinstance(x, Mapping):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if hasattr(x, "item"):  # a scalar of numpy
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ----------------------------------------------------------------------------------------- results


def _empty(output: Path) -> Path:
    """The directory, without another run's results."""
    output.mkdir(parents=True, exist_ok=True)
    for kind in ("json", "md", "png"):
        (output / f"results.{kind}").unlink(missing_ok=True)
    return output


def _write(output: Path, certificate: dict[str, Any]) -> None:
    """What is known so far, for programs and for pages."""
    lines = [f"# {_title(certificate)}", ""]

    def add(title: str, header: list[str], rows: list[list[str]]) -> None:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines.extend([title, "", f"| {' | '.join(header)} |", "|" + " --- |" * len(header)])
        lines.extend([f"| {' | '.join(row)} |" for row in cells] + [""])

    for dtype in _dtypes(certificate):
        add(f"Total variation in {dtype}:", *_matrix(certificate, dtype))
    lines += [f"* {line}" for line in _failures_of_rules(certificate)] + [""]
    for method in certificate["methods"]:
        rows = [
            [check["name"], _answer(check["passed"]), check["verdict"], f"{check['seconds']:.1f}"]
            for check in method["checks"]
        ]
        add(f"Method {method['method']}:", ["check", "", "verdict", "seconds"], rows)
    texts = {"json": json.dumps(certificate, indent=1) + "\n", "md": "\n".join(lines)}
    for kind, text in texts.items():
        new = output / f"results.{kind}.new"
        new.write_text(text)
        new.replace(output / f"results.{kind}")  # whole, even if stopped right now


def _show(output: Path, certificate: dict[str, Any], console: Console) -> None:
    """The summary on the terminal."""

    def table(header: list[str], rows: list[list[str]], title: str) -> None:
        shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, name in enumerate([title, *header[1:]]):
            shown.add_column(name, justify="right" if i else "left")
        for row in rows:
            failed = any(cell.startswith("FAIL") for cell in row)
            shown.add_row(*row, style="red" if failed else "")
        console.print(shown)

    for dtype in _dtypes(certificate):
        header, rows = _matrix(certificate, dtype)
        table(header, [[cell.replace("refused", "-") for cell in row] for row in rows], dtype)
    if certificate["rules"]:
        console.print("Total variation; -: refused, for the rule does not declare the law")
    rows = []
    for method in certificate["methods"]:
        checks = method["checks"]
        passed = sum(check["passed"] for check in checks)
        answer = _answer(passed == len(checks))
        seconds = sum(check["seconds"] for check in checks)
        rows.append([method["method"], answer, f"{passed}/{len(checks)}", f"{seconds:.0f}"])
    if rows:
        table(["", "", "checks", "seconds"], rows, "method")
    failed = _failures_of_rules(certificate)
    for method in certificate["methods"]:
        wrong = [check for check in method["checks"] if not check["passed"]]
        failed += [f"{method['method']}: {x['name']}: {x['verdict']}" for x in wrong]
    for line in failed:
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(_title(certificate), highlight=False, soft_wrap=True)
    files = ", ".join(sorted(path.name for path in output.glob("results.*")))
    console.print(f"Written to {output}: {files}", highlight=False)


def _title(certificate: dict[str, Any]) -> str:
    counted = [r for r in certificate["rules"] if r["outcome"] != "refused"]
    num_checks = len(counted) + sum(len(m["checks"]) for m in certificate["methods"])
    answer = "Certified" if certificate["passed"] else "NOT CERTIFIED"
    if not certificate["complete"]:
        answer = "UNFINISHED"
    return (
        f"{answer}: {num_checks - len(certificate['failed'])} of {num_checks} checks passed in "
        f"{certificate['seconds']:.0f} s, {certificate['device']}, jax {certificate['jax']}"
    )


def _dtypes(certificate: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(record["dtype"] for record in certificate["rules"]))


def _matrix(certificate: dict[str, Any], dtype: str) -> tuple[list[str], list[list[str]]]:
    """Proposals by rules: header and rows."""
    records = [record for record in certificate["rules"] if record["dtype"] == dtype]
    found = {(record["rule"], record["proposal"]): record for record in records}
    rules, proposals = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))

    def cell(record: dict[str, Any] | None) -> str:
        if record is None:  # not yet
            return ""
        if record["outcome"] == "refused":
            return "refused"
        distance = record["figures"].get("total_variation")
        text = "" if distance is None else f"{distance:.0e}"
        return text if record["outcome"] == "passed" else f"FAIL {text}".strip()

    rows = [[name, *(cell(found.get((rule, name))) for rule in rules)] for name in proposals]
    return ["proposal", *rules], rows


def _failures_of_rules(certificate: dict[str, Any]) -> list[str]:
    return [
        f"{r['rule']} on {r['proposal']} in {r['dtype']}: {r['verdict']}"
        for r in certificate["rules"]
        if r["outcome"] == "failed"
    ]


def _answer(passed: bool) -> str:
    return "pass" if passed else "FAIL"


if __name__ == "__main__":
    scripts.run(main, "configs/certify.py")
