"""The scripts as users meet them: what they print, and one clear line where the input is wrong."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from directories import CONTEXT, ROOT, save_model
from ml_collections import ConfigDict

from configs import generate as generate_config
from configs.bench import demo
from decode import benchmark, generate
from specjax import engine, prompts
from specjax.build import build


class Directories(NamedTuple):
    target: str
    draft: str
    other: str  # of another vocabulary
    path: Path  # for more


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    path = tmp_path_factory.mktemp("checkpoints")
    return Directories(
        save_model(path / "target"),
        save_model(path / "draft", seed=1),
        save_model(path / "other", vocab_size=310),
        path,
    )


def config(directories: Directories, **options: object) -> ConfigDict:
    c = generate_config.get_config()
    c.update(target=directories.target, draft=directories.draft, prompt="import os")
    c.update(max_new_tokens=12, **options)
    return c


# ------------------------------------------------------------------------------------ what is right


def test_generate_streams_what_a_batch_prints(
    directories: Directories, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    generate.main(config(directories, temperature=1.0, seed=3))
    streamed = capsys.readouterr()
    assert "tokens per target pass" in streamed.err
    assert "compilation" in streamed.err
    # Three prompts, of which two at a time; plain decoding, which under `match` says the same.
    file = tmp_path / "prompts.jsonl"
    texts = ["import os", "x", "def f(a, b):"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    batched = config(directories, temperature=1.0, seed=3, prompts=str(file), batch_size=2)
    batched.update(drafter="none", prompt="")
    generate.main(batched)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == texts
    assert lines[0]["text"] + "\n" == streamed.out
    assert all(1 <= line["tokens"] <= 12 for line in lines)


def test_prompts_from_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert prompts.read(file) == ["one", "two"]


# ------------------------------------------------------------------------------------ what is wrong


def refuse(*_: object, **__: object) -> NoReturn:
    raise AssertionError("compiled before the input was checked")


def damaged(directories: Directories, name: str) -> str:
    """A copy of the target with one thing wrong."""
    copy = directories.path / name
    if copy.exists():
        return str(copy)
    copy.mkdir()
    for file in Path(directories.target).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if name == "truncated":
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    if name == "unsupported":
        text = (copy / "config.json").read_text()
        (copy / "config.json").write_text(text.replace("LlamaForCausalLM", "MambaForCausalLM"))
    if name == "tokenless":
        (copy / "tokenizer.json").unlink()
    return str(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x =" * CONTEXT}, f"context is {CONTEXT}"),
        ({"prompts": "nowhere.txt", "prompt": ""}, r"nowhere.txt does not exist"),
        ({"target": "nowhere"}, "nowhere is not a directory"),
        ({"target": ""}, "No target was given"),
        ({"target": "truncated"}, "model.safetensors"),
        ({"target": "unsupported"}, "MambaForCausalLM"),
        ({"target": "tokenless"}, "tokenizer.json"),
        ({"draft": "other"}, "vocabulary of 300 .* 310"),
        ({"tree": (-1, 0, 3)}, "Node 2 of tree .* has parent 3"),
        ({"num_draft_tokens": 0}, "root alone"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps_per_call": 0}, "steps_per_call is 0"),
        ({"drafter": "guess"}, "drafter is 'guess'; need one of"),
        ({"drafter": "model", "draft": ""}, "needs a draft"),
        ({"verifier": "hope"}, "specjax.verifiers.hope.hope"),
        ({"choose": "worst"}, "worst"),
        ({"dtype": "float8"}, "float8"),
    ],
    ids=str,
)
def test_generate_refuses(
    directories: Directories, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "prefill", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    c = config(directories)
    c.update(options)
    if c.target in ("truncated", "unsupported", "tokenless"):
        c.target = damaged(directories, c.target)
    if c.draft == "other":
        c.draft = directories.other
    with pytest.raises(ValueError, match=message):
        generate.main(c)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": (0.5,)}, "no baseline"),
        ({"temperatures": (-1.0,)}, "temperature is -1"),
        ({"temperatures": ()}, "temperatures"),
        ({"repeats": 0}, "repeats is 0"),
        ({"num_prompts": 0}, "0 prompts"),
        ({"prompt_length": CONTEXT}, f"context is {CONTEXT}"),
        ({"draft": ""}, "needs a draft"),
    ],
    ids=str,
)
def test_benchmark_refuses(
    directories: Directories, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "prefill", refuse)
    c = demo.get_config()
    c.update(target=directories.target, draft=directories.draft)
    c.update(options)
    with pytest.raises(ValueError, match=message):
        benchmark.main(c)


def test_build_says_what_a_function_takes() -> None:
    with pytest.raises(ValueError, match="num_tokens"):
        build({"call": "specjax.drafters.lookup.lookup", "length": 3})
    with pytest.raises(ValueError, match="names no function"):
        build({"call": "lookup"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.target=nowhere", "--config.prompt=x"], "nowhere is not a directory"),
        (["--config.max_tokens=1"], "no entry 'max_tokens'"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    script = str(ROOT / "decode" / "generate.py")
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tmp_path,  # the default config is found from anywhere
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
