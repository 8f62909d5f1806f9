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
    drafters = "specjax.drafters"
    c.drafters = {
        "none": {"call": f"{drafters}.none.none"},
        "lookup": {"call": f"{drafters}.lookup.lookup", "num_tokens": "@num_draft_tokens"},
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
    return c
