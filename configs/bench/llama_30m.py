"""Where the time of a step goes at 30M parameters: a random target and a random two-layer draft.

    python decode/profile.py --config=configs/bench/llama_30m.py

About 3 minutes on two CPU cores. A step should cost at most 1.10 times its target and drafter
passes, each timed alone, at temperature 0 and 1.15 times at temperature 1. It does not yet: alone
the drafter finds its weights in the processor's cache, which in a step the target's displace.
"""

from ml_collections import ConfigDict

from configs.bench import demo


def case(temperature: float, choose: str, verifier: dict) -> dict:
    return {
        "temperature": temperature,
        "drafter": demo.chain(choose, num_tokens=5),
        "choose": {"call": f"specjax.drafters.grow.{choose}"},
        "verifier": verifier,
    }


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.output = "runs/llama_30m"
    c.target = {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
    }
    small = {"hidden_size": 192, "intermediate_size": 512, "num_layers": 2}
    c.drafts = {"draft": {**c.target.to_dict(), **small, "num_heads": 3, "num_kv_heads": 1}}
    c.batch_size = 1
    c.prompt_length = 128
    c.max_length = 2048  # slots of every buffer
    c.repeats = 7
    c.seconds = 0.5  # of every part in every repeat
    c.seed = 0
    c.cases = ConfigDict(sort_keys=False)
    c.cases["greedy"] = case(0.0, "best", demo.MATCH)
    c.cases["coupled"] = case(1.0, "coupled", demo.MATCH)
    c.cases["sampled"] = case(1.0, "without_replacement", demo.REJECTION)
    return c
