"""What every method without a draft model costs beside a 30M target's pass.

    python decode/drafting.py --config=configs/bench/draft_free.py

About 3 minutes on two CPU cores. None should cost more than 5 % of a step of plain decoding.
"""

import numpy as np
from ml_collections import ConfigDict

from configs.bench import demo, llama_30m, strategies
from specjax.drafters import corpus

CORPUS_TOKENS = 1_000_000


def random_corpus(vocab_size: int, num_tokens: int) -> corpus.Corpus:
    """Documents of 1000 random tokens, which are searched for as long as any."""
    rng = np.random.default_rng(0)
    documents = rng.integers(0, vocab_size, (num_tokens // 1000, 1000))
    return corpus.corpus(list(documents), vocab_size)


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.output = "runs/draft_free"
    c.target = llama_30m.get_config().target
    c.plain = {"drafter": demo.NONE}
    c.verifier = demo.MATCH
    c.temperature = 0.0
    c.batch_size = 1
    c.prompt_length = 512
    c.max_length = 2048  # slots of every buffer
    c.bound = 0.05  # share of a step of plain decoding
    # Many short repeats: what is sought is a twentieth of what is timed.
    c.repeats = 80
    c.seconds = 0.05  # of each of them in every repeat
    c.seed = 0
    documents = {
        "call": "configs.bench.draft_free.random_corpus",
        "vocab_size": c.target.vocab_size,
        "num_tokens": CORPUS_TOKENS,
    }
    methods = strategies.get_config().methods
    c.methods = ConfigDict(sort_keys=False)
    for name in strategies.DRAFT_FREE:
        method = {"drafter": methods[name].drafter}
        if "weights" in methods[name]:
            is_corpus = methods[name].weights.call == "train.corpus.made"
            method["weights"] = documents if is_corpus else methods[name].weights
        c.methods[name] = method
    return c
