"""The demo draft: one layer, 0.67M parameters, distilled from the demo target by forward KL.

    python train/train.py --config=configs/train/draft.py

About 20 minutes on two CPU cores, minutes on an accelerator.
"""

from ml_collections import ConfigDict

from configs.train import target


def get_config() -> ConfigDict:
    c = target.get_config()
    c.objective = "distill"
    c.workdir = "runs/train/draft"
    c.export = "checkpoints/draft"
    c.target = "checkpoints/target"
    c.model.update(hidden_size=128, intermediate_size=256, num_layers=1, num_heads=2)
    return c
