"""Losses and heads at equal budgets: 1M tokens each, three seeds.

    python train/compare.py

About three hours on two CPU cores; interrupt it at any time. The papers put distilled drafts above
the one trained on text alone, Hydra above Medusa, EAGLE-3 above EAGLE-1, and so it is here: by .2,
.6 and .7 tokens per target pass at temperature 0.
"""

from ml_collections import ConfigDict

from configs.train import draft

_DRAFTERS = "specjax.drafters"


def loss(name: str, **options: object) -> dict:
    spec = {"call": f"specjax.objectives.losses.{name}", **options}
    return {"config": "draft", "changes": {"options": {"loss": spec}}}


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.target = "checkpoints/target"
    c.output = "runs/compare"
    c.seeds = (1, 2, 3)
    c.runs = ConfigDict(sort_keys=False)
    c.runs["text"] = {"config": "text"}
    c.runs["forward KL"] = loss("forward_kl")
    c.runs["reverse KL"] = loss("reverse_kl")
    c.runs["JSD"] = loss("jsd")
    c.runs["TV"] = loss("total_variation")
    c.runs["LK alpha"] = loss("lk_alpha")
    c.runs["LK lambda"] = loss("lk_lambda")
    c.runs["top-16 forward KL"] = loss("top_k_ce", k=16)
    fast = {"optimizer": {"learning_rate": 0.1}}  # heads learn from nothing in few steps
    for head in ("medusa", "hydra", "eagle", "eagle3"):
        c.runs[head] = {"config": head, "changes": fast}
    c.comparisons = (
        ("forward KL", "text"),
        ("hydra", "medusa"),
        ("eagle3", "eagle"),
        *((name, "forward KL") for name in list(c.runs)[2:8]),
    )
    c.common = {"num_steps": 244, "checkpoint_every": 122, "eval": {"every": 244}}  # of every run
    # All drafters grow this tree.
    c.build = draft.CHAIN
    heads = {"target": "@target", "heads": "@draft", "build": "@build"}
    c.drafters = {
        "model": {
            "call": f"{_DRAFTERS}.model.model",
            "draft_model": "@draft",
            "build": "@build",
        },
        "medusa": {"call": f"{_DRAFTERS}.medusa.medusa", **heads},
        "hydra": {"call": f"{_DRAFTERS}.hydra.hydra", **heads},
        "eagle": {
            "call": f"{_DRAFTERS}.eagle.eagle",
            "target": "@target",
            "head": "@draft",
            "build": "@build",
        },
    }
    c.num_prompts = 64
    c.prompt_length = 128
    c.max_new_tokens = 64
    c.temperatures = (0.0, 1.0)
    return c
