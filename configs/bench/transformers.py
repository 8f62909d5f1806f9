"""The same checkpoints and prompts in this engine and in transformers' own, greedy, in one run.

    pip install -e '.[parity]'
    python decode/benchmark.py --config=configs/bench/transformers.py

About a minute on two CPU cores. Both sides decode in float32 with a key/value cache; transformers
keeps the fastest of several options and numbers of threads, as `results.json` tells. Expect the
same tokens from every method, and each of ours three times as fast as its counterpart or more.
"""

from ml_collections import ConfigDict

from configs.bench import demo


def peer(function: str) -> dict:
    call = {"call": f"decode.transformers_peer.{function}"}
    return {"peer": call, "temperatures": demo.GREEDY}


def get_config() -> ConfigDict:
    c = demo.get_config()
    c.output = "runs/transformers"
    c.num_prompts = 8
    c.temperatures = demo.GREEDY
    c.methods = ConfigDict(sort_keys=False)  # the first is the baseline
    c.methods["none"] = demo.method(demo.NONE, demo.MATCH, demo.GREEDY)
    c.methods["lookup"] = demo.method(demo.LOOKUP, demo.MATCH, demo.GREEDY)
    c.methods["chain"] = demo.method(demo.chain("best", 4), demo.MATCH, demo.GREEDY)
    c.methods["transformers none"] = peer("greedy")
    c.methods["transformers lookup"] = peer("lookup")
    c.methods["transformers assisted"] = peer("assisted")
    return c
