"""What loading a checkpoint of 1.1B parameters costs beside reading its bytes.

    python decode/loading.py --config=configs/bench/loading.py

About 2 minutes on two CPU cores; 2.2 GB of disk and 5 GB of memory. Loading in the stored type
should take at most 1.2 times as long as reading, and at no time more memory than the model and its
largest tensor.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.output = "runs/loading"
    c.directory = "runs/loading/checkpoint"  # made if it is not there, and left there
    c.model = ConfigDict()  # random, in bfloat16
    c.model.vocab_size = 32000
    c.model.hidden_size = 2048
    c.model.intermediate_size = 5632
    c.model.num_layers = 22
    c.model.num_heads = 32
    c.model.num_kv_heads = 4
    c.model.head_dim = 64
    c.model.tie_embeddings = False
    c.max_shard_bytes = 10**9
    c.at_most = 1.2  # times reading
    c.repeats = 9
    c.seed = 0
    return c
