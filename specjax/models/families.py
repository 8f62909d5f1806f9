"""What sets the layers of one family of models apart from those of another."""

from typing import NamedTuple

_QKV = ("q_proj", "k_proj", "v_proj")


class Family(NamedTuple):
    """A decoder's layers; by default Llama's. Sizes and numbers are a `TransformerConfig`'s."""

    biases: tuple[str, ...] = ()  # the projections that add one
    qk_norm: bool = False  # an RMSNorm of every query and key before rotation (arXiv 2302.05442)
    layer_norm: bool = False  # normalises by arXiv 1607.06450, not by RMS
    norm_offset: float = 0.0  # a norm multiplies by this plus its weights
    post_norms: bool = False  # norms of what attention and feed-forward add, too
    activation: str = "silu"  # or "gelu", in its tanh form
    gated: bool = True  # feed-forward as in arXiv 2002.05202
    learned_positions: bool = False  # added to embeddings, instead of rotation
    scaled_embedding: bool = False  # embeddings times the root of their width


_GEMMA = Family(norm_offset=1.0, post_norms=True, activation="gelu", scaled_embedding=True)

FAMILIES = {
    "llama": Family(),  # arXiv 2302.13971, 2407.21783
    "mistral": Family(),  # arXiv 2310.06825: a window in every layer
    "mixtral": Family(),  # arXiv 2401.04088: experts
    "qwen2": Family(biases=_QKV),  # arXiv 2407.10671
    "qwen3": Family(qk_norm=True),  # arXiv 2505.09388
    "qwen3_moe": Family(qk_norm=True),  # the same: experts
    "gemma2": _GEMMA,  # arXiv 2408.00118: soft caps, a window in every other layer
    "gemma3_text": _GEMMA._replace(qk_norm=True),  # arXiv 2503.19786: five windows, then none
    "gpt2": Family(  # Radford et al. 2019
        biases=(*_QKV, "o_proj", "up_proj", "down_proj"),
        layer_norm=True,
        activation="gelu",
        gated=False,
        learned_positions=True,
    ),
}
