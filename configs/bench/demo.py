"""The methods of the core on the demo models, greedy and sampled.

    python decode/benchmark.py --config=configs/bench/demo.py

About three minutes on two CPU cores. Expect the same tokens from every method
wherever the table can tell, and about two tokens per target pass from the draft model.
"""

from ml_collections import ConfigDict

GREEDY, SAMPLED = (0.0,), (1.0,)
HEADS = ("medusa", "hydra", "eagle3")
NONE = {"call": "specjax.drafters.none.none"}
LOOKUP = {"call": "specjax.drafters.lookup.lookup", "num_tokens": 4, "ngram": 3}
MATCH = {"call": "specjax.verifiers.match.match"}
REJECTION = {"call": "specjax.verifiers.rejection.rejection"}
# A pass over five nodes costs what one over one does, see configs/bench/cpu_kernels.py. Two
# candidates for the next token, the likelier one followed further.
TREE, SAMPLED_TREE = (-1, 0, 0, 1, 3), (-1, 0, 0, 1, 1)


def chain(choose: str, num_tokens: int = 3) -> dict:
    """Drafts one path with the draft model."""
    choose = {"call": f"specjax.drafters.grow.{choose}"}
    build = {"call": "specjax.drafters.grow.chain", "num_tokens": num_tokens, "choose": choose}
    return {"call": "specjax.drafters.model.model", "draft_model": "@draft", "build": build}


def tree(choose: str, parents: tuple[int, ...] = TREE) -> dict:
    """Drafts a tree with the draft model."""
    choose = {"call": f"specjax.drafters.grow.{choose}"}
    build = {"call": "specjax.drafters.grow.static", "parents": parents, "choose": choose}
    return {"call": "specjax.drafters.model.model", "draft_model": "@draft", "build": build}


def head(name: str, choose: str, parents: tuple[int, ...]) -> dict:
    """Drafts a tree with the heads of that name."""
    choose = {"call": f"specjax.drafters.grow.{choose}"}
    build = {"call": "specjax.drafters.grow.static", "parents": parents, "choose": choose}
    kind, holds = ("eagle", "head") if name.startswith("eagle") else (name, "heads")
    drafter = {"call": f"specjax.drafters.{kind}.{kind}", "target": "@target", holds: f"@{name}"}
    return {**drafter, "build": build}


def method(drafter: dict, verifier: dict, temperatures: tuple[float, ...]) -> dict:
    return {"drafter": drafter, "verifier": verifier, "temperatures": temperatures}


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.target = "checkpoints/target"
    c.drafts = {name: f"checkpoints/{name}" for name in ("draft", *HEADS)}  # by name
    c.dtype = "auto"
    c.cache_dtype = "auto"
    c.output = "runs/demo"
    c.prompts = ""  # a file of prompts; "" takes windows of held-out standard library text
    c.num_prompts = 16
    c.prompt_length = 128  # tokens of a window
    c.max_new_tokens = 64
    c.batch_sizes = (1,)
    c.repeats = 3
    c.seed = 0
    c.temperatures = (0.0, 1.0)
    c.methods = ConfigDict(sort_keys=False)  # the first is the baseline
    c.methods["none"] = method(NONE, MATCH, GREEDY + SAMPLED)
    c.methods["lookup"] = method(LOOKUP, MATCH, GREEDY + SAMPLED)
    c.methods["chain"] = method(chain("best", 4), MATCH, GREEDY)
    c.methods["tree"] = method(tree("best"), MATCH, GREEDY)
    for name in HEADS:
        c.methods[name] = method(head(name, "best", TREE), MATCH, GREEDY)
    c.methods["coupled chain"] = method(chain("coupled"), MATCH, SAMPLED)
    c.methods["sampled chain"] = method(chain("without_replacement"), REJECTION, SAMPLED)
    c.methods["sampled tree"] = method(
        tree("without_replacement", SAMPLED_TREE), REJECTION, SAMPLED
    )
    for name in HEADS:
        drafter = head(name, "without_replacement", SAMPLED_TREE)
        c.methods[f"sampled {name}"] = method(drafter, REJECTION, SAMPLED)
    return c
