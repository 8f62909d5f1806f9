"""The README's code runs as it stands there."""

import contextlib
import io
import re
from typing import Any

import pytest
from directories import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(title: str) -> list[str]:
    """The Python code of a section."""
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_a_drafter_is_added_and_certified() -> None:
    names: dict[str, Any] = {}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for code in blocks("How to add a drafter"):
            exec(code, names)
    checks = [line.split()[:2] for line in output.getvalue().splitlines()]
    assert len(checks) == 8
    assert {verdict for verdict, _ in checks} == {"ok"}, output.getvalue()
    assert checks[0][1] == "enumeration"
    with pytest.raises(ValueError, match="num_tokens is 1; a vocabulary of 5 needs 2"):
        names["unigram"](5, 1)
    section = README.split("\n## How to add a drafter\n")[1].split("\n## ")[0]
    assert len(section.strip().splitlines()) < 60


def test_five_lines_make_a_model_faster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    (code,) = blocks("Use")
    assert sum(map(bool, code.splitlines())) <= 5
    exec(code, names)
    same, plain, fast = re.findall(r"True|[\d.]+", capsys.readouterr().out)
    assert same == "True"
    assert float(fast) > float(plain)
    assert names["fast"].statistics.tokens_per_pass > 1.4


def test_parts_are_put_together_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    for code in blocks("Parts"):
        exec(code, names)
    assert names["state"].context.length.tolist() == [64, 48]
