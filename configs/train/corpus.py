"""What the demo target learnt from, as a corpus to retrieve drafts from.

    python train/corpus.py --config=configs/train/corpus.py

About 5 seconds on two CPU cores. Expect 1M tokens of 247 files in 8 MB, less than half of them all.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.target = "checkpoints/target"  # a Hugging Face directory, for its tokenizer
    c.output = "runs/corpus"
    c.sources = ()  # files and directories; () is the standard library without what is held out
    c.max_tokens = 1_000_000
    c.room = 0  # places more than the tokens need, for documents that are added later
    c.seed = 0  # of the documents' order
    return c
