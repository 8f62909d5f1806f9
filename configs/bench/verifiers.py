"""How much every lossless rule accepts of the demo pair's drafts at temperature 1.

    python decode/benchmark.py --config=configs/bench/verifiers.py

About 17 minutes on two CPU cores. Expect more tokens per pass than rejection from block
on chains of 5 and 8 (.20 and .36 more), from traversal on every tree (.12 to .24), from gbv on
paths (.32) and from hybrid on its own drafts (.07), each by more than the interval, which chains of
3 (.04) stay within; and the first token of both chains of 5 accepted as often as its formula says.
kseq gains on paths (.08) but loses on siblings (.18): it accepts one of them more often, yet has no
preference for the eldest, which here has the most below it.
"""

from ml_collections import ConfigDict

from configs.bench import demo, verification

TREE = verification.TREE  # 16 nodes, 5 deep


def paths(num_paths: int = 3, num_tokens: int = 5) -> dict:
    """Independent paths of the draft model."""
    drafter = demo.chain("independent", num_tokens)
    drafter["build"] |= {"call": "specjax.drafters.grow.paths", "num_paths": num_paths}
    return drafter


def merged(drafter: dict) -> dict:
    build = {"call": "specjax.drafters.grow.merged", "build": drafter["build"]}
    return {**drafter, "build": build}


def method(drafter: dict, rule: str) -> dict:
    verifier = {"call": f"specjax.verifiers.{rule}.{rule}"}
    return demo.method(drafter, verifier, demo.SAMPLED)


def get_config() -> ConfigDict:
    c = demo.get_config()
    c.output = "runs/verifiers"
    c.num_prompts = 192
    c.batch_sizes = (16,)  # rows of a pass; what they accept does not depend on it
    c.repeats = 1
    c.temperatures = demo.SAMPLED
    c.methods = ConfigDict(sort_keys=False)  # the first is the baseline
    c.methods["none"] = method(demo.NONE, "match")
    pairs = []

    def compare(name: str, drafter: dict, *rules: str) -> None:
        """Each rule, and on the same kind of draft rejection."""
        for rule in (*rules, "rejection"):
            c.methods[f"{rule} {name}"] = method(drafter, rule)
        pairs.extend((f"{rule} {name}", f"rejection {name}") for rule in rules)

    for length in (3, 5, 8):
        compare(f"chain {length}", demo.chain("independent", length), "block")
    compare("tree", demo.tree("without_replacement", TREE), "traversal")
    compare("siblings", demo.tree("independent", TREE), "kseq", "traversal")
    compare("paths", paths(), "kseq", "traversal", "gbv")
    compare("merged", merged(paths()), "traversal")
    compare("hybrid", demo.tree("hybrid", TREE), "hybrid")
    c.methods["match coupled 5"] = method(demo.chain("coupled", 5), "match")
    c.methods["match coupled 5"].formula = "coupled_acceptance"
    c.methods["rejection chain 5"].formula = "overlap"
    c.comparisons = (*pairs, ("match coupled 5", "rejection chain 5"))
    return c
