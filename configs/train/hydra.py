"""Hydra++ heads for the demo target: a prefix layer, then heads that read the drafted path.

    python train/train.py --config=configs/train/hydra.py

About 15 minutes on two CPU cores. Expect 2.2 and 1.9 tokens per target pass of a chain of 4 at
temperatures 0 and 1, as the trainer shows while it runs.
"""

from ml_collections import ConfigDict

from configs.train import draft

LAYER = {"intermediate_size": 704, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.objective = "specjax.objectives.hydra.hydra"
    c.options = ConfigDict({"initial": "", "num_heads": 4, "num_layers": 1, "prefix": LAYER})
    c.options.loss = {"call": "specjax.objectives.losses.forward_kl"}
    c.options.build = draft.CHAIN
    c.optimizer.update(learning_rate=0.05, adam_learning_rate=0.01)
    c.num_steps = 1000
    c.eval.every = c.checkpoint_every = 50
    c.workdir, c.export = "runs/train/hydra", "checkpoints/hydra"
    return c
