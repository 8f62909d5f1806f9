"""The demo draft's shape trained on text alone: what distillation is measured against.

    python train/train.py --config=configs/train/text.py

About half an hour on two CPU cores. Expect 1.6 tokens per target pass of a chain of 4 at
temperatures 0 and 1 after 1M tokens (configs/compare.py).
"""

from ml_collections import ConfigDict

from configs.train import draft


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.options.loss = {"call": "specjax.objectives.losses.hard_ce"}  # the target teaches nothing
    c.workdir, c.export = "runs/train/text", "checkpoints/text"
    return c
