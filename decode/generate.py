"""Continues a prompt, a file of prompts or standard input, and says how fast.

    python decode/generate.py --config.target=checkpoints/target --config.draft=checkpoints/draft \\
        --config.prompt="import os"

Any Hugging Face directory of a supported architecture will do, and as a draft one of heads too:
Medusa's, Hydra's or EAGLE's. One prompt is streamed as it is written; several are decoded in
batches and printed as one JSON object per line. Statistics go to standard error.
"""

import json
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from specjax import checkpoints, engine, prompts, sampling, scripts, trees
from specjax.build import build, mentions
from specjax.data import tokenizers
from specjax.drafters import corpus, grow
from specjax.models.eagle import EagleHead
from specjax.models.hydra import HydraHeads
from specjax.models.medusa import MedusaHeads
from specjax.types import Decoder, DecodeState, Model, Params

# By what a draft's directory holds.
_DRAFTERS = {Model: "model", MedusaHeads: "medusa", HydraHeads: "hydra", EagleHead: "eagle"}


def main(c: ConfigDict) -> None:
    options = (c.temperature, c.top_k, c.top_p, c.min_p)
    sampling.sampling(1, *options)  # refuses what is out of range
    if c.steps_per_call < 1:
        raise ValueError(f"steps_per_call is {c.steps_per_call}; it must be at least 1.")
    texts = _texts(c)
    models = checkpoints.load(c.target, c.draft, c.dtype, c.cache_dtype)
    for draft in models.drafts.values():
        if draft.num_common is not None:
            print(
                f"{c.draft} has another vocabulary; it drafts the {draft.num_common} tokens that "
                f"it shares with the target's {models.target.vocab_size}.",
                file=sys.stderr,
            )
    encoded = prompts.encode(texts, models.tokenizer)
    batch_size = min(c.batch_size, len(texts))
    batches = prompts.batches(encoded, batch_size, c.max_new_tokens, models.context)
    decoder, params = _decoder(c, models)
    max_length = prompts.max_length(batches)

    def prefill(batch: prompts.Batch) -> DecodeState:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(c.seed), jnp.asarray(batch.which)
        )
        state = engine.prefill(
            decoder,
            params,
            keys,
            sampling.sampling(len(batch.length), *options),
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.length),
            jnp.asarray(batch.limit),
            max_length,
        )
        return jax.block_until_ready(state)

    # Compile on prompts of one token and no step at all, so that what follows is timed alone.
    start = time.perf_counter()
    shortest = batches[0]._replace(length=np.ones_like(batches[0].length))
    jax.block_until_ready(engine.advance(decoder, params, prefill(shortest), 0))
    seconds_compile = time.perf_counter() - start

    start = time.perf_counter()
    num_tokens = num_passes = 0
    first = prefilled = 0.0
    for batch in batches:
        before = time.perf_counter()
        state = prefill(batch)
        prefilled += time.perf_counter() - before
        push = tokenizers.stream_decoder(models.tokenizer)
        seen = int(batch.length[0])
        while not bool(state.done.all()):
            steps = c.steps_per_call if len(texts) == 1 else max_length
            state = engine.advance(decoder, params, state, steps)
            length = int(state.context.length[0])
            if len(texts) == 1:
                first = first or time.perf_counter() - start
                new = np.asarray(state.context.tokens[0])[seen:length]
                sys.stdout.write(push(new))
                sys.stdout.flush()
                seen = length
        if len(texts) == 1:
            print(push([], final=True))
        else:
            _print(texts, batch, state, models)
        rows = batch.limit > 1
        num_tokens += int((np.asarray(state.context.length) - batch.length)[rows].sum())
        num_passes += int(np.asarray(state.num_steps)[rows].sum())
    seconds = time.perf_counter() - start - prefilled
    parts = [
        f"{num_tokens} tokens in {seconds:.2f} s after the prompt",
        f"{num_tokens / seconds:.1f} tokens/s",
        f"{num_tokens / num_passes:.2f} tokens per target pass",
        f"{len(texts)} prompt(s) in {prefilled:.2f} s",
        f"first token after {first:.3f} s" if first else "",
        f"compilation {seconds_compile:.1f} s",
    ]
    print(", ".join(part for part in parts if part), file=sys.stderr)


def _texts(c: ConfigDict) -> list[str]:
    """The prompts, from wherever they are."""
    if c.prompt and c.prompts:
        raise ValueError(f"Both a prompt and a file of prompts, {c.prompts}, were given; need one.")
    if c.prompts:
        return prompts.read(c.prompts)
    if c.prompt:
        return [c.prompt]
    text = "" if sys.stdin.isatty() else sys.stdin.read()
    if not text:
        raise ValueError(
            "The prompt is empty; need --config.prompt=TEXT, --config.prompts=FILE or text on "
            "standard input."
        )
    return [text]


def _decoder(c: ConfigDict, models: checkpoints.Checkpoints) -> tuple[Decoder, Params]:
    """What the config names, with whatever it leaves open chosen by what was given."""
    draft = models.drafts.get("draft")
    held = None if draft is None else _DRAFTERS[type(draft.model)]
    name = c.drafter or held or "lookup"
    if name not in c.drafters:
        raise ValueError(f"drafter is {name!r}; need one of {', '.join(c.drafters)}.")
    spec = c.drafters[name]
    if held not in (None, name) and mentions(spec, "draft"):
        raise ValueError(f"drafter is {name!r} but {c.draft} holds one for {held!r}.")
    verifier = build({"call": f"specjax.verifiers.{c.verifier}.{c.verifier}"})
    choose = c.choose
    if not choose and c.temperature == 0:
        choose = "best"
    elif not choose:
        choose = "coupled" if c.verifier == "match" else "without_replacement"
    drafter = build(
        spec,
        **checkpoints.given(models.target, models.drafts),
        build=_builder(c, draft, build({"call": f"specjax.drafters.grow.{choose}"})),
        num_draft_tokens=c.num_draft_tokens,
        layers=tuple(c.layers) or None,
    )
    decoder = engine.decoder(models.target, drafter, verifier, eos_ids=models.eos_ids)
    if name not in c.weights:
        return decoder, checkpoints.params(models.target_params, models.drafts, spec)
    weights = build(
        c.weights[name],
        target=models.target,
        target_params=models.target_params,
        corpus=c.corpus or None,
        fingerprint=corpus.fingerprint(models.tokenizer.get_vocab()),
    )
    return decoder, Params(models.target_params, weights)


def _builder(
    c: ConfigDict, draft: checkpoints.Drafting | None, choose: grow.Choose
) -> grow.Builder:
    """The tree that the config gives, or one that suits what is drafted with."""
    if c.tree:
        return grow.static(tuple(c.tree), choose)
    heads = None if draft is None else draft.model
    if isinstance(heads, (MedusaHeads, HydraHeads)):
        depth = trees.topology(c.tree_of_heads).depth_of
        return grow.static(tuple(np.asarray(c.tree_of_heads)[depth <= heads.num_heads]), choose)
    if isinstance(heads, EagleHead) and not c.choose:
        return grow.dynamic(**c.dynamic_tree)
    return grow.chain(c.num_draft_tokens, choose)


def _print(
    texts: Sequence[str],
    batch: prompts.Batch,
    state: DecodeState,
    models: checkpoints.Checkpoints,
) -> None:
    tokens, length = np.asarray(state.context.tokens), np.asarray(state.context.length)
    for row in np.flatnonzero(batch.limit > 1):
        new = tokens[row, batch.length[row] : length[row]]
        text = models.tokenizer.decode(new.tolist())
        print(json.dumps({"prompt": texts[batch.which[row]], "text": text, "tokens": len(new)}))


if __name__ == "__main__":
    scripts.run(main, "configs/generate.py")
