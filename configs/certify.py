"""Every rule by enumeration, and a method of each kind by all checks.

    python decode/certify.py --config=configs/certify.py

About 13 minutes on two CPU cores. Expect every check to pass: total variations of 1e-7 or
less in float32 and of 1e-14 or less in float64.
"""

from ml_collections import ConfigDict

from configs.bench import demo
from specjax.build import mentions
from specjax.laboratory import PROPOSALS

RULES = ("match", "rejection", "block", "traversal", "kseq", "gbv", "hybrid")


def rule(name: str) -> dict:
    return {"call": f"specjax.verifiers.{name}.{name}"}


def method(drafter: dict, verifier: dict) -> dict:
    return {"drafter": drafter, "verifier": verifier}


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.output = "runs/certify"
    c.only = ()  # names of rules and methods; () is all
    c.proposals = tuple(PROPOSALS)
    c.laws = ()  # laws that no rule may refuse
    c.dtypes = ("float32", "float64")
    c.bfloat16 = True  # methods also in bfloat16
    c.rules = ConfigDict(sort_keys=False)
    for name in RULES:
        c.rules[name] = rule(name)
    c.rules["mine"] = {"call": ""}  # a blank, for --config.rules.mine.call=module.rule
    c.methods = ConfigDict(sort_keys=False)
    for name, spec in demo.get_config().methods.items():
        if not any(mentions(spec.drafter, head) for head in demo.HEADS):  # nothing to train here
            c.methods[name] = method(spec.drafter, spec.verifier)
    c.methods["block chain"] = method(demo.chain("without_replacement"), rule("block"))
    c.methods["traversal tree"] = method(demo.tree("without_replacement"), rule("traversal"))
    return c
