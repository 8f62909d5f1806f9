"""How `decode/generate.py` decodes.

    python decode/generate.py --config.prompt="import os"

A few seconds, most of them compilation.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.target = "checkpoints/target"  # Hugging Face directories
    c.draft = ""
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
    c.drafter = ""  # one of `drafters`; "": model if there is a draft, else lookup
    c.num_draft_tokens = 4
    c.tree = ()  # parents of a tree to draft instead, breadth first, the root's being -1
    c.choose = ""  # a function of specjax/drafters/grow.py; "": what suits verifier and temperature
    drafters = "specjax.drafters"
    static = {"call": f"{drafters}.grow.static", "parents": "@tree", "choose": "@choose"}
    c.drafters = {
        "none": {"call": f"{drafters}.none.none"},
        "lookup": {"call": f"{drafters}.lookup.lookup", "num_tokens": "@num_draft_tokens"},
        "model": {"call": f"{drafters}.model.model", "draft_model": "@draft", "build": static},
    }
    return c
