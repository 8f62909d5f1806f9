"""transformers' own generation in PyTorch, as methods for `decode/benchmark.py`.

Greedy, batch 1, with key/value cache. Each method keeps the number of threads and the
options that make it fastest on the first prompts. The prompt ends where a streamer gets its first
tokens: those belong to the prompt pass, the rest is decoding. Target passes are counted by a hook.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from specjax import metrics, prompts

_TUNING_PROMPTS = 2  # options are compared on so many


class Peer(NamedTuple):
    """What the benchmark needs of a method."""

    drafter: str
    run: Callable[[prompts.Batch, float], metrics.Timing]
    measure: Callable[[Sequence[prompts.Batch], float], dict[str, Any]]


def greedy(
    target_directory: str,
    draft_directory: str,
    batches: Sequence[prompts.Batch],
    dtype: str = "float32",
) -> Peer:
    """Plain decoding, with weights and activations of a dtype."""
    del draft_directory
    return _peer("none", target_directory, "", batches, [{}], dtype)


def assisted(
    target_directory: str,
    draft_directory: str,
    batches: Sequence[prompts.Batch],
    num_assistant_tokens: Sequence[int] = (3, 5),
    confidence_threshold: Sequence[float] = (0.0, 0.4),
) -> Peer:
    """Assisted generation; of all combinations of the options the fastest is kept.

    Args:
        num_assistant_tokens: drafted per pass, at most.
        confidence_threshold: drafting stops below it; 0.4 is transformers' default, 0 is off.
    """
    if not draft_directory:
        raise ValueError("Assisted generation needs a draft; give --config.drafts.draft=DIRECTORY.")
    options: list[dict[str, Any]] = [
        {"num_assistant_tokens": n, "assistant_confidence_threshold": threshold}
        for n in num_assistant_tokens
        for threshold in confidence_threshold
    ]
    return _peer("model", target_directory, draft_directory, batches, options)


def lookup(
    target_directory: str,
    draft_directory: str,
    batches: Sequence[prompts.Batch],
    num_tokens: Sequence[int] = (3, 5, 10),
) -> Peer:
    """Prompt lookup; the fastest number of tokens is kept."""
    del draft_directory
    options = [{"prompt_lookup_num_tokens": n} for n in num_tokens]
    return _peer("lookup", target_directory, "", batches, options)


def libraries() -> tuple[Any, Any]:
    """PyTorch and transformers, which is silent from then on.

    Raises:
        ValueError: they are not there.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"This comparison needs PyTorch and transformers ({error}); "
            "install them with: pip install 'specjax[parity]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


@functools.cache
def _load(directory: str, dtype: str) -> Any:
    torch, transformers = libraries()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype)
    )
    return model.eval()


def _peer(
    drafter: str,
    target_directory: str,
    draft_directory: str,
    batches: Sequence[prompts.Batch],
    options: Sequence[dict[str, Any]],
    dtype: str = "float32",
) -> Peer:
    target = _load(target_directory, dtype)
    assistant = _load(draft_directory, dtype) if draft_directory else None
    if len(batches[0].length) != 1:
        raise ValueError(
            f"Batches have {len(batches[0].length)} rows; transformers assists one at a time, so "
            "this comparison needs --config.batch_size=1."
        )
    cores = os.cpu_count() or 1
    chosen = {**options[0], "num_threads": cores}
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def timed(batch: prompts.Batch, option: Mapping[str, Any]) -> metrics.Timing:
        import torch

        clock = _Clock()
        extra = dict(option)
        torch.set_num_threads(extra.pop("num_threads"))
        if assistant is not None:
            settings = assistant.generation_config
            settings.num_assistant_tokens = extra.pop("num_assistant_tokens")
            settings.assistant_confidence_threshold = extra.pop("assistant_confidence_threshold")
            settings.num_assistant_tokens_schedule = "constant"
            extra["assistant_model"] = assistant
        ids = torch.from_numpy(batch.tokens[:, : batch.length[0]].astype(np.int64))
        start = time.perf_counter()
        with torch.inference_mode():
            out = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=int(batch.limit[0] - batch.length[0]),
                do_sample=False,
                use_cache=True,
                streamer=clock,
                pad_token_id=0,
                **extra,
            )
        end = time.perf_counter()
        new = out[0, ids.shape[1] :].numpy().astype(np.int32)
        return metrics.Timing([new], len(new) - clock.first, end - clock.at, clock.at - start)

    def run(batch: prompts.Batch, temperature: float) -> metrics.Timing:
        if temperature != 0:
            raise ValueError(f"transformers is compared at temperature 0, not {temperature}.")
        return timed(batch, chosen)

    def measure(batches: Sequence[prompts.Batch], temperature: float) -> dict[str, Any]:
        """Warms up, keeps the fastest option, then counts."""
        nonlocal chosen, passes
        run(batches[0], temperature)

        def seconds_per_token(option: Mapping[str, Any]) -> float:
            timings = [timed(batch, option) for batch in batches[:_TUNING_PROMPTS]]
            return sum(t.seconds for t in timings) / max(sum(t.num_timed for t in timings), 1)

        threads = [{**chosen, "num_threads": n} for n in sorted({1, cores})]
        chosen = min(threads, key=seconds_per_token)
        if len(options) > 1:
            chosen = min([{**chosen, **option} for option in options], key=seconds_per_token)
        passes = 0
        hook = target.register_forward_pre_hook(count)
        tokens = sum(len(run(batch, temperature).tokens[0]) for batch in batches)
        hook.remove()
        return {
            "mat": tokens / passes,
            "accepted_per_step": tokens / passes - 1,
            "acceptance_rate": None,
            "options": chosen,
        }

    return Peer(drafter, run, measure)


class _Clock:
    """A streamer that notes when the first new tokens came, and how many."""

    def __init__(self) -> None:
        self.calls, self.first, self.at = 0, 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.first, self.at = value.numel(), time.perf_counter()

    def end(self) -> None:
        pass
