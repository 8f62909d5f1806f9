"""How `decode/generate.py` decodes.

    python decode/generate.py --config.prompt="import os"

A few seconds, most of them compilation.
"""

from ml_collections import ConfigDict

from specjax import presets


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.target = "checkpoints/target"  # a Hugging Face directory, or a name at huggingface.co
    c.draft = ""  # the same of a draft model, or of Medusa, Hydra or EAGLE heads
    c.dtype = "auto"  # of weights and activations: "float32", "bfloat16"; see the README
    c.cache_dtype = "auto"  # of keys and values: "float32", "bfloat16"
    c.device = ""  # "cpu", "gpu", "tpu", or one of several, as "gpu:1"; "" is JAX's choice
    c.prompt = ""  # a text; "" reads standard input
    c.prompts = ""  # a file: a prompt per line, or .jsonl with "prompt" or "messages"
    # and, if a line has them, its own seed, temperature, top_k, top_p, min_p, max_new_tokens
    c.chat = False  # prompts are what a user says, for the model's chat template
    c.output = ""  # a .jsonl file to add results to; what it holds already is not written again
    c.num_samples = 1  # of each prompt
    c.batch_size = 8  # texts at once
    c.max_new_tokens = 128
    c.temperature = 0.0  # 0 is greedy
    c.top_k = 0  # 0 is off
    c.top_p = 1.0  # 1 is off
    c.min_p = 0.0  # 0 is off
    c.seed = 0
    c.stop = ()  # strings that end a text
    c.logprobs = -1  # also the log-probabilities of tokens and of so many likeliest; -1 is off
    c.steps_per_call = 0  # between two looks at a text; 0: 2 when it is shown, 8 for stop strings
    c.verifier = "match"  # a file of specjax/verifiers, as "rejection"
    c.drafter = "auto"  # one of `drafters`; "auto": that of the draft if there is one, else lookup
    c.num_draft_tokens = 4  # of a chain
    c.tree = ()  # parents of a tree to draft instead, breadth first, the root's being -1
    c.choose = ""  # a function of specjax/drafters/grow.py; "": what suits verifier and temperature
    c.corpus = ""  # a directory of train/corpus.py, for reference, retrieval and suffix
    c.layers = ()  # that stay, for layer_skip; train/calibrate.py finds some
    c.tree_of_heads = presets.DEFAULTS.tree_of_heads  # of Medusa and Hydra, parents as in `tree`
    c.dynamic_tree = dict(presets.DEFAULTS.dynamic_tree)  # EAGLE's
    c.drafters = presets.DRAFTERS  # what each name stands for
    c.weights = presets.WEIGHTS  # what some of them read beside the target
    return c
