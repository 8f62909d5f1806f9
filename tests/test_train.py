"""The trainer: an interrupted run resumes to the same curve, and its export is complete."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from specjax.data import batches, tokenizers
from specjax.models import hf
from specjax.models.transformer import TransformerConfig, forward, transformer
from specjax.objectives.distill import distill
from specjax.objectives.next_token import cross_entropy, next_token

_ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("train_script", _ROOT / "train" / "train.py")
assert _spec is not None
assert _spec.loader is not None
trainer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trainer)

_MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
}


def _config(directory: Path, name: str, **changes: object) -> ConfigDict:
    text = directory / "text"
    text.mkdir(exist_ok=True)
    for file in ("a.py", "b.py", "heapq.py"):
        lines = [f"def {file[0]}{i}(x): return x + {i % 7}\n" for i in range(120)]
        (text / file).write_text("".join(lines))
    config = ConfigDict(
        {
            "objective": "next_token",
            "workdir": str(directory / name),
            "export": str(directory / f"{name}-export"),
            "target": "",
            "sources": (str(text),),
            "vocab_size": 280,
            "model": _MODEL,
            "sequence_length": 16,
            "batch_size": 4,
            "num_steps": 20,
            "optimizer": "muon",
            "learning_rate": 1e-2,
            "adam_learning_rate": 1e-2,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "seed": 0,
            "log_every": 1,
            "eval_every": 5,
            "eval_sequences": 4,
            "checkpoint_every": 5,
            "keep_checkpoints": 2,
        }
    )
    config.update(changes)
    return config


def _curve(config: ConfigDict) -> list[dict]:
    lines = Path(config.workdir, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def test_interrupted_run_resumes_to_the_same_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _config(tmp_path, "whole")
    trainer.train(whole)

    class Interrupted:
        """A data iterator that dies in mid-epoch, between two checkpoints."""

        def __init__(self, inner: object) -> None:
            self.inner, self.left = inner, 13

        def __next__(self) -> np.ndarray:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return next(self.inner)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    pieces, real = _config(tmp_path, "pieces"), batches.batches
    with monkeypatch.context() as patch:
        patch.setattr(batches, "batches", lambda *args: Interrupted(real(*args)))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(pieces)
    assert _curve(pieces)[-1]["step"] == 13
    assert not Path(pieces.export).exists()
    trainer.train(pieces)
    assert _curve(pieces) == _curve(whole)

    exported, recipe = (
        hf.load(whole.export),
        json.loads(Path(whole.export, "recipe.json").read_text()),
    )
    assert exported.params["embed_tokens"].dtype == jnp.bfloat16
    assert exported.eos_ids == (0,)
    assert recipe["last"]["step"] == 20
    assert tokenizers.load(whole.export).get_vocab_size() == 280
    assert recipe["last"]["validation_loss"] < recipe["curve"][0]["validation_loss"]

    changes = {"objective": "distill", "target": whole.export, "optimizer": "adamw"}
    draft = _config(tmp_path, "draft", num_steps=10, **changes)
    trainer.train(draft)
    first, last = _curve(draft)[0], _curve(draft)[-1]
    assert last["kl"] < first["kl"]
    assert last["teacher_forced_acceptance"] > first["teacher_forced_acceptance"]
    hf.check_same_vocabulary(whole.export, draft.export)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "guess"}, "Objective 'guess' is unknown; use next_token or distill"),
        ({"objective": "distill"}, "Objective distill has no target; set config.target"),
        ({"optimizer": "sgd"}, "Optimizer 'sgd' is unknown; use adamw or muon"),
        ({"target": "/nowhere"}, "/nowhere is not a directory"),
        ({"batch_size": 10_000}, "batch_size is 10000; need 1 to"),
    ],
)
def test_errors_are_one_clear_line(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trainer.train(_config(tmp_path, "bad", **changes))
    assert "\n" not in str(error.value)


def test_losses_match_their_formulas() -> None:
    config = TransformerConfig(vocab_size=11, **_MODEL)
    model = transformer(config)
    p_params, q_params = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    batch = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)), jnp.int32)

    def log_law(params: dict) -> np.ndarray:
        logits = np.asarray(forward(model, params, batch[:, :-1]).logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    log_p, log_q = log_law(p_params), log_law(q_params)
    nats = -np.take_along_axis(log_q, np.asarray(batch)[:, 1:, None], 2).mean()
    loss, _ = next_token(model).loss(q_params, (), batch, jax.random.key(0))
    np.testing.assert_allclose(loss, nats, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(log_q, batch[:, 1:]).mean(), nats, rtol=1e-5)
    loss, metrics = distill(model, model).loss(q_params, p_params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rtol=1e-4)
    accepted = np.minimum(np.exp(log_p), np.exp(log_q)).sum(-1).mean()
    np.testing.assert_allclose(metrics["teacher_forced_acceptance"], accepted, rtol=1e-5)
