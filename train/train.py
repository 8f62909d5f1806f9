"""Trains a target from text, or a draft model from its target, in one straight line.

    python train/train.py --config=configs/train/target.py
    python train/train.py --config=configs/train/draft.py

Writes metrics.jsonl and Orbax checkpoints into `config.workdir` and, at the end, a Hugging Face
directory into `config.export`. Interrupted at any moment, the same command resumes exactly:
parameters, optimizer, data order and randomness.
"""

import json
import os
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specjax import scripts
from specjax.data import batches, sources, tokenizers
from specjax.models import hf
from specjax.models.transformer import TransformerConfig, num_params, transformer
from specjax.objectives.distill import distill
from specjax.objectives.next_token import next_token
from specjax.types import Array, PyTree


def _layer_matrices(params: PyTree) -> PyTree:
    """The axes (in, out) of what Muon orthogonalises; None at embeddings, heads and norms."""

    def axes(path: tuple, x: Array) -> MuonDimensionNumbers | None:
        in_layer = any("layers_" in jax.tree_util.keystr((key,)) for key in path)
        return MuonDimensionNumbers(1, 0) if in_layer and x.ndim == 2 else None

    return jax.tree_util.tree_map_with_path(axes, params)


def train(c: ConfigDict) -> None:
    """Trains, resuming where an earlier run of the same config stopped, and exports."""
    workdir = Path(c.workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)

    # The target, whose tokens and law a draft learns.
    checkpoint = hf.load(c.target, jnp.float32) if c.target else None

    # Text, tokenizer, packed sequences.
    documents = sources.text_files(c.sources) if c.sources else sources.standard_library()
    training, held_out = sources.split(documents)
    if not held_out:
        raise ValueError(
            f"None of {len(documents)} documents is held out for validation; name one of them "
            f"like one of {sources.HELD_OUT[:3]}."
        )
    if checkpoint is not None:
        if not checkpoint.eos_ids:
            raise ValueError(
                f"{c.target} names no end-of-text id; training separates texts by one."
            )
        tokenizer = tokenizers.load(c.target)
        vocab_size, end_id = checkpoint.config.vocab_size, checkpoint.eos_ids[0]
    else:
        tokenizer = tokenizers.train_bpe((d.text for d in training), c.vocab_size)
        vocab_size, end_id = tokenizer.get_vocab_size(), 0
    tokens = batches.encode(training, tokenizer, end_id)
    sequences = batches.pack(tokens, c.sequence_length)
    validation_tokens = batches.encode(held_out, tokenizer, end_id)
    validation = batches.pack(validation_tokens, c.sequence_length)[: c.eval_sequences]
    bytes_per_token = batches.bytes_per_token(held_out, validation_tokens)
    data = batches.batches(sequences, c.batch_size, c.seed)

    # Model and objective.
    try:
        config = TransformerConfig(vocab_size=vocab_size, **c.model)
    except TypeError as error:
        raise ValueError(f"config.model has {sorted(c.model)}: {error}.") from error
    model = transformer(config)
    target_params: PyTree = ()
    if c.objective == "next_token":
        objective = next_token(model)
    elif c.objective == "distill":
        if checkpoint is None:
            raise ValueError("Objective distill has no target; set config.target to a directory.")
        target_params = checkpoint.params
        objective = distill(model, transformer(checkpoint.config))
    else:
        raise ValueError(f"Objective {c.objective!r} is unknown; use next_token or distill.")

    # Optimizer: warm-up, then a cosine to zero; only matrices decay.
    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, c.warmup_steps, c.num_steps)

    learning_rate = schedule(c.learning_rate)
    if c.optimizer == "adamw":
        optimizer = optax.adamw(
            learning_rate,
            b2=0.95,
            weight_decay=c.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        )
    elif c.optimizer == "muon":  # for the layers' matrices; Adam for all else
        optimizer = muon(
            learning_rate,
            weight_decay=c.weight_decay,
            adam_b2=0.95,
            adam_learning_rate=schedule(c.adam_learning_rate),
            muon_weight_dimension_numbers=_layer_matrices,
        )
    else:
        raise ValueError(f"Optimizer {c.optimizer!r} is unknown; use adamw or muon.")
    optimizer = optax.chain(optax.clip_by_global_norm(c.clip_norm), optimizer)

    # Data parallel over every device: parameters replicated, batches split by rows.
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    if c.batch_size % jax.device_count():
        raise ValueError(f"Batch {c.batch_size} does not divide over {jax.device_count()} devices.")

    def init_state(rng_key: Array) -> PyTree:
        params = objective.init(rng_key, target_params)
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

    def train_step(
        state: PyTree, target_params: PyTree, batch: Array
    ) -> tuple[PyTree, dict[str, Array]]:
        rng_key = jax.random.fold_in(jax.random.key(c.seed), state["step"])
        gradient = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, metrics), grads = gradient(state["params"], target_params, batch, rng_key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), **metrics}
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    def eval_step(params: PyTree, target_params: PyTree, batch: Array) -> dict[str, Array]:
        loss, metrics = objective.loss(params, target_params, batch, jax.random.key(c.seed))
        return {"loss": loss, **metrics}

    rng_key = jax.random.key(c.seed)
    state = jax.jit(init_state, out_shardings=replicated)(rng_key)
    target_params = jax.device_put(target_params, replicated)
    train_step = jax.jit(
        train_step, in_shardings=(replicated, replicated, by_row), donate_argnums=0
    )
    eval_step = jax.jit(eval_step, in_shardings=(replicated, replicated, by_row))

    # Resume.
    manager = ocp.CheckpointManager(
        workdir / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=c.keep_checkpoints, create=True),
    )
    metrics_file = workdir / "metrics.jsonl"
    history: list[dict] = []
    if (step := manager.latest_step()) is not None:
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state), data=ocp.args.JsonRestore()
            ),
        )
        state = restored["state"]
        data.set_state(restored["data"])
        history = [json.loads(line) for line in metrics_file.read_text().splitlines()]
        history = [record for record in history if record["step"] <= step]
        print(f"Resumed from step {step} of {c.num_steps} in {workdir}.", flush=True)
    metrics_file.write_text("".join(json.dumps(record) + "\n" for record in history))

    def evaluate(params: PyTree) -> dict[str, float]:
        rows = len(validation) // c.batch_size * c.batch_size
        results = [
            eval_step(params, target_params, jnp.asarray(validation[i : i + c.batch_size]))
            for i in range(0, rows, c.batch_size)
        ]
        mean = {k: float(np.mean([r[k] for r in results])) for k in results[0]}
        mean["bits_per_byte"] = mean["cross_entropy"] / np.log(2) / bytes_per_token
        return {f"validation_{k}": v for k, v in mean.items()}

    # Train.
    size = num_params(state["params"])
    print(
        f"{c.objective}: {size / 1e6:.2f}M parameters, {len(tokens) / 1e6:.2f}M tokens of text, "
        f"{c.num_steps * c.batch_size * c.sequence_length / 1e6:.1f}M tokens of training, "
        f"{jax.device_count()} {jax.default_backend()} device(s)",
        flush=True,
    )
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), TextColumn("{task.description}")) as progress,
        open(metrics_file, "a") as log,
    ):
        done = int(state["step"])
        task = progress.add_task("", total=c.num_steps, completed=done)
        started, since = time.perf_counter(), done
        while done < c.num_steps:
            state, metrics = train_step(state, target_params, next(data))
            done += 1
            evaluated = done % c.eval_every == 0 or done == c.num_steps
            if done % c.log_every == 0 or evaluated:
                record = {"step": done, **{k: float(v) for k, v in metrics.items()}}
                seconds = time.perf_counter() - started
                rate = (done - since) * c.batch_size * c.sequence_length / seconds
                started, since = time.perf_counter(), done
                record |= {"tokens_per_second": rate, "learning_rate": float(learning_rate(done))}
                if not np.isfinite(record["loss"]):
                    raise ValueError(
                        f"Loss is {record['loss']} at step {done}; the last good checkpoint is "
                        f"step {manager.latest_step()} in {workdir}."
                    )
                if evaluated:
                    record |= evaluate(state["params"])
                    started = time.perf_counter()
                history.append(record)
                log.write(json.dumps(record) + "\n")
                log.flush()
                shown = [f"loss {record['loss']:.3f}", f"{rate:,.0f} tokens/s"]
                latest = [r for r in history if "validation_loss" in r]
                if latest:
                    shown.append(f"validation {latest[-1]['validation_loss']:.3f}")
                progress.update(task, completed=done, description=", ".join(shown))
            if done % c.checkpoint_every == 0 or done == c.num_steps:
                manager.save(
                    done,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state),
                        data=ocp.args.JsonSave(data.get_state()),
                    ),
                )
        manager.wait_until_finished()

    # Export, with all that a reader needs to judge and repeat it.
    params = jax.device_get(state["params"])
    hf.save(c.export, config, params, dtype=jnp.bfloat16, eos_ids=(end_id,), bos_id=end_id)
    tokenizers.save(tokenizer, c.export)
    evaluations = [r for r in history if "validation_loss" in r]
    tenth = [r for r in evaluations if r["step"] <= 0.9 * c.num_steps][-1]["validation_loss"]
    recipe = {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "config": json.loads(c.to_json()),
        "num_params": size,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "training_text": sources.describe(training),
        "held_out_text": sources.describe(held_out),
        "tokens_seen": c.num_steps * c.batch_size * c.sequence_length,
        "last": evaluations[-1],
        "gain_over_last_tenth": 1 - evaluations[-1]["validation_loss"] / tenth,
        "curve": [{k: r[k] for k in ("step", "loss", "validation_loss")} for r in evaluations],
    }
    Path(c.export, "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(f"Exported to {c.export}: {recipe['last']}", flush=True)


if __name__ == "__main__":
    scripts.run(train)
