"""The certificate as its reader meets it: what passes, what fails, and what is said about it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from directories import ROOT
from ml_collections import ConfigDict

from configs import certify as certify_config
from configs.bench import demo
from decode import certify
from specjax import exactness, laboratory
from specjax.drafters import grow
from specjax.laboratory import PROPOSALS, Check, Factory, Pair, Proposing, tabular_pair
from specjax.types import (
    Array,
    Draft,
    Verdict,
    Verifier,
)

BLOCK, HYBRID, REJECTION = map(certify_config.rule, ("block", "hybrid", "rejection"))


def here(name: str) -> dict:
    return {"call": f"{__name__}.{name}"}


def config(path: Path, **options: Any) -> ConfigDict:
    """A single enumeration, unless the options say otherwise."""
    c = certify_config.get_config()
    c.output = str(path)
    c.rules, c.methods = {}, {}
    c.proposals, c.dtypes, c.bfloat16 = ("chain",), ("float32",), False
    for name, value in options.items():
        c[name] = value
    return c


def failure(c: ConfigDict) -> tuple[str, dict[str, Any]]:
    """The line that a failing certificate ends with, and the certificate."""
    with pytest.raises(SystemExit) as ended:
        certify.main(c)
    assert isinstance(ended.value.code, str), "status 1, and a line on stderr"
    assert "\n" not in ended.value.code
    certificate = json.loads((Path(c.output) / "results.json").read_text())
    assert not certificate["passed"]
    assert (Path(c.output) / "results.md").read_text().startswith("# NOT CERTIFIED: ")
    return ended.value.code, certificate


# ------------------------------------------------------------------------------------ rules to try


def raising() -> Verifier:
    def verify(*_: Any) -> Verdict:
        raise TypeError("no such verdict")

    return Verifier(verify, ("chain",))


# ------------------------------------------------------------------------------------ what is right


def test_a_good_rule_is_certified(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    c = config(tmp_path, rules={"good": BLOCK})
    c.update(proposals=("chain", "coupled"), dtypes=("float32", "float64"))
    certify.main(c)  # no SystemExit: status 0
    certificate = json.loads((tmp_path / "results.json").read_text())
    assert certificate["passed"]
    assert certificate["complete"]
    assert certificate["failed"] == []
    assert certificate["seconds"] >= sum(record["seconds"] for record in certificate["rules"])
    found = {(r["proposal"], r["dtype"]): r for r in certificate["rules"]}
    assert [r["outcome"] for r in found.values()] == ["passed", "passed", "refused", "refused"]
    assert found["chain", "float32"]["figures"]["total_variation"] < 1e-6
    assert found["chain", "float64"]["figures"]["total_variation"] < 1e-12
    page = (tmp_path / "results.md").read_text()
    assert page.startswith("# Certified: 2 of 2 checks passed in ")
    assert "| coupled | refused |" in page
    assert (tmp_path / "results.png").stat().st_size > 1000
    assert "Certified: 2 of 2 checks passed" in capsys.readouterr().out
    assert jnp.zeros(1).dtype == jnp.float32, "float64 is over"


def test_a_good_method_is_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one check, the quickest of two decoders."""
    everything = exactness.certify

    def first(*arguments: Any) -> Iterator[Check]:
        yield next(everything(*arguments))

    monkeypatch.setattr(exactness, "certify", first)
    c = config(tmp_path, methods={"plain": certify_config.method(demo.NONE, demo.MATCH)})
    certify.main(c)
    (method,) = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert (method["method"], method["law"], method["num_nodes"]) == ("plain", "point", 1)
    assert [check["name"] for check in method["checks"]] == ["enumeration"]
    page = (tmp_path / "results.md").read_text()
    assert "\nMethod plain:\n" in page
    assert "| enumeration | pass | total variation " in page
    assert not (tmp_path / "results.png").exists(), "a picture of rules"


def imagined(passed: bool = True) -> Check:
    figures = {"total_variation": 1e-8 if passed else float("nan")}
    return Check("imagined", passed, "as | told", figures, 0.25)


def test_the_default_config_asks_for_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple] = []

    def all_checks(name: str, factory: Factory, num_tests: int, bfloat16: bool) -> Iterator[Check]:
        pair = tabular_pair()
        parts = factory(pair)
        asked.append((name, num_tests, bfloat16, parts.drafter_params is pair.draft_params))
        for _ in range(6 + parts.verifier.drafter_invariant + bfloat16):
            yield imagined()

    monkeypatch.setattr(exactness, "enumeration", lambda *_: imagined())
    monkeypatch.setattr(exactness, "certify", all_checks)
    c = certify_config.get_config()
    c.output = str(tmp_path)
    certificate = certify.run(c)
    assert certificate["passed"]
    pairs = len(certify_config.RULES) * len(PROPOSALS)
    assert len(certificate["rules"]) == 2 * pairs
    refused = {r["rule"] for r in certificate["rules"] if r["outcome"] == "refused"}
    assert refused == set(certify_config.RULES) - {"match", "rejection"}
    of_heads = {n for n in demo.get_config().methods if any(head in n for head in demo.HEADS)}
    assert {name for name, *_ in asked} >= set(demo.get_config().methods) - of_heads
    for name, num_tests, bfloat16, drafts in asked:
        assert (num_tests, bfloat16) == (len(asked), True)
        assert drafts == (name not in ("none", "lookup"))
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_what_was_found_survives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enumeration(factory: Factory, pair: Pair) -> Check:
        if (tmp_path / "results.json").read_text().count('"imagined"'):
            raise KeyboardInterrupt
        return imagined()

    monkeypatch.setattr(exactness, "enumeration", enumeration)
    (tmp_path / "results.png").write_text("of another run")
    c = config(tmp_path, rules={"good": BLOCK, "later": REJECTION})
    with pytest.raises(KeyboardInterrupt):
        certify.run(c)
    certificate = json.loads((tmp_path / "results.json").read_text())
    assert [record["rule"] for record in certificate["rules"]] == ["good"]
    assert not certificate["complete"]
    assert not certificate["passed"]
    assert (tmp_path / "results.md").read_text().startswith("# UNFINISHED: 1 of 1 checks")
    assert (tmp_path / "results.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------ what is wrong


def test_a_lying_rule_fails(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rules = {"mine": {"call": "faults.without_residual"}}
    line, certificate = failure(config(tmp_path, rules=rules))
    assert line == "not certified: mine on chain in float32"
    assert certificate["failed"] == ["mine on chain in float32"]
    (record,) = certificate["rules"]
    assert record["outcome"] == "failed"
    assert record["figures"]["total_variation"] > 0.01
    page = (tmp_path / "results.md").read_text()
    assert "| chain | FAIL " in page
    assert "* mine on chain in float32: total variation " in page
    assert "mine on chain in float32: total variation " in capsys.readouterr().out
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_what_raises_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    """And a law that was asked for may not be refused."""
    c = config(tmp_path, rules={"mine": here("raising"), "other": HYBRID}, laws=("chain",))
    line, certificate = failure(c)
    assert line == "not certified: mine on chain in float32; other on chain in float32"
    raised, refused = certificate["rules"]
    assert raised["verdict"] == "raised TypeError: no such verdict"
    assert "test_certify.py" in raised["figures"]["traceback"]
    assert refused["outcome"] == "failed"
    both = "proposes law 'chain' but the verifier is lossless for hybrid only"
    assert both in refused["verdict"]
    assert both in (tmp_path / "results.md").read_text()


def test_a_method_whose_parts_do_not_fit_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    spec = certify_config.method(demo.chain("coupled"), BLOCK)
    line, certificate = failure(config(tmp_path, methods={"mixed": spec}))
    assert line == "not certified: mixed: enumeration"
    (method,) = certificate["methods"]
    (check,) = method["checks"]
    both = "proposes law 'coupled' but the verifier is lossless for chain only"
    assert both in check["verdict"]
    assert both in capsys.readouterr().out


def handing_over(change: Callable[[Draft], Array]) -> Proposing:
    """A chain of two tokens whose drafter hands over `change` of the laws that it drew from."""
    build = grow.chain(2, grow.without_replacement())

    def grown(*arguments: Any) -> Draft:
        draft = build.grow(*arguments)
        return draft.replace(probs=change(draft))

    return Proposing(grow.Builder(grown, build.proposal), vocab_size=2)


@pytest.mark.slow
def test_a_broken_draft_has_a_clear_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(draft: Draft) -> Array:
        """First too much and all of it the other token's, then nothing."""
        first = jax.nn.one_hot(1 - draft.tokens[:, :2], 2) * 1.25
        return jnp.concatenate([first, draft.probs[:, 2:] * jnp.nan], 1)

    monkeypatch.setitem(PROPOSALS, "broken", handing_over(broken))
    c = config(tmp_path, rules={"rejection": REJECTION}, proposals=("broken",))
    line, certificate = failure(c)
    assert line == "not certified: rejection on broken in float32"
    (record,) = certificate["rules"]
    for complaint in (
        "draft: probs are NaN or negative",
        "draft: probs do not sum to 1",
        "draft: a drafted token has probability 0",
    ):
        assert complaint in record["verdict"], record["verdict"]
        assert complaint in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_logits_that_are_nan_have_a_clear_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Pair:
        pair = tabular_pair(*arguments, **options)
        return pair._replace(target_params=pair.target_params.at[0].set(jnp.nan))

    monkeypatch.setattr(laboratory, "tabular_pair", broken)
    monkeypatch.setitem(PROPOSALS, "short", handing_over(lambda draft: draft.probs))
    c = config(tmp_path, rules={"rejection": REJECTION}, proposals=("short",))
    _, certificate = failure(c)
    (record,) = certificate["rules"]
    assert "the target's log-weights are NaN" in record["verdict"]
    assert record["figures"]["total_variation"] is None, "NaN is not JSON"


# --------------------------------------------------------------------------- mistakes in the config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": {"mine": {"call": "nowhere.rule"}}}, "'mine' cannot be built: 'nowhere.rule'"),
        ({"rules": {"mine": here("nothing")}}, "names no function"),
        ({"rules": {"mine": {**BLOCK, "width": 3}}}, r"called with \(width\).*it takes \(\)"),
        ({"rules": {"mine": demo.LOOKUP}}, "'mine' builds a Drafter; need a Verifier"),
        ({"rules": {"mine": "block"}}, "'mine' builds a str; need a Verifier"),
        ({"rules": {"mine": BLOCK}, "proposals": ("bush",)}, "no proposal 'bush'; need one of "),
        ({"rules": {"mine": BLOCK}, "proposals": ()}, "name one of each"),
        ({"rules": {"mine": BLOCK}, "dtypes": ("float8",)}, "no dtype 'float8'; need one of "),
        ({"rules": {"mine": BLOCK}, "laws": ("chains",)}, "no law 'chains'; need one of point"),
        ({"rules": {"mine": BLOCK}, "only": ("other",)}, "no rule or method 'other'"),
        ({"rules": {"mine": {"call": ""}}}, "nothing to certify"),
        ({"methods": {"mine": {"drafter": demo.NONE}}}, "'mine' has no verifier"),
        (
            {"methods": {"mine": certify_config.method(demo.tree("best", (-1, 0, 3)), BLOCK)}},
            "'mine' cannot be built: Node 2 of tree",
        ),
        (
            {"methods": {"mine": certify_config.method({**demo.LOOKUP, "ngram": "x"}, BLOCK)}},
            "'mine' cannot be built: TypeError",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        certify.main(config(tmp_path / "never", **options))
    assert not (tmp_path / "never").exists(), "before anything runs"


def test_a_rule_of_ones_own_from_the_command_line(tmp_path: Path) -> None:
    """Status 1 and one line; nothing has to be compiled to refuse a law."""
    own = tmp_path / "own.py"
    own.write_text(
        "from specjax.verifiers.hybrid import hybrid\n\n\ndef rule():\n    return hybrid()\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "decode" / "certify.py"),
            "--config.rules.mine.call=own.rule",
            "--config.only=mine",
            "--config.proposals=chain",
            "--config.laws=chain",
            "--config.dtypes=float32",
            "--config.output=results",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:.", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "not certified: mine on chain in float32\n"
    assert "NOT CERTIFIED: 0 of 1 checks passed" in done.stdout
    assert (tmp_path / "results" / "results.png").stat().st_size > 1000
