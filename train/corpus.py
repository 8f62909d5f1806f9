"""Makes a corpus to draft from: documents in a target's tokens, sorted; nothing is trained.

    python train/corpus.py                                       # configs/train/corpus.py
    python train/corpus.py --config.sources="('notes/',)" --config.output=runs/notes

Writes `config.output`, which `specjax.drafters.corpus.load` reads for `retrieval`, `suffix` and
`reference`.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf_tokenizers
from ml_collections import ConfigDict

from specjax import scripts
from specjax.data import sources, tokenizers
from specjax.drafters import corpus
from specjax.models import hf

_DOCUMENTS_AT_ONCE = 16


def main(c: ConfigDict) -> None:
    if c.max_tokens < 1 or c.room < 0:
        raise ValueError(
            f"max_tokens is {c.max_tokens} and room {c.room}; need 1 or more, 0 or more."
        )
    if Path(c.output).is_file():
        raise ValueError(f"output {c.output} is a file; need the name of a directory.")
    vocab_size = hf.load_config(c.target).vocab_size
    tokenizer = tokenizers.load(c.target)
    if c.sources:
        documents = sources.text_files(tuple(c.sources))
    else:  # what is held out stays so: prompts come from it
        documents, _ = sources.split(sources.standard_library())
    # In the order of their names, a part of the documents would be of some directories only.
    order = np.random.default_rng(c.seed).permutation(len(documents))
    start = time.perf_counter()
    pieces = _encoded([documents[i] for i in order], tokenizer, c.max_tokens)
    num_tokens = sum(map(len, pieces))
    print(f"Sorting {num_tokens} tokens of {len(pieces)} documents ...", flush=True)
    made = corpus.corpus(
        pieces,
        vocab_size,
        num_tokens + len(pieces) + c.room,
        corpus.fingerprint(tokenizer.get_vocab()),
    )
    about = {
        "target": c.target,
        "num_tokens": num_tokens,
        "text": sources.describe([documents[i] for i in order[: len(pieces)]]),
    }
    corpus.save(made, c.output, about)
    size = sum(file.stat().st_size for file in Path(c.output).iterdir())
    seconds = time.perf_counter() - start
    print(f"{num_tokens} tokens, {size / 1e6:.1f} MB, in {seconds:.0f} s: {c.output}.")


def made(target: str, output: str) -> corpus.Corpus:
    """The corpus in `output`, made as configs/train/corpus.py says if it is not there.

    Raises:
        ValueError: one that is damaged, or made with another tokenizer than the target's.
    """
    from configs.train import corpus as default  # `scripts.run` has made it known by now

    if not Path(output).exists():
        c = default.get_config()
        c.update(target=target, output=output)
        main(c)
    return corpus.load(output, corpus.fingerprint(tokenizers.load(target).get_vocab()))


def _encoded(
    documents: Sequence[sources.Document], tokenizer: hf_tokenizers.Tokenizer, max_tokens: int
) -> list[np.ndarray]:
    """The tokens of the first documents, `max_tokens` in all; the last one may be cut."""
    pieces: list[np.ndarray] = []
    room = max_tokens
    with scripts.progress() as bars:
        task = bars.add_task("documents", total=len(documents))
        for i in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            texts = [document.text for document in documents[i : i + _DOCUMENTS_AT_ONCE]]
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                if room > 0:
                    pieces.append(np.asarray(encoding.ids[:room], np.int32))
                    room -= len(pieces[-1])
            bars.update(task, advance=len(texts), description=f"{max_tokens - room} tokens")
            if room == 0:
                bars.update(task, total=i + len(texts))
                break
    return pieces


if __name__ == "__main__":
    scripts.run(main, "configs/train/corpus.py")
