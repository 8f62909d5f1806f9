"""The demo target: 7.7M parameters trained on the Python standard library's own source.

    python train/train.py --config=configs/train/target.py

About 40 minutes on two otherwise idle CPU cores; validation loss 3.28 nats per token, 1.27 bits
per byte. Interrupt it at any time: the same command resumes.
"""

from ml_collections import ConfigDict

from configs.train import draft

ADAMW = {
    "call": "specjax.optimizers.adamw",
    "learning_rate": 2.5e-3,  # peak, then a cosine to zero
    "warmup_steps": 100,
    "weight_decay": 0.1,  # of matrices
    "clip_norm": 1.0,
}


def get_config() -> ConfigDict:
    c = draft.get_config()
    c.objective = "specjax.objectives.next_token.next_token"
    c.options = ConfigDict(
        {
            "model": {
                "hidden_size": 256,
                "intermediate_size": 704,
                "num_layers": 9,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 64,
                "max_position_embeddings": 2048,
            }
        }
    )
    c.workdir, c.export = "runs/train/target", "checkpoints/target"
    c.target = ""  # next_token has none
    c.vocab_size = 4096  # of the tokenizer trained on the text when there is no target
    c.optimizer = ConfigDict(ADAMW)
    c.num_steps = 1800
    c.dtype = "float32"
    c.accumulate = 8
    c.seed = 0
    c.eval.every = c.checkpoint_every = 90  # a twentieth of the steps
    return c
