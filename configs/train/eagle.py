"""An EAGLE-1 head for the demo target: next features and their laws, one step.

python train/train.py --config=configs/train/eagle.py
"""

from ml_collections import ConfigDict

from configs.train import draft, hydra


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.objective = "specjax.objectives.eagle.eagle"
    c.options = ConfigDict({"head": hydra.LAYER, "build": draft.CHAIN})
    c.workdir, c.export = "runs/train/eagle", "checkpoints/eagle"
    return c
