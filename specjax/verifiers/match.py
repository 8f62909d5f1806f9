"""Keep what equals the target's own choice: lossless for any draft, and the same text for all.

The target draws its token at every node, with noise that depends on the row and the position only,
and the draft is followed while it agrees. At temperature 0 this is greedy verification. Above, the
output equals plain sampling token for token, whatever the drafter (Daliri, Musco and Suresh,
*Coupling without communication and drafter-invariant speculative decoding*, arXiv 2408.07978).
"""

import jax.numpy as jnp
from jax import lax

from specjax import trees
from specjax.sampling import argmax, shared_gumbel
from specjax.types import LAWS, Array, Context, Draft, Keys, ModelOutput, Params, Verdict, Verifier


def match() -> Verifier:
    """Follows the tree along `argmax(warped + noise of the next position)`."""

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

        def perturb(warped: Array) -> Array:
            position = context.length[:, None] + jnp.arange(draft.depth + 1)
            noise = shared_gumbel(rng_keys, position, warped.shape[-1])  # [B, P, V]
            return warped + jnp.take_along_axis(noise, depth_of[..., None], 1)

        sampled = (context.sampling.temperature > 0).any()
        emitted = argmax(lax.cond(sampled, perturb, lambda x: x, warped))  # [B, N]
        wanted = jnp.take_along_axis(emitted, jnp.maximum(draft.parents, 0), 1)
        agrees = (draft.tokens == wanted).at[:, 0].set(True)
        last, path, num_nodes = trees.deepest(agrees, mask, draft.depth)
        return Verdict(path, num_nodes, jnp.take_along_axis(emitted, last[:, None], 1)[:, 0])

    return Verifier(verify, LAWS)
