"""How `decode/generate.py` decodes.

    python decode/generate.py --config.prompt="import os"

A few seconds, most of them compilation.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.target = "checkpoints/target"  # Hugging Face directories
    c.draft = ""  # of a model, or of Medusa, Hydra or EAGLE heads
    c.dtype = "auto"  # or "float32", "bfloat16"
    c.cache_dtype = "auto"  # the same
    c.prompt = ""  # or standard input
    c.prompts = ""  # a file: a prompt per line, or .jsonl with "prompt"
    c.batch_size = 8  # prompts at once
    c.max_new_tokens = 128
    c.temperature = 0.0
    c.top_k = 0  # 0 is off
    c.top_p = 1.0  # 1 is off
    c.min_p = 0.0  # 0 is off
    c.seed = 0
    c.steps_per_call = 2  # between two looks at the text of a single prompt
    c.verifier = "match"  # or "rejection": a file of specjax/verifiers
    c.drafter = ""  # one of `drafters`; "": that of the draft if there is one, else lookup
    c.num_draft_tokens = 4  # of a chain
    c.tree = ()  # parents of a tree to draft instead, breadth first, the root's being -1
    c.choose = ""  # a function of specjax/drafters/grow.py; "": what suits verifier and temperature
    # The trees that heads draft by default: the likelier a node's place, the more it has below.
    c.tree_of_heads = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)
    c.dynamic_tree = {"num_nodes": 12, "width": 3, "depth": 4}  # EAGLE's
    grown = {"build": "@build"}
    with_heads = {"target": "@target", "heads": "@draft", **grown}
    c.corpus = ""  # a directory of train/corpus.py, for reference, retrieval and suffix
    c.layers = ()  # that stay, for layer_skip; train/calibrate.py finds some
    drafters = "specjax.drafters"
    of_target = {"target": "@target"}
    chain, retrieved = {"num_tokens": "@num_draft_tokens"}, {"num_tokens": 4, "num_nodes": 8}
    c.drafters = {
        "none": {"call": f"{drafters}.none.none"},
        "lookup": {"call": f"{drafters}.lookup.lookup", **chain},
        "ngram": {"call": f"{drafters}.ngram.ngram", **chain},
        "ngrammys": {
            "call": f"{drafters}.ngrammys.ngrammys",
            **of_target,
            **{"num_paths": 3, "num_tokens": 3},
        },
        "recycling": {
            "call": f"{drafters}.recycling.recycling",
            **of_target,
            "parents": {"call": f"{drafters}.recycling.tree", "num_nodes": 12, "depth": 4},
        },
        "jacobi": {"call": f"{drafters}.jacobi.jacobi", **chain},
        "lookahead": {
            "call": f"{drafters}.lookahead.lookahead",
            **of_target,
            **{"width": 4, "ngram": 3, "num_guesses": 3},
        },
        "reference": {"call": f"{drafters}.lookup.reference", **chain},
        "retrieval": {"call": f"{drafters}.retrieval.retrieval", **retrieved},
        "suffix": {"call": f"{drafters}.suffix.suffix", **retrieved},
        "layer_skip": {
            "call": f"{drafters}.layer_skip.layer_skip",
            **of_target,
            "layers": "@layers",
            **grown,
        },
        "streaming": {
            "call": f"{drafters}.sparse.sparse",
            **of_target,
            "view": {"call": f"{drafters}.sparse.streaming", "num_sinks": 4, "window": 60},
            **grown,
        },
        "quantized": {"call": f"{drafters}.quantized.quantized", **of_target, **grown},
        "model": {"call": f"{drafters}.model.model", "draft_model": "@draft", **grown},
        "medusa": {"call": f"{drafters}.medusa.medusa", **with_heads},
        "hydra": {"call": f"{drafters}.hydra.hydra", **with_heads},
        "eagle": {
            "call": f"{drafters}.eagle.eagle",
            "target": "@target",
            "head": "@draft",
            **grown,
        },
    }
    # What some of them read beside the target; by default the draft's weights.
    documents = {
        "call": f"{drafters}.corpus.load",
        **{"directory": "@corpus", "tokenizer": "@fingerprint"},
    }
    params = {"params": "@target_params"}
    c.weights = {
        "ngrammys": {"call": f"{drafters}.ngrammys.bigrams", **of_target, **params, "k": 3},
        "quantized": {"call": f"{drafters}.quantized.int8", **params},
        **{name: documents for name in ("reference", "retrieval", "suffix")},
    }
    return c
