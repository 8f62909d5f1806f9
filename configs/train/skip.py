"""Which of the demo target's layers a draft can do without, for `drafters.layer_skip`.

    python train/calibrate.py --config=configs/train/skip.py
    python train/calibrate.py --config=configs/train/skip.py --config.method=swift

Less than a minute on two CPU cores. Expect layers 0, 5 and 8 of nine, which agree with the target
about .78 of its tokens, and from SWIFT layers 0, 4, 5, 6 and 8 about .88.
"""

from ml_collections import ConfigDict

_CALIBRATION = "specjax.calibration"


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.target = "checkpoints/target"  # a Hugging Face directory
    c.dtype = "auto"  # or "float32", "bfloat16"
    c.output = "runs/skip.json"
    c.method = "draft_and_verify"  # one of `methods`
    c.num_draft_tokens = 4  # of the chains that the draft is judged by
    c.sources = ()  # files and directories; () is the standard library, what the target learnt from
    c.num_texts = 8
    c.seed = 0
    given = {name: f"@{name}" for name in ("measure", "num_layers", "num_drafted", "head", "seed")}
    c.methods = {
        # Texts of prompt_length tokens, max_new_tokens of the target's own and the last `window` of
        # them drafted: on others' text a draft is judged by what it would never write.
        "draft_and_verify": {
            "search": {
                "call": f"{_CALIBRATION}.draft_and_verify",
                **given,
                "num_tries": 200,
                "num_random": 20,
            },
            "prompt_length": 128,
            "max_new_tokens": 128,
            "window": 128,
        },
        "swift": {
            "search": {
                "call": f"{_CALIBRATION}.swift",
                **given,
                "skip_ratio": 0.45,
                "enough": 0.93,
                "num_tries": 1000,
                "guided_every": 25,
                "patience": 300,
            },
            "prompt_length": 128,
            "max_new_tokens": 64,
            "window": 50,
        },
    }
    return c
