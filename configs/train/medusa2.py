"""Medusa-2: the demo target learns together with its heads, which makes it another target.

    python train/train.py --config=configs/train/medusa2.py

About an hour on two CPU cores. Expect 1.2 and 1.4 tokens per target pass of a chain of 4 at
temperatures 0 and 1 after half a million tokens; compare it with itself: its target is another one.
"""

from ml_collections import ConfigDict

from configs.train import medusa


def get_config() -> ConfigDict:
    c = medusa.get_config()
    c.objective = "specjax.objectives.medusa.medusa2"
    c.options.model = "@target"  # its shape, to export it by
    c.options.backbone_loss = {"call": "specjax.objectives.losses.forward_kl"}
    c.options.warmup_steps = 100  # of the heads alone
    c.options.backbone_scale = 0.25  # of the target's updates, relative to the heads'
    c.optimizer.learning_rate = 0.01
    c.workdir, c.export = "runs/train/medusa2", "checkpoints/medusa2"
    return c
