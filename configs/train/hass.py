"""HASS: EAGLE-1's head, trained over the three steps that it will draft.

    python train/train.py --config=configs/train/hass.py

About 45 minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from configs.train import eagle


def get_config() -> ConfigDict:
    c = eagle.get_config()
    c.objective = "specjax.objectives.eagle.hass"
    c.options.num_steps = 3
    c.workdir, c.export = "runs/train/hass", "checkpoints/hass"
    return c
