"""Tiny random checkpoints on disk, and the scripts' root on the path as `scripts.run` puts it."""

import sys
from pathlib import Path

import jax

from specjax.data import tokenizers
from specjax.models import hf
from specjax.models.transformer import TransformerConfig, transformer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONTEXT = 256


def save_model(directory: Path, vocab_size: int = 300, num_layers: int = 1, seed: int = 0) -> str:
    """A model of a few thousand weights, whose laws are uneven, and its tokenizer."""
    config = TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
    )
    params = jax.jit(transformer(config).init)(jax.random.key(seed))
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params)
    hf.save(directory, config, params, eos_ids=(0,), bos_id=0)
    text = (ROOT / "specjax" / "types.py").read_text()
    tokenizers.save(tokenizers.train_bpe([text], vocab_size), directory)
    return str(directory)
