"""An EAGLE-3 head for the demo target: fused features, five steps of training-time test.

    python train/train.py --config=configs/train/eagle3.py

About 25 minutes on two CPU cores. Expect 2.7 and 2.6 tokens per target pass of a chain of 4 at
temperatures 0 and 1, as the trainer shows while it runs.
"""

from ml_collections import ConfigDict

from configs.train import eagle


def get_config() -> ConfigDict:
    c = eagle.get_config()
    c.objective = "specjax.objectives.eagle.eagle3"
    c.options.num_steps = 5
    c.feature_layers = (2, 4, 6)  # low, middle, high of nine
    c.workdir, c.export = "runs/train/eagle3", "checkpoints/eagle3"
    return c
