"""Continues a prompt, a file of prompts or a conversation, and says how fast.

    python decode/generate.py --config.prompt="import os"
    python decode/generate.py --config.target=DIRECTORY --config.draft=DIRECTORY < prompt.txt
    python decode/generate.py --config.prompts=in.jsonl --config.output=out.jsonl

One prompt is shown as it is written. Several, or several samples of one, are decoded in batches and
come as one JSON object per line, on standard output or added to a file: started again, the script
goes on where it was stopped. Statistics go to standard error.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from specjax import devices, generation, presets, prompts, sampling, scripts

_JSON = flags.DEFINE_bool("json", False, "Prints one JSON document: results and statistics.")
_LAW = ("temperature", "top_k", "top_p", "min_p")
_OF_A_REQUEST = ("max_new_tokens", "seed", *_LAW)


def main(c: ConfigDict) -> None:
    idle = None if c.device else devices.unused_accelerator()
    if idle is not None:
        print(f"warning: {idle}", file=sys.stderr)
    with jax.default_device(devices.choose(c.device)):
        _run(c)


def _as_json() -> bool:
    return flags.FLAGS.is_parsed() and bool(_JSON.value)


def _run(c: ConfigDict) -> None:
    if c.num_samples < 1:
        raise ValueError(f"num_samples is {c.num_samples}; it must be at least 1.")
    requests = [_request(c, given, i) for i, given in enumerate(_given(c), 1)]
    laws = [[request[name] for request in requests] for name in _LAW]
    sampling.checked(len(requests), *laws)  # before a model is loaded for nothing
    done = _done(c, requests) if c.output else 0
    model = generation.load(c.target, c.draft, c.dtype, c.cache_dtype)
    for name, draft in model.checkpoints.drafts.items():
        if draft.num_common is not None:
            print(
                f"{c.draft} has another vocabulary; as {name} it drafts the {draft.num_common} "
                f"tokens that it shares with the target's {model.checkpoints.target.vocab_size}.",
                file=sys.stderr,
            )
    is_shown = len(requests) * c.num_samples == 1 and not c.output and not _as_json()
    results = []

    with _writing(c, is_shown, len(requests) * c.num_samples, done) as write:

        def on_batch(first: int, written: generation.Generation) -> None:
            for i in range(len(written.texts)):
                number, sample = divmod(done + first + i, c.num_samples)
                results.append(_result(requests[number], number, sample, written, i))
                write(results[-1])

        def show(_: int, text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        rows = list(itertools.product(requests, range(c.num_samples)))[done:]
        if not rows:
            print(f"{c.output} holds all {done} texts already.", file=sys.stderr)
            return
        own: dict[str, Any] = {name: [r[name] for r, _ in rows] for name in _OF_A_REQUEST}
        written = generation.generate(
            model,
            [request.get("prompt", request.get("messages")) for request, _ in rows],
            c.drafter,
            c.verifier,
            **own,
            first_sample=[sample for _, sample in rows],
            stop=tuple(c.stop),
            logprobs=None if c.logprobs < 0 else c.logprobs,
            stream=show if is_shown else None,
            on_batch=on_batch,
            batch_size=c.batch_size,
            steps_per_call=c.steps_per_call,
            options=presets.Options(
                c.num_draft_tokens,
                tuple(c.tree),
                c.choose,
                c.corpus,
                tuple(c.layers),
                tuple(c.tree_of_heads),
                c.dynamic_tree.to_dict(),
            ),
            drafters=c.drafters.to_dict(),
            weights=c.weights.to_dict(),
        )
    statistics = written.statistics._asdict()
    if is_shown:
        print()
    if _as_json():
        print(json.dumps({"results": results, "statistics": statistics}, ensure_ascii=False))
    else:
        print(_summary(written), file=sys.stderr)


def _given(c: ConfigDict) -> list[dict[str, Any]]:
    """The requests, from wherever they are."""
    if c.prompt and c.prompts:
        raise ValueError(f"Both a prompt and a file of prompts, {c.prompts}, were given; need one.")
    if c.prompts:
        return prompts.requests(c.prompts)
    text = c.prompt or ("" if sys.stdin.isatty() else sys.stdin.read())
    if not text:
        raise ValueError(
            "The prompt is empty; need --config.prompt=TEXT, --config.prompts=FILE or text on "
            "standard input."
        )
    return [{"prompt": text}]


def _request(c: ConfigDict, given: Mapping[str, Any], number: int) -> dict[str, Any]:
    """All that decides a text, and an id where the file has one."""
    request = {name: given[name] for name in ("id", "prompt", "messages") if name in given}
    if c.chat and "prompt" in request:
        request["messages"] = [{"role": "user", "content": request.pop("prompt")}]
    for name in _OF_A_REQUEST:
        request[name] = given.get(name, c[name])
        if not isinstance(request[name], (int, float)) or isinstance(request[name], bool):
            raise ValueError(f"{name} of prompt {number} is {request[name]!r}; need a number.")
    return {
        **request,
        "stop": list(c.stop),
        "target": c.target,
        "verifier": c.verifier,
        **({} if c.verifier == "match" else {"drafter": c.drafter, "draft": c.draft}),
    }


def _result(
    request: Mapping[str, Any],
    number: int,
    sample: int,
    written: generation.Generation,
    i: int,
) -> dict[str, Any]:
    """A line of output."""
    found = {
        "index": number,
        "sample": sample,
        "request": request,
        "text": written.texts[i],
        "tokens": written.tokens[i],
        "finish_reason": written.finish_reasons[i],
        "stop_reason": written.stop_reasons[i],
    }
    if written.logprobs is not None:
        told = written.logprobs[i]._asdict()
        found["logprobs"] = {name: x.tolist() for name, x in told.items()}
    return found


def _done(c: ConfigDict, requests: list[dict[str, Any]]) -> int:
    """How many texts the output holds already; cuts off a line that was not finished.

    Raises:
        ValueError: it holds something else.
    """
    path = Path(c.output)
    if path.suffix != ".jsonl":
        raise ValueError(f"output is {c.output!r}; need a name that ends in .jsonl.")
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        os.truncate(path, sum(map(len, lines)))
    for row, line in enumerate(lines):
        number, sample = divmod(row, c.num_samples)
        try:
            found = json.loads(line)
            place, request = (found["index"], found["sample"]), found["request"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Line {row + 1} of {path} is {line[:40]!r}; need results of this script, or "
                "another output."
            ) from error
        if number >= len(requests) or place != (number, sample):
            raise ValueError(
                f"Line {row + 1} of {path} is of prompt {place[0]}, sample {place[1]}; need those "
                f"of {len(requests)} prompt(s) in order, {c.num_samples} each, or another output."
            )
        wanted = json.loads(json.dumps(requests[number]))
        for name in {*request, *wanted}:
            if request.get(name) != wanted.get(name):
                raise ValueError(
                    f"Line {row + 1} of {path} was written with {name} {request.get(name)!r:.40} "
                    f"but now it is {wanted.get(name)!r:.40}; need the same, or another output."
                )
    return len(lines)


@contextlib.contextmanager
def _writing(c: ConfigDict, is_shown: bool, count: int, done: int) -> Iterator[Any]:
    """A function that writes a result where it belongs, with progress where that takes long."""
    if is_shown or (_as_json() and not c.output):
        yield lambda result: None
        return
    if not c.output:
        yield lambda result: print(json.dumps(result, ensure_ascii=False), flush=True)
        return
    Path(c.output).parent.mkdir(parents=True, exist_ok=True)
    bars = scripts.progress(Console(stderr=True))
    with open(c.output, "a", encoding="utf-8") as file, bars:
        bar = bars.add_task("texts", total=count, completed=done)

        def write(result: dict[str, Any]) -> None:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()
            bars.advance(bar)

        yield write


def _summary(written: generation.Generation) -> str:
    s = written.statistics
    return (
        f"{s.num_tokens} tokens in {len(written.texts)} text(s), first ones after "
        f"{s.seconds_to_first_token:.3f} s, then {s.tokens_per_second:.1f} tokens/s, "
        f"{s.tokens_per_pass:.2f} tokens per target pass, compilation {s.seconds_compile:.1f} s"
    )


if __name__ == "__main__":
    scripts.run(main, "configs/generate.py")
