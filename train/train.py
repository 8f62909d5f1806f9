"""Trains a model from text, or a drafter from its target, in one straight line.

    python train/train.py --config=configs/train/target.py
    python train/train.py --config=configs/train/eagle3.py

Writes metrics.jsonl and Orbax checkpoints into `config.workdir` and, at the end, the best
parameters as a Hugging Face directory into `config.export`. Best is what is accepted most in
genuine decoding of held-out prompts, measured every `config.eval.every` steps. Killed at any
moment, the same command resumes exactly: parameters, optimizer, data and randomness.
"""

import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from specjax import checkpointing, evaluation, optimizers, scripts, sharding
from specjax.build import build, function
from specjax.data import batches, generated, rows, sources, tokenizers
from specjax.data.feed import Writer, feed
from specjax.models import hf, hf_config
from specjax.models.transformer import num_params, transformer
from specjax.objectives import Batch, Objective
from specjax.timing import matmul_flops, matmul_peak
from specjax.types import Array, PyTree

_SHOWN = ("mat", "mat_interval", "alpha_pos", "joint_pos")  # of what decoding accepts


def train(c: ConfigDict) -> None:
    """Trains, resuming where an earlier run of the same config stopped, and exports."""
    workdir = Path(c.workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = sharding.mesh(c.mesh)
    sharding.check_batch(mesh, c.batch_size, c.accumulate)
    by_row = sharding.batch_sharding(mesh)
    dtype = jnp.dtype(c.dtype)

    # The target, whose tokens, features and law a drafter learns.
    checkpoint, target, target_params = None, None, ()
    if c.target:
        checkpoint = hf.load(c.target, jnp.float32)
        target = transformer(checkpoint.config, dtype, tuple(c.feature_layers))
        target_params = _cast(checkpoint.params, dtype)
        target_params = jax.device_put(
            target_params, sharding.state_sharding(mesh, jax.eval_shape(lambda: target_params))
        )

    # Text, tokenizer, tokens.
    training, held_out = sources.split(_documents(c.sources))
    initial = c.options.get("initial", "")
    if c.target and initial:
        hf.check_same_tokens(c.target, initial)
    earlier = Path(initial, "recipe.json")
    # Read now: the export may replace it, and a mistake in it must not cost a run.
    earlier_recipe = hf_config.read_json(earlier) if initial and earlier.exists() else None
    if named := c.target or initial:
        owner = checkpoint or hf.load(initial)
        if not owner.eos_ids:
            raise ValueError(f"{named} names no end-of-text id; training separates texts by one.")
        tokenizer = tokenizers.load(named)
        vocab_size, end_id = owner.config.vocab_size, owner.eos_ids[0]
        if tokenizer.get_vocab_size() > vocab_size:
            raise ValueError(
                f"{named} has {tokenizer.get_vocab_size()} tokens in tokenizer.json but a model "
                f"of {vocab_size}; need the model's own tokenizer."
            )
    else:
        tokenizer = tokenizers.train_bpe((d.text for d in training), c.vocab_size)
        vocab_size, end_id = tokenizer.get_vocab_size(), 0
    tokens = batches.encode(training, tokenizer, end_id)
    validation_tokens = batches.encode(held_out, tokenizer, end_id)
    validation = rows.packed(batches.pack(validation_tokens, c.sequence_length))
    if min(len(validation.tokens), c.eval.num_sequences) < c.batch_size:
        raise ValueError(
            f"The held-out text has {len(validation.tokens)} sequences and eval.num_sequences is "
            f"{c.eval.num_sequences}; a batch of {c.batch_size} needs as many of both."
        )
    bytes_per_token = batches.bytes_per_token(held_out, validation_tokens)

    # Objective.
    options = {**c.options.to_dict(), "dtype": c.dtype}
    if options.get("model") == "@target" and checkpoint is not None:
        options["model"] = dataclasses.asdict(checkpoint.config)
    elif "model" in options:
        options["model"] = {**options["model"], "vocab_size": vocab_size}
    objective: Objective = function(c.objective)(options, target)
    name = c.objective.split(".")[-1]

    # Optimizer, state and step.
    optimizer = build({**c.optimizer.to_dict(), "num_steps": c.num_steps})

    def init_params(rng_key: Array, target_params: PyTree) -> PyTree:
        return _cast(objective.init(rng_key, target_params), jnp.dtype("float32"))

    def init_state(params: PyTree) -> PyTree:
        steps = {"step": jnp.int32(0), "bad_step": jnp.int32(-1)}
        return {"params": params, "opt_state": optimizer.init(params), **steps}

    gradient = optimizers.accumulated(
        sharding.value_and_grad(mesh, objective.loss, dtype), c.accumulate
    )

    def train_step(
        state: PyTree, target_params: PyTree, batch: Batch
    ) -> tuple[PyTree, dict[str, Array]]:
        params, step = state["params"], state["step"]
        rng_key = jax.random.fold_in(jax.random.key(c.seed), step)
        (nats, metrics), grads = gradient(params, target_params, batch, rng_key)
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        if objective.update_scale is not None:
            updates = optimizers.scaled_updates(updates, objective.update_scale(step))
        finite = jnp.isfinite(nats) & jnp.isfinite(norm)
        state = {
            "params": optax.apply_updates(params, updates),
            "opt_state": opt_state,
            "step": step + 1,
            # Found by whoever looks next, so that no step waits to be looked at.
            "bad_step": jnp.where((state["bad_step"] < 0) & ~finite, step + 1, state["bad_step"]),
        }
        return state, {"loss": nats, "grad_norm": norm, **metrics}

    rng_key = jax.random.key(c.seed)
    like = jax.eval_shape(lambda *x: init_state(init_params(*x)), rng_key, target_params)
    placed = sharding.state_sharding(mesh, like)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, placed
    )
    # Weights read from a file would be constants of a compiled program.
    init = init_params if initial else jax.jit(init_params)
    params = jax.device_put(init(rng_key, target_params), placed["params"])
    state = jax.jit(init_state, out_shardings=placed)(params)
    step_of = jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None))
    read = jax.jit(lambda params: sharding.gathered(mesh, params, dtype))
    eval_step = jax.jit(objective.loss)

    # Data.
    data = feed(
        *(c, tokens, end_id, workdir),
        target=None if target is None else Writer(target, lambda: read(target_params)),
        student=(
            None
            if objective.student is None
            else Writer(objective.student, lambda: read(state["params"]))
        ),
    )

    def placed_batch(fields: dict[str, np.ndarray]) -> Batch:
        put = jax.make_array_from_process_local_data
        return Batch(**{name: put(by_row, x) for name, x in fields.items()})

    # Resume.
    kept = checkpointing.checkpoints(workdir / "checkpoints", c.keep_checkpoints)
    if (step := kept.latest()) is not None:
        state, data_state = kept.restore(step, like)
        data.set_state(data_state)
        print(f"Resumed from step {step} of {c.num_steps} in {workdir}.", flush=True)
    history = checkpointing.read(workdir / "metrics.jsonl", step or 0)
    logs = [checkpointing.metrics_log(workdir / "metrics.jsonl")]
    if c.tensorboard:
        logs.append(checkpointing.tensorboard(workdir / "tensorboard"))

    # Evaluation: the loss on held-out text, and what decoding held-out prompts accepts.
    decoding, depth = None, 0
    if objective.drafter is not None:
        drafter, depth = objective.drafter, objective.drafter.proposal.depth
        assert target is not None
        assert checkpoint is not None
        prompts = generated.windows(
            validation_tokens, c.eval.prompt_length, c.eval.num_prompts, seed=0
        )
        context = checkpoint.config.max_position_embeddings
        decoding = evaluation.acceptance(
            target, drafter, prompts, c.eval.max_new_tokens, context, (end_id,)
        )

    def evaluate(params: PyTree) -> dict[str, Any]:
        params, frozen = read(params), read(target_params)
        count = min(c.eval.num_sequences, len(validation.tokens)) // c.batch_size
        results = [
            eval_step(
                params,
                frozen,
                placed_batch(
                    rows.take(validation, np.arange(i * c.batch_size, (i + 1) * c.batch_size))
                ),
                jax.random.key(c.seed),
            )
            for i in range(count)
        ]
        found = [{"loss": nats, **metrics} for nats, metrics in jax.device_get(results)]
        mean = {k: float(np.mean([r[k] for r in found])) for k in found[0]}
        if "cross_entropy" in mean:
            mean["bits_per_byte"] = mean["cross_entropy"] / np.log(2) / bytes_per_token
        record: dict[str, Any] = {f"validation_{k}": v for k, v in mean.items()}
        score = -mean["loss"]
        if decoding is not None:
            genuine = decoding(objective.params(params, frozen))
            forced = evaluation.teacher_forced(mean, depth)
            for temperature, figures in genuine.items():
                record |= {f"{name}_at_{temperature:g}": figures[name] for name in _SHOWN}
                record[f"teacher_forced_mat_at_{temperature:g}"] = forced[temperature]
            score = float(np.mean([figures["mat"] for figures in genuine.values()]))
        return {**record, "score": score}

    # Train.
    size = num_params(state["params"])
    peak = matmul_peak(dtype) * jax.device_count()
    compiled = None
    print(
        f"{name}: {size / 1e6:.2f}M parameters, {len(tokens) / 1e6:.2f}M tokens of text, "
        f"{c.num_steps * c.batch_size * c.sequence_length / 1e6:.1f}M tokens of training, "
        f"{jax.device_count()} {jax.default_backend()} device(s)",
        flush=True,
    )
    done = int(state["step"])
    with scripts.progress() as bars:
        task = bars.add_task(name, total=c.num_steps, completed=done)
        started, since = time.perf_counter(), done
        while done < c.num_steps:
            batch = placed_batch(next(data))
            if compiled is None:  # ahead of time: no later step can be traced again
                compiled = step_of.lower(state, target_params, batch).compile()
                flops = matmul_flops(train_step, state, target_params, batch)
                started = time.perf_counter()
            state, metrics = compiled(state, target_params, batch)
            done += 1
            is_last = done == c.num_steps
            evaluated = done % c.eval.every == 0 or is_last
            saved = done % c.checkpoint_every == 0 or is_last
            if done % c.log_every and not evaluated and not saved:
                continue
            if (bad_step := int(state["bad_step"])) >= 0:
                good = kept.latest()
                raise ValueError(
                    f"Loss or gradient is not finite at step {bad_step}; the last good checkpoint "
                    f"is {'none' if good is None else f'step {good}'} in {workdir}."
                )
            record = {"step": done, **{k: float(v) for k, v in metrics.items()}}
            seconds = (time.perf_counter() - started) / (done - since)
            record["learning_rate"] = float(optimizer.learning_rate(done))
            record["tokens_per_second"] = c.batch_size * c.sequence_length / seconds
            record["share_of_matmul_peak"] = flops / seconds / peak
            if evaluated:
                record |= evaluate(state["params"])
                kept.keep_best(done, state["params"], record["score"])
            for log in logs:
                log.append(record)
            history.append(record)
            bars.update(task, completed=done, description=_shown(name, history))
            if saved:
                kept.save(done, state, data.get_state())
            started, since = time.perf_counter(), done

    # Export the best, with all that a reader needs to judge and repeat it.
    found = kept.best(like["params"])
    kept.close()
    for log in logs:
        log.close()
    if found is None:
        raise ValueError(f"No evaluation in {workdir} gave a finite score; nothing is exported.")
    best_step, best, _ = found
    objective.export(c.export, jax.device_get(best), eos_ids=(end_id,), bos_id=end_id)
    tokenizers.save(tokenizer, c.export)
    evaluations = [r for r in history if "score" in r]
    shown = ("step", "loss", "score")
    recipe = {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "config": json.loads(c.to_json()),
        "num_params": size,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "training_text": sources.describe(training),
        "held_out_text": sources.describe(held_out),
        "tokens_seen": c.num_steps * c.batch_size * c.sequence_length,
        "best": next(r for r in evaluations if r["step"] == best_step),
        "curve": [{k: r[k] for k in shown} for r in evaluations],
    }
    if earlier_recipe:
        recipe["initial"] = earlier_recipe
    hf_config.write_json(Path(c.export, "recipe.json"), recipe)
    print(f"Exported step {best_step} to {c.export}: {_shown('', history)}", flush=True)


def _cast(params: PyTree, dtype: jnp.dtype) -> PyTree:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _documents(spec: Any) -> list[sources.Document]:
    """The standard library, local files, or whatever a function of `specjax.data.sources` gives."""
    if isinstance(spec, ConfigDict):
        found: list[sources.Document] = build(spec)
        return found
    return sources.text_files(spec) if spec else sources.standard_library()


def _shown(name: str, history: list[dict]) -> str:
    """The newest figures in a line."""
    last = history[-1]
    parts = [name, f"loss {last['loss']:.3f}", f"{last['tokens_per_second']:,.0f} tokens/s"]
    evaluated = [r for r in history if "score" in r]
    if evaluated:
        parts.append(f"validation {evaluated[-1]['validation_loss']:.3f}")
        if "mat_at_0" in evaluated[-1]:
            mats = (evaluated[-1]["mat_at_0"], evaluated[-1]["mat_at_1"])
            parts.append("tokens per pass {:.2f}, {:.2f}".format(*mats))
    return ", ".join(part for part in parts if part)


if __name__ == "__main__":
    scripts.run(train)
