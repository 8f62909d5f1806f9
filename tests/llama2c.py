"""Reads the files of llama2.c (legacy version) into this project's parameters."""

import struct
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from specjax.models.transformer import TransformerConfig
from specjax.types import PyTree

BOS = 1


def load(path: Path) -> tuple[TransformerConfig, PyTree]:
    """The model of a legacy checkpoint: seven int32, then float32 tensors, layers stacked."""
    data = path.read_bytes()
    width, inner, num_layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", data)
    tied, vocab, head_dim = vocab > 0, abs(vocab), width // heads
    weights = np.frombuffer(data, "<f4", offset=28)
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return weights[position - size : position].reshape(shape)

    def stack(rows: int, columns: int) -> np.ndarray:
        return take(num_layers, rows, columns)

    embedding = take(vocab, width)
    attention_norm = take(num_layers, width)
    q, k = stack(width, width), stack(kv_heads * head_dim, width)
    v, o = stack(kv_heads * head_dim, width), stack(width, width)
    mlp_norm = take(num_layers, width)
    gate, down, up = stack(inner, width), stack(width, inner), stack(inner, width)
    norm = take(width)
    take(2, length, head_dim // 2)  # tables of the rotary embedding
    params: dict[str, PyTree] = {"embed_tokens": embedding, "norm": {"weight": norm}}
    if not tied:
        params["lm_head"] = take(vocab, width)
    if position != len(weights):
        raise ValueError(f"{path} holds {len(weights)} floats; its header needs {position}.")
    for i in range(num_layers):
        params[f"layers_{i}"] = {
            "input_layernorm": {"weight": attention_norm[i]},
            "self_attn": {
                "q_proj": _halves(q[i], heads),
                "k_proj": _halves(k[i], kv_heads),
                "v_proj": v[i],
                "o_proj": o[i],
            },
            "post_attention_layernorm": {"weight": mlp_norm[i]},
            "mlp": {"gate_proj": gate[i], "up_proj": up[i], "down_proj": down[i]},
        }
    config = TransformerConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=length,
        tie_embeddings=tied,
    )
    return config, jax.tree.map(jnp.asarray, params)


def load_pieces(path: Path) -> list[bytes]:
    """The text of every token id: after an int32, a float32 score, an int32 size and the bytes."""
    data, position, pieces = path.read_bytes(), 4, []
    while position < len(data):
        _, size = struct.unpack_from("<fi", data, position)
        position += 8 + size
        pieces.append(data[position - size : position])
    return pieces


def decode(pieces: list[bytes], tokens: Sequence[int] | np.ndarray) -> str:
    """The text that llama2.c prints for the tokens that follow BOS."""
    out = b""
    for i, token in enumerate(map(int, tokens)):
        piece = pieces[token]
        if i == 0:
            piece = piece.removeprefix(b" ")
        if piece.startswith(b"<0x") and piece.endswith(b">"):
            piece = bytes([int(piece[3:-1], 16)])
        out += piece
    return out.decode("utf-8")


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Moves each head's rows from rotated pairs side by side to one half against the other."""
    rows = weight.reshape(heads, -1, 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)
