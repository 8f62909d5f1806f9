"""What every rule of verification costs beside the target pass that it judges.

    python decode/verification.py --config=configs/bench/verification.py

About 2 minutes on two CPU cores. No rule should cost more than its bound: `match` 5 % of the
pass at temperature 0 and 15 % above, the others 8 % for point masses and chains and 15 % for
sampled trees. Expect 2 and 4 % from `match`, 8 from `gbv` and at most 3 from the others.
"""

from ml_collections import ConfigDict

from configs.bench import llama_30m

# 16 nodes, 5 deep: the likelier a node's place, the more it has below.
TREE = (-1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 5, 5, 6, 11, 14)
POINTS, CHAIN, SAMPLED = 0.08, 0.08, 0.15


def tree(choose: str) -> dict:
    choose = {"call": f"specjax.drafters.grow.{choose}"}
    return {"call": "specjax.drafters.grow.static", "parents": TREE, "choose": choose}


def chain(choose: str) -> dict:
    choose = {"call": f"specjax.drafters.grow.{choose}"}
    return {"call": "specjax.drafters.grow.chain", "num_tokens": 5, "choose": choose}


def paths() -> dict:
    choose = {"call": "specjax.drafters.grow.independent"}
    shape = {"num_paths": 3, "num_tokens": 5}
    return {"call": "specjax.drafters.grow.paths", "choose": choose, **shape}


def merged() -> dict:
    return {"call": "specjax.drafters.grow.merged", "build": paths()}


def case(rule: str, proposal: str, bound: float, temperature: float = 1.0) -> dict:
    verifier = {"call": f"specjax.verifiers.{rule}.{rule}"}
    return {
        "verifier": verifier,
        "proposal": proposal,
        "bound": bound,  # share of the pass
        "temperature": temperature,
    }


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.output = "runs/verification"
    c.target = llama_30m.get_config().target
    c.num_nodes = 16  # of the target pass
    c.context_length = 128
    c.max_length = 2048  # slots of the target's cache
    c.batch_size = 1
    c.num_drafts = 16  # of every proposal
    c.noise = 1.7  # of draft logits, a standard deviation: q overlaps p by .6
    c.repeats = 15
    c.seconds = 0.2  # of every rule in every repeat
    c.seed = 0
    c.proposals = ConfigDict(sort_keys=False)
    c.proposals["point tree"] = tree("best")
    c.proposals["point chain"] = chain("best")
    c.proposals["chain"] = chain("independent")
    c.proposals["tree"] = tree("without_replacement")
    c.proposals["siblings"] = tree("independent")
    c.proposals["paths"] = paths()
    c.proposals["merged paths"] = merged()
    c.proposals["hybrid tree"] = tree("hybrid")
    c.cases = ConfigDict(sort_keys=False)
    c.cases["match, greedy"] = case("match", "point tree", 0.05, temperature=0.0)
    c.cases["match"] = case("match", "point tree", 0.15)
    c.cases["match, sampled tree"] = case("match", "tree", 0.15)
    c.cases["rejection, points"] = case("rejection", "point tree", POINTS)
    c.cases["rejection, point chain"] = case("rejection", "point chain", POINTS)
    c.cases["rejection, chain"] = case("rejection", "chain", CHAIN)
    c.cases["rejection, tree"] = case("rejection", "tree", SAMPLED)
    c.cases["rejection, paths"] = case("rejection", "paths", SAMPLED)
    c.cases["block, point chain"] = case("block", "point chain", POINTS)
    c.cases["block, chain"] = case("block", "chain", CHAIN)
    c.cases["traversal, points"] = case("traversal", "point tree", POINTS)
    c.cases["traversal, chain"] = case("traversal", "chain", CHAIN)
    c.cases["traversal, tree"] = case("traversal", "tree", SAMPLED)
    c.cases["traversal, merged paths"] = case("traversal", "merged paths", SAMPLED)
    c.cases["kseq, siblings"] = case("kseq", "siblings", SAMPLED)
    c.cases["gbv, paths"] = case("gbv", "paths", SAMPLED)
    c.cases["hybrid, tree"] = case("hybrid", "hybrid tree", SAMPLED)
    return c
