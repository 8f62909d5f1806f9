"""The scripts as users meet them: what they print, and one clear line where the input is wrong."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import pytest
from directories import CONTEXT, ROOT, save_model
from ml_collections import ConfigDict

from configs import generate as generate_config
from configs.bench import demo
from decode import benchmark, generate
from specjax import checkpoints, devices, engine, help, presets, prompts
from specjax.build import build, mentions
from specjax.data import tokenizers
from specjax.drafters import corpus as corpora
from specjax.models import hf, hf_heads
from specjax.models.eagle import eagle3_head, eagle_head
from specjax.models.hydra import hydra_heads
from specjax.models.medusa import medusa_heads
from specjax.types import Decoder, Params


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


def save_heads(directory: Path, heads: Any) -> str:
    """Heads of random weights."""
    shapes = jax.eval_shape(heads.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    hf_heads.save(directory, heads, jax.tree.map(lambda x: rng.normal(size=x.shape), shapes))
    return str(directory)


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
    assert [line["request"]["prompt"] for line in lines] == texts
    assert lines[0]["text"] + "\n" == streamed.out
    assert all(1 <= len(line["tokens"]) <= 12 for line in lines)


def test_generate_goes_on_where_it_was_stopped(
    directories: Directories, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """Lines that are there stay, half a line is written again, other options are refused."""
    file, output = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    given = [
        {"prompt": "import os", "id": "first", "temperature": 1.0},
        {"messages": [{"role": "user", "content": "x"}], "seed": 4},
        {"prompt": "def f(", "max_new_tokens": 3, "category": "not ours"},
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in given))
    target = directories.path / "chat"
    shutil.copytree(directories.target, target)
    (target / "chat_template.jinja").write_text("{{ messages[0].content }}:")
    options = {"prompts": str(file), "output": str(output), "num_samples": 2, "logprobs": 1}

    def run(**changes: Any) -> list[dict[str, Any]]:
        c = config(directories, **{**options, **changes})
        c.update(target=str(target), draft="", prompt="")
        generate.main(c)
        return [json.loads(line) for line in output.read_text().splitlines()]

    whole = run()
    assert [(line["index"], line["sample"]) for line in whole] == [
        (i, sample) for i in range(3) for sample in range(2)
    ]
    assert whole[0]["request"]["id"] == "first"
    assert whole[2]["request"]["messages"] == given[1]["messages"]
    assert len(whole[4]["tokens"]) <= 3
    assert whole[0]["tokens"] != whole[1]["tokens"]
    assert whole[2]["tokens"] == whole[3]["tokens"]  # greedy
    for line in whole:
        assert (
            len(line["logprobs"]["tokens"]) == len(line["logprobs"]["top"]) == len(line["tokens"])
        )
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    again = run(drafter="ngram", batch_size=2)
    assert again[:3] == whole[:3]
    for line, other in zip(again, whole, strict=True):
        told, expected = line.pop("logprobs"), other.pop("logprobs")
        np.testing.assert_allclose(told["tokens"], expected["tokens"], atol=1e-5)
    assert again == whole
    assert "6 texts already" not in capsys.readouterr().err
    run()
    assert "holds all 6 texts already" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"Line 1 .* with seed 0 but now it is 1; need the same"):
        run(seed=1)
    with pytest.raises(ValueError, match=r"Line 2 .* prompt 0, sample 1; need those of 3"):
        run(num_samples=1)
    output.write_text("something else\n")
    with pytest.raises(ValueError, match=r"Line 1 of .* is b'something else"):
        run()
    file.write_text('{"prompt": "x", "messages": []}\n')
    with pytest.raises(ValueError, match='need a JSON object with "prompt" or "messages"'):
        run()
    file.write_text('{"prompt": "x", "seed": "one"}\n')
    with pytest.raises(ValueError, match="seed of prompt 1 is 'one'; need a number"):
        run()


def test_generate_prints_one_document_for_programs(
    directories: Directories, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_as_json", lambda: True)
    monkeypatch.setattr(devices, "unused_accelerator", lambda: "A GPU is idle.")
    generate.main(config(directories, stop=("never written",)))
    out, err = capsys.readouterr()
    document = json.loads(out)
    (result,) = document["results"]
    assert result["request"]["prompt"] == "import os"
    assert document["statistics"]["num_tokens"] == len(result["tokens"]) == 12
    assert err == "warning: A GPU is idle.\n"
    with pytest.raises(ValueError, match="num_samples is 0"):  # who names a device knows it
        generate.main(config(directories, device="cpu", num_samples=0))
    assert capsys.readouterr().err == ""


class Stop(Exception):
    """Stands for decoding."""


def test_generate_drafts_with_what_a_directory_holds(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of every kind, with trees that suit them, no deeper than there are heads."""
    layer = dataclasses.replace(hf.load_config(directories.target), num_layers=1)
    heads: dict[str, tuple[Any, tuple]] = {
        "medusa": (medusa_heads(16, num_heads=2), ("coupled", 7, 2)),
        "hydra": (hydra_heads(16, num_heads=5, prefix=layer), ("coupled", 10, 4)),
        "eagle": (eagle_head(layer), ("point", 12, 4)),
        "eagle3": (eagle3_head(layer, (0,)), ("point", 12, 4)),
    }

    def stop(decoder: Decoder, params: Params, *_: object) -> NoReturn:
        raise Stop(decoder.proposal, jax.tree.structure(params.drafter))

    monkeypatch.setattr(engine, "prefill", stop)
    for name, (functions, proposal) in heads.items():
        c = config(directories, temperature=1.0)
        c.draft = save_heads(directories.path / name, functions)
        structure = jax.tree.structure(jax.eval_shape(functions.init, jax.random.key(0)))
        for tree, expected in (((), proposal), ((-1, 0, 1), ("coupled", 3, 2))):
            c.tree = tree
            with pytest.raises(Stop) as stopped:
                generate.main(c)
            assert stopped.value.args == (expected, structure)


@pytest.mark.slow
def test_generate_with_eagle3_says_what_plain_decoding_says(
    directories: Directories, capsys: pytest.CaptureFixture
) -> None:
    layer = dataclasses.replace(hf.load_config(directories.target), num_layers=1)
    printed = []
    for draft in ("", save_heads(directories.path / "eagle3", eagle3_head(layer, (0,)))):
        c = config(directories, temperature=1.0, seed=3)
        c.update(draft=draft, drafter="auto" if draft else "none")
        generate.main(c)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_prompts_from_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert prompts.read(file) == ["one", "two"]


# ------------------------------------------------------------------------------------------ --help


def helped(script: str | Path, *arguments: str, columns: int = 100) -> tuple[int, str, str]:
    """Status, standard output and standard error of a script."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": str(columns)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script and configs of its own, which do not wait for JAX."""
    root = tmp_path_factory.mktemp("repository")
    files = {
        "scripts/script.py": """
            '''Does nothing.

                python scripts/script.py  # or so
            '''

            from absl import flags
            from specjax import scripts

            flags.DEFINE_bool("json", False, "Prints JSON.")
            flags.DEFINE_integer("times", 3, "How often.")

            def main(c):
                raise AssertionError("main was called")

            scripts.run(main, "configs/base.py")
            """,
        "configs/base.py": """
            from ml_collections import ConfigDict

            def get_config():
                c = ConfigDict()
                # The order of the source,
                # not of the alphabet.
                c.zeta = 1
                c.words = "two words"  # said
                # and continued
                # Of one, not of the other.
                c.one = c.other = None  # both
                c.left, c.right = 1, 2  # of the pair
                c.long = tuple(range(100, 200))
                c.text = "first\\nsecond"
                c.inner = {  # within
                    "a": 1,  # the letter
                    "b": "#",
                    "deep er": {"x": 1},  # no name
                }
                c.inner.c = 0.5  # added
                c.inner.update(d=4)
                c.made = ConfigDict({"k": {"v": 1}})
                return c
            """,
        "configs/plain.py": """
            import ml_collections

            def get_config(size=""):
                config = ml_collections.ConfigDict({"size": size or 3, "b": 2})
                return config
            """,
        "configs/more/derived.py": """
            from configs import base

            def get_config():
                c = base.get_config()
                c.zeta = 7
                c.words = "other"  # said anew
                c.inner.c = 1.5
                c.new = True  # of this file
                return c
            """,
        "configs/alias.py": """
            from configs.more.derived import get_config as start

            def get_config():
                return start()
            """,
        "configs/broken.py": "def get_config():\n    raise RuntimeError('no\\nluck')\n",
    }
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(source).lstrip("\n"))
    return root


def option(text: str, name: str) -> str:
    """What a help says of an option, in one line."""
    rows = re.split(r"\n(?=  -|\n)", text)
    return " ".join(next(row for row in rows if row.startswith(f"  {name}")).split())


def test_help_of_generate() -> None:
    script = ROOT / "decode" / "generate.py"
    for flag in ("--help", "-h"):
        status, out, err = helped(script, "--config.nothing=1", flag, "--config.temperature=x")
        assert (status, err) == (0, "")
        assert out.startswith("Continues a prompt, a file of prompts or a conversation")
        assert "Options (configs/generate.py)\n" in out
        assert "  --config.seed=0\n" in out
        assert re.search(r"\n  --config.steps_per_call=0 {2,}between two looks at a text", out)
        assert option(out, "--config.tree_of_heads").endswith("parents as in `tree`")
        stands_for = "--config.drafters what each name stands for: {eagle, hydra,"
        assert option(out, "--config.drafters").startswith(stands_for)
        assert "\n  --json " in out
        assert "specjax.drafters" not in out.split("Options")[1]
        assert "--verbosity=1" in out
        assert "--config=FILE" in out
        assert max(map(len, out.splitlines())) <= 100


def test_help_lists_entries_with_their_comments(repository: Path) -> None:
    status, out, err = helped(repository / "scripts/script.py", "--helpshort", "--json=maybe")
    assert (status, err) == (0, "")
    assert out.startswith("Does nothing.\n\n    python scripts/script.py  # or so\n\nOptions (conf")
    zeta = "--config.zeta=1 The order of the source, not of the alphabet."
    assert option(out, "--config.zeta") == zeta
    assert option(out, "--config.words") == '--config.words="two words" said and continued'
    assert option(out, "--config.one") == "--config.one=None Of one, not of the other. both"
    assert option(out, "--config.other") == "--config.other=None Of one, not of the other. both"
    assert option(out, "--config.right") == "--config.right=2 of the pair"
    assert option(out, "--config.text") == "--config.text=first..."
    assert option(out, "--config.long").endswith("...")
    assert option(out, "--config.inner") == "--config.inner within: {a, b, c, d, deep er}"
    assert option(out, "--config.inner.a") == "--config.inner.a=1 the letter"
    assert option(out, "--config.inner.c") == "--config.inner.c=0.5 added"
    assert option(out, "--config.inner.d") == "--config.inner.d=4"
    assert option(out, "--config.made") == "--config.made {k}"
    assert "inner.b" not in out
    assert "inner.deep" not in out
    assert option(out, "--json") == "--json Prints JSON."
    assert option(out, "--times") == "--times=3 How often."
    assert out.index("config.zeta") < out.index("config.words") < out.index("config.inner")
    narrow = helped(repository / "scripts/script.py", "-help", columns=50)[1]
    assert max(map(len, narrow.splitlines())) <= 50
    assert option(narrow, "--config.zeta") == zeta


def test_help_of_a_derived_config(repository: Path) -> None:
    for name in ("more/derived", "alias"):
        file = repository / "configs" / f"{name}.py"
        out = helped(repository / "scripts/script.py", f"--config={file}", "--help")[1]
        assert f"Options (configs/{name}.py)" in out
        zeta = "--config.zeta=7 The order of the source, not of the alphabet."
        assert option(out, "--config.zeta") == zeta
        assert option(out, "--config.words") == "--config.words=other said anew"
        assert option(out, "--config.inner.c") == "--config.inner.c=1.5 added"
        assert option(out, "--config.new") == "--config.new=True of this file"


def test_help_of_a_config_without_comments(repository: Path) -> None:
    file = str(repository / "configs/plain.py")
    for given, size in ((file, "3"), (f"{file}:large", "large")):
        out = helped(repository / "scripts/script.py", "-h", "--config", given)[1]
        assert f"  --config.b=2\n  --config.size={size}\n" in out
        assert "Options (configs/plain.py)" in out


@pytest.mark.parametrize(
    ("config", "message"),
    [("nowhere.py", "FileNotFoundError"), ("configs/broken.py", "RuntimeError: no luck")],
)
def test_help_where_the_config_cannot_be_had(repository: Path, config: str, message: str) -> None:
    file = repository / config
    status, out, err = helped(repository / "scripts/script.py", f"--config={file}", "--help")
    assert (status, err) == (0, "")
    assert out.startswith("Does nothing.")
    assert message in " ".join(out.split())
    assert "Other flags" in out


def test_help_of_a_script_without_a_default() -> None:
    status, out, _ = helped(ROOT / "train" / "train.py", "--help")
    assert status == 0
    assert "must be given: --config=FILE" in out


def test_help_is_what_was_asked_for() -> None:
    assert help.wanted(["--config.prompt=x", "-h"])
    assert not help.wanted(["--config.prompt=-h", "--helpfull"])
    assert not help.wanted(["--", "--help"])


def test_help_finds_comments_of_every_config() -> None:
    """Of whatever form they are, and a good deal of them."""
    found = {file: help.comments(file, ROOT) for file in sorted((ROOT / "configs").glob("**/*.py"))}
    assert all(found.values())
    assert sum(bool(note) for notes in found.values() for note in notes.values()) > 100


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


@pytest.mark.slow
def test_generate_drafts_in_another_vocabulary(
    directories: Directories, capsys: pytest.CaptureFixture
) -> None:
    generate.main(config(directories, drafter="none"))
    plain = capsys.readouterr().out
    c = config(directories)
    c.draft = directories.other
    generate.main(c)
    out, err = capsys.readouterr()
    assert out == plain
    assert re.search(r"other has another vocabulary; it drafts the \d+ tokens that it shares", err)


def test_generate_has_drafters_without_a_draft(
    directories: Directories, capsys: pytest.CaptureFixture
) -> None:
    """All that the config names can be built; one that reads documents runs."""
    made = corpora.corpus(
        [np.arange(300, dtype=np.int32)],
        300,
        tokenizer=corpora.fingerprint(tokenizers.load(directories.target).get_vocab()),
    )
    documents = directories.path / "corpus"
    corpora.save(made, documents)
    c = config(directories, draft="", corpus=str(documents), layers=(0,))
    models = checkpoints.load(c.target)
    for name, spec in c.drafters.items():
        c.drafter = name
        if not mentions(spec, "draft"):
            options = presets.Options(corpus=c.corpus, layers=c.layers)
            assert presets.decoder(models, name, options=options)[0].lossless, name
    c.drafter = "none"
    generate.main(c)
    plain = capsys.readouterr().out
    c.drafter = "retrieval"
    generate.main(c)
    assert capsys.readouterr().out == plain
    c.corpus = ""
    with pytest.raises(ValueError, match=r"is 'retrieval' but no corpus .* train/corpus.py made"):
        generate.main(c)
    c.update(drafter="layer_skip", layers=())
    with pytest.raises(ValueError, match="is 'layer_skip' but no layers were given"):
        generate.main(c)


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
        ({"tree": (-1, 0, 3)}, "Node 2 of tree .* has parent 3"),
        ({"num_draft_tokens": 0}, "root alone"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be from 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps_per_call": -1}, "steps_per_call is -1"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"logprobs": 301}, "logprobs is 301; it must be 0 to 300"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
        ({"stop": ("a", "")}, "Stop string 2 of 2 is empty"),
        ({"chat": True}, r"has no chat template but got 1 message\(s\)"),
        ({"device": "abacus"}, "device is 'abacus'; need cpu, gpu or tpu"),
        ({"output": "out.txt"}, "output is 'out.txt'; need a name that ends in .jsonl"),
        ({"drafter": "guess"}, "drafter is 'guess'; need auto or one of"),
        ({"drafter": "model", "draft": ""}, "drafter is 'model' but no draft was given"),
        ({"drafter": "eagle"}, "drafter is 'eagle' but .* holds one for 'model'"),
        ({"draft": "wide heads"}, "hidden size 8, but the target's is 16"),
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
    if c.draft == "wide heads":
        c.draft = save_heads(directories.path / "wide", medusa_heads(8))
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
        ({"drafts": {"draft": ""}}, "needs @draft"),
    ],
    ids=str,
)
def test_benchmark_refuses(
    directories: Directories, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "prefill", refuse)
    c = demo.get_config()
    for name in demo.HEADS:
        del c.methods[name], c.methods[f"sampled {name}"]
    c.update(target=directories.target, drafts={"draft": directories.draft})
    c.update(options)
    with pytest.raises(ValueError, match=message):
        benchmark.main(c)


def test_build_says_what_a_function_takes() -> None:
    with pytest.raises(ValueError, match="num_tokens"):
        build({"call": "specjax.drafters.lookup.lookup", "length": 3})
    with pytest.raises(ValueError, match="names no function"):
        build({"call": "lookup"})
    with pytest.raises(ValueError, match="takes num_tokens: int, but @count is of type str"):
        build({"call": "specjax.drafters.lookup.lookup", "num_tokens": "@count"}, count="3")


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
