"""Keep what equals the target's own choice: lossless for any draft, and the same text for all.

The target draws its token at every node, with noise that depends on the row and the position only,
and the draft is followed while it agrees. At temperature 0 this is greedy verification. Above, the
output equals plain sampling token for token, whatever the drafter (Daliri, Musco and Suresh,
*Coupling without communication and drafter-invariant speculative decoding*, arXiv 2408.07978).
"""

import jax.numpy as jnp
from jax import lax

from specjax import trees
from specjax.kernels.vocabulary import argmax
from specjax.sampling import pick, shared_noise
from specjax.types import LAWS, Array, Context, Draft, Keys, ModelOutput, Params, Verdict, Verifier


def match() -> Verifier:
    """Follows the tree along what the noise of the next position picks from the target's law."""

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        del params, output
        mask = trees.ancestor_mask(draft.parents)
        depth_of = jnp.minimum(trees.depths(mask), draft.depth)

        def draw(warped: Array) -> Array:
            position = context.length[:, None] + jnp.arange(draft.depth + 1)
            noise = shared_noise(rng_keys, context, position, warped.shape[-1])  # [B, P, opaque]
            return pick(rng_keys, jnp.take_along_axis(noise, depth_of[..., None], 1), warped)

        sampled = (context.sampling.temperature > 0).any()
        emitted = lax.cond(sampled, draw, argmax, warped)  # [B, N]
        wanted = jnp.take_along_axis(emitted, jnp.maximum(draft.parents, 0), 1)
        agrees = (draft.tokens == wanted).at[:, 0].set(True)
        last, path, num_nodes = trees.deepest(agrees, mask, draft.depth)
        return Verdict(path, num_nodes, jnp.take_along_axis(emitted, last[:, None], 1)[:, 0])

    return Verifier(verify, LAWS, drafter_invariant=True)
