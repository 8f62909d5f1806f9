"""Searches for the layers with which a target drafts for itself; nothing is trained.

    python train/calibrate.py                                    # configs/train/skip.py
    python train/calibrate.py --config.method=swift

Writes `config.output`, whose "layers" `specjax.calibration.layers` reads into the config of a
`layer_skip` drafter.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from specjax import calibration, checkpoints, engine, sampling, scripts
from specjax.build import build
from specjax.data import atomic, sources
from specjax.drafters.none import none
from specjax.models.transformer import num_params
from specjax.types import Params
from specjax.verifiers.match import match


def main(c: ConfigDict) -> None:
    if c.method not in c.methods:
        raise ValueError(f"method is {c.method!r}; need one of {', '.join(c.methods)}.")
    method, output = c.methods[c.method], Path(c.output)
    if output.is_dir():
        raise ValueError(f"output {output} is a directory; need the name of a file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    models = checkpoints.load(c.target, dtype=c.dtype)
    target, params = models.target, models.target_params
    if target.stack is None:
        raise ValueError(f"{c.target} has no layers to choose from; need a transformer.")
    text, described = _text(c, method, models)
    text = _continued(models, text, method.max_new_tokens)
    tries = build(
        method.search,
        measure=calibration.agreement(target, params, text, method.window, c.num_draft_tokens),
        num_layers=target.stack.num_layers,
        num_drafted=c.num_draft_tokens,
        # A pass reads its layers and the unembedding.
        head=params.get("lm_head", params["embed_tokens"]).size / num_params(params["layers_0"]),
        seed=c.seed,
    )
    start, num_tries, best = time.perf_counter(), 0, None
    with scripts.progress() as bars:
        task = bars.add_task(c.method, total=method.search.num_tries)
        for tried in tries:
            num_tries += 1
            if best is None or tried.score > best.score:
                best = tried
            bars.update(task, advance=1, description=f"best {_named(best)}")
        bars.update(task, total=num_tries)
    assert best is not None
    seconds = time.perf_counter() - start
    record = {
        **best._asdict(),
        "num_layers": target.stack.num_layers,
        "method": c.method,
        "tries": num_tries,
        "seconds": round(seconds, 1),
        "target": c.target,
        "num_draft_tokens": c.num_draft_tokens,
        "text": described,
    }
    with atomic.replacing(output) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    print(f"{_named(best)}, the best of {num_tries} in {seconds:.0f} s. Written to {output}.")


def _named(best: calibration.Try) -> str:
    layers = ",".join(map(str, best.layers))
    return f"layers {layers}: score {best.score:.3f}, agreement {best.agreement:.3f}"


def _text(
    c: ConfigDict, method: ConfigDict, models: checkpoints.Checkpoints
) -> tuple[np.ndarray, dict[str, Any]]:
    """Windows [B, prompt_length] of the sources, each of another document if there are enough."""
    length = method.prompt_length
    if length < 1 or c.num_texts < 1 or length + method.max_new_tokens > models.context:
        raise ValueError(
            f"{c.num_texts} texts of {length} tokens and {method.max_new_tokens} more; need at "
            f"least 1 of 1 and a context's {models.context} at most."
        )
    if c.sources:
        documents = sources.text_files(tuple(c.sources))
    else:
        documents, _ = sources.split(sources.standard_library())
    rng = np.random.default_rng(c.seed)
    windows, used = [], []
    for i in rng.permutation(len(documents)):
        tokens = models.tokenizer.encode(documents[i].text).ids
        if len(tokens) >= length:
            start = rng.integers(len(tokens) - length + 1)
            windows.append(tokens[start : start + length])
            used.append(documents[i])
        if len(windows) == c.num_texts:
            break
    if not windows:
        raise ValueError(f"No document has {length} tokens; choose a shorter prompt_length.")
    described = {
        **sources.describe(used),
        "num_texts": len(windows),
        "prompt_length": length,
        "max_new_tokens": method.max_new_tokens,
        "window": method.window,
    }
    return np.asarray(windows, np.int32), described


def _continued(
    models: checkpoints.Checkpoints, text: np.ndarray, max_new_tokens: int
) -> np.ndarray:
    """The text and what the target writes after it, greedily and past any end."""
    if max_new_tokens < 1:
        return text
    b, t = text.shape
    state = engine.decode(
        engine.decoder(models.target, none(), match()),
        Params(models.target_params),
        jax.random.split(jax.random.key(0), b),
        sampling.sampling(b),
        jnp.asarray(text),
        jnp.full([b], t),
        jnp.full([b], t + max_new_tokens),
        t + max_new_tokens,
    )
    return np.asarray(state.context.tokens)


if __name__ == "__main__":
    scripts.run(main, "configs/train/skip.py")
