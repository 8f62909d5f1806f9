"""HASS: EAGLE-1's head, trained over the three steps that it will draft.

    python train/train.py --config=configs/train/hass.py

About 25 minutes on two CPU cores. Expect 1.6 and 1.7 tokens per target pass of a chain of 4 at
temperatures 0 and 1 after 1M tokens, --config.num_steps=244 --config.optimizer.learning_rate=0.1.
"""

from ml_collections import ConfigDict

from configs.train import eagle


def get_config() -> ConfigDict:
    c = eagle.get_config()
    c.objective = "specjax.objectives.eagle.hass"
    c.options.num_steps = 3
    c.workdir, c.export = "runs/train/hass", "checkpoints/hass"
    return c
