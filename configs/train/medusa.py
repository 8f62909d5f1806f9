"""Medusa-1 heads for the demo target: one residual block each, the target frozen.

    python train/train.py --config=configs/train/medusa.py

About 15 minutes on two CPU cores. Expect 1.2 and 1.4 tokens per target pass of a chain of 4 at
temperatures 0 and 1, as the trainer shows while it runs; a wider tree suits Medusa better.
"""

from ml_collections import ConfigDict

from configs.train import draft


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.objective = "specjax.objectives.medusa.medusa"
    c.options = ConfigDict({"initial": "", "num_heads": 4, "num_layers": 1})
    c.options.loss = {"call": "specjax.objectives.losses.forward_kl"}
    c.options.build = draft.CHAIN
    c.optimizer.update(learning_rate=0.05, adam_learning_rate=0.01)
    c.num_steps = 1000
    c.eval.every = c.checkpoint_every = 50
    c.workdir, c.export = "runs/train/medusa", "checkpoints/medusa"
    return c
