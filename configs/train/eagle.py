"""An EAGLE-1 head for the demo target: next features and their laws, one step.

    python train/train.py --config=configs/train/eagle.py

About 10 minutes on two CPU cores. Expect 1.9 and 1.9 tokens per target pass of a chain of 4 at
temperatures 0 and 1 after 1M tokens (configs/compare.py).
"""

from ml_collections import ConfigDict

from configs.train import draft, hydra


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.objective = "specjax.objectives.eagle.eagle"
    c.options = ConfigDict({"initial": "", "head": hydra.LAYER, "build": draft.CHAIN})
    c.optimizer.update(learning_rate=0.05, adam_learning_rate=0.01)
    c.num_steps = 1000
    c.eval.every = c.checkpoint_every = 50
    c.workdir, c.export = "runs/train/eagle", "checkpoints/eagle"
    return c
