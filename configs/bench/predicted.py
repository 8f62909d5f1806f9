"""What `theory` promises of the demo's methods from their passes' times, and what they reach.

    python decode/benchmark.py --config=configs/bench/predicted.py

About 7 minutes on two CPU cores. Expect 80 to 105 % of the prediction, the less the busier the
machine is.
"""

from ml_collections import ConfigDict

from configs.bench import demo


def get_config() -> ConfigDict:
    c = demo.get_config()
    c.output = "runs/predicted"
    c.costs = 0.1  # seconds of each pass of each method in every repeat
    c.repeats = 9  # a cost is a quotient of two medians
    return c
