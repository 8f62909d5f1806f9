"""The demo draft: one layer, 0.69M parameters, distilled from the demo target.

    python train/train.py --config=configs/train/draft.py

About half an hour on two CPU cores. Expect 2.7 and 2.3 tokens per target pass of a chain of 4 at
temperatures 0 and 1; 2M tokens more by JSD, see the README, make it 2.4 at 1. The other configs of
this directory change what they need of this one.
"""

from ml_collections import ConfigDict

MUON = {
    "call": "specjax.optimizers.muon",  # for the layers' matrices; Adam for embeddings and norms
    "learning_rate": 1.5e-2,  # peak, then a cosine to zero
    "adam_learning_rate": 4e-3,
    "warmup_steps": 50,
    "weight_decay": 0.05,  # of the layers' matrices
    "clip_norm": 1.0,  # of all gradients together
}
DRAWN = {"call": "specjax.drafters.grow.without_replacement"}  # at temperature 0 the likeliest
CHAIN = {"call": "specjax.drafters.grow.chain", "num_tokens": 4, "choose": DRAWN}
LOOKUP = {"call": "specjax.drafters.lookup.lookup", "num_tokens": 4}


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.objective = "specjax.objectives.distill.distill"
    c.options = {
        "initial": "",  # a directory to start from
        "loss": {"call": "specjax.objectives.losses.forward_kl"},
        "build": CHAIN,  # the tree that the evaluation drafts
        "model": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 2048,
        },
    }
    c.workdir = "runs/train/draft"  # checkpoints and metrics while training
    c.export = "checkpoints/draft"  # the Hugging Face directory written at the end
    c.target = "checkpoints/target"  # gives the tokenizer, the law and the features to learn
    c.feature_layers = ()  # of the target, for drafters that read them
    c.sources = ()  # files and directories; () is the standard library
    c.vocab_size = 0  # the target's
    c.data = {"text": (1.0, 1.0)}  # shares at the start and at the end; target, student too
    c.generated = {  # how target and student write
        "num_rows": 4096,  # by the target, before training
        "round_steps": 100,  # for which what the student wrote is used
        "prompt_length": 64,
        "temperature": (0.0, 1.0),  # taking turns
        "batch_size": 64,
        "drafter": LOOKUP,  # of the target
    }
    c.teacher_cache = 0  # of the target's likeliest tokens; 0 computes all of its law anew
    c.sequence_length = 256
    c.batch_size = 16
    c.accumulate = 4  # microbatches of a step, small enough for a CPU's cache
    c.num_steps = 3910  # of batch_size rows each
    c.optimizer = MUON
    c.dtype = "bfloat16"  # of activations; parameters, laws, optimizer are float32 anyway
    c.mesh = {"data": -1}  # "fsdp" and "tensor" too; -1: the devices that are left
    c.seed = 1
    c.eval = {"every": 195, "num_sequences": 192}
    c.eval.update(num_prompts=16, prompt_length=64, max_new_tokens=64)
    c.log_every = 10
    c.checkpoint_every = 195
    c.keep_checkpoints = 2
    c.tensorboard = False
    return c
