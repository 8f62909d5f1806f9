"""The demo draft: one layer, 0.69M parameters, distilled from the demo target by forward KL.

    python train/train.py --config=configs/train/draft.py
    python train/train.py --config=configs/train/draft.py --config.num_steps=3910

The second command continues what the first has trained, to 16M tokens. About 50 minutes on two CPU
cores in all; at temperature 1 a drafted token is accepted with probability 0.62 (teacher-forced, on
held-out text).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.objective = "distill"
    c.workdir = "runs/train/draft"  # checkpoints and metrics while training
    c.export = "checkpoints/draft"  # the Hugging Face directory written at the end
    c.target = "checkpoints/target"  # gives the tokenizer and the law to learn
    c.sources = ()  # files and directories; () is the standard library
    c.vocab_size = 0  # the target's
    c.model = ConfigDict(
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 2048,
        }
    )
    c.sequence_length = 256
    c.batch_size = 16
    c.num_steps = 3000
    c.optimizer = "muon"  # for the layers' matrices; Adam for embeddings and norms
    c.learning_rate = 1.5e-2  # peak, then a cosine to zero
    c.adam_learning_rate = 4e-3  # the same for Adam's part
    c.warmup_steps = 50
    c.weight_decay = 0.05  # of the layers' matrices
    c.clip_norm = 1.0
    c.seed = 1
    c.log_every = 10
    c.eval_every = 150  # a twentieth of the steps
    c.eval_sequences = 192
    c.checkpoint_every = 150
    c.keep_checkpoints = 2
    return c
