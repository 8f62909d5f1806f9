"""The demo target: 7.7M parameters trained on the Python standard library's own source.

    python train/train.py --config=configs/train/target.py

About 40 minutes on two otherwise idle CPU cores; validation loss 3.28 nats per token, 1.27 bits
per byte. Interrupt it at any time: the same command resumes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.objective = "next_token"
    c.workdir = "runs/train/target"  # checkpoints and metrics while training
    c.export = "checkpoints/target"  # the Hugging Face directory written at the end
    c.target = ""  # next_token has none
    c.sources = ()  # files and directories; () is the standard library
    c.vocab_size = 4096  # of the tokenizer trained on the text when there is no target
    c.model = ConfigDict(
        {
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_layers": 9,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 2048,
        }
    )
    c.sequence_length = 256
    c.batch_size = 16
    c.num_steps = 1800
    c.optimizer = "adamw"
    c.learning_rate = 2.5e-3  # peak, then a cosine to zero
    c.warmup_steps = 100
    c.weight_decay = 0.1  # of matrices
    c.clip_norm = 1.0
    c.seed = 0
    c.log_every = 10
    c.eval_every = 90  # a twentieth of the steps
    c.eval_sequences = 192
    c.checkpoint_every = 90
    c.keep_checkpoints = 2
    return c
