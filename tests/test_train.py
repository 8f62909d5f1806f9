"""The trainer: every config learns and decodes, runs resume bit for bit, mistakes cost nothing."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from directories import ROOT, save_model
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from specjax import checkpoints, engine, sampling
from specjax.build import build
from specjax.data import mixture
from specjax.data import tokenizers as bpe
from specjax.drafters import grow
from specjax.drafters.eagle import eagle
from specjax.drafters.hydra import hydra
from specjax.drafters.medusa import medusa
from specjax.drafters.model import model
from specjax.drafters.none import none
from specjax.models import hf, hf_heads
from specjax.timing import matmul_flops
from specjax.types import Drafter, Params
from specjax.verifiers.match import match
from train import compare


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


trainer = _load(ROOT / "train" / "train.py")
CONFIGS = sorted(
    {path.stem for path in (ROOT / "configs" / "train").glob("*.py")}
    - {"corpus", "skip"}  # which train nothing
)
QUICK = ("draft",)  # the others are slow tests
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2}
TINY |= {"num_kv_heads": 1, "head_dim": 8}
LAYER = {"intermediate_size": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}


@pytest.fixture(scope="module", autouse=True)
def _compile_each_program_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of one config are the same programs; only whole processes forget them."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("programs")), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("models") / "target"
    return save_model(directory, num_layers=2)


def shrunk(name: str, directory: Path, target: str, **changes: object) -> ConfigDict:
    """A config on tiny models and a few lines of text, in directories of its own."""
    text = directory / "sources"
    text.mkdir(exist_ok=True)
    for file in ("a.py", "b.py", "heapq.py"):
        lines = [f"def {file[0]}{i}(x): return x + {i % 7}\n" for i in range(120)]
        (text / file).write_text("".join(lines))
    c = _load(ROOT / "configs" / "train" / f"{name}.py").get_config()
    if isinstance(c.options.get("model"), ConfigDict):
        c.options.model = TINY
    for part in ("head", "prefix"):
        if part in c.options:
            c.options[part] = LAYER
    if c.feature_layers:
        c.feature_layers = (0, 1)
    if "build" in c.options:
        c.options.build.num_tokens = 2
    for option in ("num_heads", "num_steps"):
        if option in c.options:
            c.options[option] = 2
    if c.target:
        c.target = target
    if "warmup_steps" in c.options:
        c.options.warmup_steps = 4
    if name != "draft":  # compiles faster
        c.optimizer = {"call": "specjax.optimizers.adamw", "learning_rate": 3e-3}
    c.optimizer.warmup_steps = 2
    c.generated.update(num_rows=8, round_steps=6, prompt_length=4, batch_size=8)
    c.eval.update(every=5, num_sequences=4, num_prompts=2, prompt_length=4, max_new_tokens=6)
    c.update(sources=(str(text),), vocab_size=280, sequence_length=16, batch_size=4, num_steps=10)
    c.update(log_every=1, checkpoint_every=5, accumulate=1, dtype="float32")
    c.update(workdir=str(directory / name), export=str(directory / f"{name}-export"))
    c.update(changes)
    return c


def curve(c: ConfigDict) -> list[dict]:
    lines = Path(c.workdir, "metrics.jsonl").read_text().splitlines()
    timed = ("tokens_per_second", "share_of_matmul_peak")
    return [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines]


def weights(c: ConfigDict) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(c.export).rglob("*.safetensors")}


def drafter_of(models: checkpoints.Checkpoints) -> Drafter:
    """What a user would draft with, by what the directory holds."""
    draft = models.drafts["draft"].model
    build = grow.static((-1, 0, 0, 1), grow.best())
    kind = type(draft).__name__
    if kind == "Model":
        return model(draft, build)
    make = {"MedusaHeads": medusa, "HydraHeads": hydra, "EagleHead": eagle}[kind]
    return make(models.target, draft, build)


def texts(models: checkpoints.Checkpoints, drafter: Drafter, params: Params) -> np.ndarray:
    decoder = engine.decoder(models.target, drafter, match())
    prompt = jnp.arange(2, 14, dtype=jnp.int32).reshape(3, 4)
    full = jnp.full([3], 24)
    keys = jax.random.split(jax.random.key(0), 3)
    how = sampling.sampling(3, [0.0, 0.0, 1.0])
    length = jnp.array([4, 2, 3])
    return np.asarray(
        engine.decode(decoder, params, keys, how, prompt, length, full, 24).context.tokens
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CONFIGS],
)
def test_a_config_learns_and_its_result_decodes_exactly(
    name: str, tmp_path: Path, target: str
) -> None:
    c = shrunk(name, tmp_path, target, num_steps=20)
    if name == "hydra":
        c.update(dtype="bfloat16", accumulate=2)
    if name == "draft":
        c.options.remat = True
    trainer.train(c)
    records = curve(c)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert np.mean([r["loss"] for r in records[-5:]]) < np.mean([r["loss"] for r in records[:5]])
    evaluations = [r for r in records if "score" in r]
    assert [r["step"] for r in evaluations] == [5, 10, 15, 20]
    recipe = json.loads(Path(c.export, "recipe.json").read_text())
    assert recipe["best"]["score"] == max(r["score"] for r in evaluations)
    if not c.target:
        assert hf.load(c.export).eos_ids == (0,)
        assert bpe.load(c.export).get_vocab_size() == 280
        return
    for record in evaluations:
        for temperature in (0, 1):
            assert 1 <= record[f"mat_at_{temperature}"] <= 3
            assert record[f"teacher_forced_mat_at_{temperature}"] >= 1
            assert len(record[f"alpha_pos_at_{temperature}"]) == 2
    # Medusa-2's target is its own.
    where, draft = (c.export, f"{c.export}/heads") if name == "medusa2" else (target, c.export)
    models = checkpoints.load(where, draft)
    params = Params(models.target_params, models.drafts["draft"].params)
    plain = texts(models, none(), Params(models.target_params))
    np.testing.assert_array_equal(texts(models, drafter_of(models), params), plain)


class Dies:
    """A data iterator that is interrupted between two checkpoints."""

    def __init__(self, inner: object, left: int) -> None:
        self.inner, self.left = inner, left

    def __next__(self) -> dict:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return next(self.inner)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


@pytest.mark.slow
def test_an_interrupted_mixture_resumes_bit_for_bit(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, what the target wrote and what the student writes, with accumulated gradients."""
    shares = {"text": (1.0, 0.0), "target": (1.0, 1.0), "student": (0.0, 1.0)}
    changes = {"data": shares, "num_steps": 20, "accumulate": 2}
    for name in ("whole", "pieces"):
        (tmp_path / name).mkdir()
    whole = shrunk("text", tmp_path / "whole", target, **changes)
    trainer.train(whole)
    pieces, real = shrunk("text", tmp_path / "pieces", target, **changes), mixture.mixture
    with monkeypatch.context() as patch:  # within a round of what the student wrote
        patch.setattr(mixture, "mixture", lambda *args, **how: Dies(real(*args, **how), 14))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(pieces)
    assert not Path(pieces.export).exists()
    trainer.train(pieces)
    assert curve(pieces) == curve(whole)
    assert weights(pieces) == weights(whole) != {}
    assert len(list(Path(whole.workdir, "student").glob("*/rows_*.npz"))) > 1


def test_a_run_stops_at_the_first_step_that_is_not_finite(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = shrunk("medusa", tmp_path, target, log_every=100)
    c.optimizer.learning_rate = float("nan")
    with pytest.raises(ValueError, match=r"not finite at step 2; the last good checkpoint is none"):
        trainer.train(c)
    assert not Path(c.export).exists()


@pytest.mark.slow
def test_a_teacher_cache_trains_as_the_teacher_would(tmp_path: Path, target: str) -> None:
    c = shrunk("draft", tmp_path, target, teacher_cache=300, num_steps=5)
    (tmp_path / "live").mkdir()
    live = shrunk("draft", tmp_path / "live", target, num_steps=5)
    initial = save_model(tmp_path / "initial", seed=1)
    Path(initial, "recipe.json").write_text('{"num_params": 7}')
    for run in (c, live):
        run.options.initial = initial
        trainer.train(run)
        assert json.loads(Path(run.export, "recipe.json").read_text())["initial"]["num_params"] == 7
    losses = [[r["loss"] for r in curve(x)] for x in (c, live)]
    # Probabilities of the cache are float16, each right to 2^-11, and so is their sum.
    np.testing.assert_allclose(*losses, atol=2**-10)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("draft", {"objective": "specjax.objectives.guess.guess"}, "names no function"),
        ("draft", {"target": ""}, "Objective distill has no target; set config.target"),
        ("draft", {"target": "/nowhere"}, "/nowhere is not a directory"),
        ("draft", {"batch_size": 10_000}, "a batch of 10000 needs as many"),
        ("draft", {"data": {"web": (1.0, 1.0)}}, "Data of kind 'web' cannot be had"),
        ("medusa", {"data": {"student": (1.0, 1.0)}}, "'student' cannot be had for .*medusa"),
        ("draft", {"mesh": {"data": 3}}, "takes 3 devices, which do not divide"),
        ("draft", {"accumulate": 3}, "Batch 4 in 3 microbatches does not divide"),
        ("draft", {"teacher_cache": 4, "data": {"target": (1.0, 1.0)}}, "cache needs a target and"),
        ("eagle3", {"options": {"head": {**LAYER, "hidden_size": 8}}}, "hidden size 8 .* target"),
        ("eagle3", {"feature_layers": (9,)}, "Feature layer 9 does not exist"),
    ],
)
def test_errors_are_one_clear_line(
    name: str, changes: dict, message: str, tmp_path: Path, target: str
) -> None:
    c = shrunk(name, tmp_path, target)
    with c.ignore_type():
        c.update(changes)
    if "data" in changes:
        c.data = ConfigDict(changes["data"])
    with pytest.raises(ValueError, match=message) as error:
        trainer.train(c)
    assert "\n" not in str(error.value)


def test_a_foreign_tokenizer_is_refused(tmp_path: Path, target: str) -> None:
    other = save_model(tmp_path / "other")
    bpe.save(bpe.train_bpe([Path(__file__).read_text()], 320), other)
    with pytest.raises(ValueError, match=r"tokens in tokenizer.json but a model of 300"):
        trainer.train(shrunk("draft", tmp_path, other))


def test_a_broken_recipe_is_found_before_training(tmp_path: Path, target: str) -> None:
    initial = save_model(tmp_path / "initial", seed=1)
    Path(initial, "recipe.json").write_text('{"num_params": ')
    c = shrunk("draft", tmp_path, target)
    c.options.initial = initial
    with pytest.raises(ValueError, match=r"initial/recipe.json is not valid JSON .*; need a JSON"):
        trainer.train(c)
    assert not Path(c.workdir, "checkpoints").exists()


def test_matmul_flops_count_every_round_of_a_loop() -> None:
    x, w = jnp.ones((8, 16)), jnp.ones((16, 32))
    product = 2 * 8 * 16 * 32

    def looped(x: jax.Array) -> jax.Array:
        def body(total: jax.Array, i: jax.Array) -> tuple:
            branches = [lambda: (x @ w).sum(), lambda: x.sum()]
            return total + jax.lax.switch(i, branches), None

        return jax.lax.scan(body, 0.0, jnp.arange(2))[0]

    assert matmul_flops(jax.jit(lambda x: jnp.tanh(x @ w)), x) == product
    assert matmul_flops(looped, x) == product  # half of two rounds
    twice = jax.value_and_grad(lambda x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x).sum())
    assert matmul_flops(twice, x) == 3 * product  # forward, again, backward


@pytest.mark.slow
def test_compare(target: str, tmp_path: Path) -> None:
    """A run of two steps beside itself; a second call trains and measures nothing."""
    c = _load(ROOT / "configs" / "compare.py").get_config()
    for name, run in c.runs.items():
        own = compare._config(c, name, 1)
        assert own.seed == 1
        assert all(build(own.options[x]) for x in ("loss",) if x in own.options)
        assert run.config in own.export or "changes" in run
    for name in set(c.runs) - {"forward KL"}:
        del c.runs[name]
    c.comparisons = (("forward KL", "forward KL"),)
    c.update(target=target, output=str(tmp_path), seeds=(3,), num_prompts=2)
    c.update(prompt_length=8, max_new_tokens=6, build=c.build.to_dict() | {"num_tokens": 2})
    sources = tmp_path / "sources.py"
    sources.write_text((ROOT / "specjax" / "types.py").read_text() * 3)
    c.common = {
        "options": {"model": TINY},
        "sources": (str(sources),),
        "sequence_length": 16,
        "batch_size": 4,
        "accumulate": 1,
        "num_steps": 2,
        "optimizer": {
            "call": "specjax.optimizers.adamw",
            "learning_rate": 1e-3,
            "warmup_steps": 1,
        },
        "checkpoint_every": 2,
        "eval": {
            "every": 2,
            "num_sequences": 4,
            "num_prompts": 2,
            "prompt_length": 4,
            "max_new_tokens": 4,
        },
    }
    compare.main(c)
    records = json.loads((tmp_path / "results.json").read_text())
    runs = [(r["run"], r["temperature"]) for r in records]
    assert runs == [("forward KL", t) for t in (0.0, 1.0)]
    assert all(r["mat_over"]["forward KL"]["difference"] == 0 for r in records)
    assert all(1 <= r["mat"] <= 3 and r["seeds"] == [r["mat"]] for r in records)
    page = (tmp_path / "results.md").read_text()
    assert page.count("| forward KL |") == 4
    assert (tmp_path / "results.png").stat().st_size > 1000
    trained = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert len(trained) == 1
    compare.main(c)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == trained
    assert json.loads((tmp_path / "results.json").read_text()) == records


# ------------------------------------------------------------------------------- whole processes


def command(c: ConfigDict, directory: Path) -> list[str]:
    """The script itself on a config file."""
    file = directory / "config.py"
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict(json.loads({c.to_json()!r}))\n"
    )
    return [sys.executable, str(ROOT / "train" / "train.py"), f"--config={file}"]


@pytest.mark.slow
def test_killed_at_ten_random_steps_a_run_ends_with_the_same_parameters(
    tmp_path: Path, target: str
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    changes = {"num_steps": 120, "checkpoint_every": 6}
    whole, killed = (
        shrunk("draft", tmp_path / name, target, **changes) for name in ("whole", "killed")
    )
    for c in (whole, killed):
        c.eval.every = 40
    subprocess.run(command(whole, tmp_path / "whole"), check=True, capture_output=True)
    log, run = Path(killed.workdir, "metrics.jsonl"), command(killed, tmp_path / "killed")
    rng = random.Random(0)
    steps = sorted(rng.sample(range(2, 118), 10))
    for step in steps:
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            text = log.read_text() if log.exists() else ""
            if f'"step": {step},' in text:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.002)
        assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
    subprocess.run(run, check=True, capture_output=True)
    assert weights(killed) == weights(whole) != {}
    assert curve(killed) == curve(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft", "eagle3"])
def test_eight_devices_see_the_losses_of_one(name: str, tmp_path: Path, target: str) -> None:
    losses = []
    for mesh in ({"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}):
        where = tmp_path / str(len(losses))
        where.mkdir()
        c = shrunk(name, where, target, num_steps=5, batch_size=8)
        c.eval.num_sequences = 8
        c.mesh = ConfigDict(mesh)
        flags = "--xla_force_host_platform_device_count=8"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        done = subprocess.run(command(c, where), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses.append([r["loss"] for r in curve(c)])
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-5)


@pytest.mark.slow
def test_a_full_disk_costs_a_line_and_nothing_else(tmp_path: Path, target: str) -> None:
    """Files may not grow beyond a size that the first checkpoints stay below."""
    c = shrunk("draft", tmp_path, target, num_steps=40)
    limited = f"ulimit -f 40; exec {' '.join(command(c, tmp_path))}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "failed (File too large)" in done.stderr
    done = subprocess.run(command(c, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hf_heads.kind(c.export) == "model"
