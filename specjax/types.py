"""The vocabulary of specjax: every struct and every abstraction, with its shapes and invariants.

Letters used in every shape and einsum of the project:

    B  rows of a batch            N  nodes of a tree, root included     D  depth of a tree
    P  path length, D + 1         T  length of a prompt                 S  slots of a buffer
    M  nodes of a block           V  vocabulary                         L  layers
    K  key/value heads            G  queries per key/value head         H  head size
    E  embedding width            F  feature width
    p  target law                 q  draft law

Three ideas carry the rest. The last committed token is always *pending*: it is the root of the next
tree, and the target has cached everything before it. A forward pass never writes a cache: it
returns a `Block`, of which `cache.commit` makes the accepted part history. A draft is a tree stored
as `parents`; masks, depths, positions and paths are derived where they are used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct as struct
import jax

Array = jax.Array
PyTree = Any


# ----------------------------------------------------------------------------- what a model sees


@struct.dataclass
class Cache:
    """Committed keys and values. Slot `i` holds position `i` unless the owner's docstring differs.

    Slots at or beyond `length` hold garbage and are never read. One array per layer: a stacked
    cache is copied by XLA at every write.
    """

    keys: tuple[Array, ...]  # L arrays [B, K, S, H], rotary embedding applied
    values: tuple[Array, ...]  # L arrays [B, K, S, H]
    length: Array  # [B] int32, slots that are history


@struct.dataclass
class Block:
    """Keys and values of the uncommitted tokens of a forward pass, in the order they were fed."""

    keys: tuple[Array, ...]  # L arrays [B, K, M, H]
    values: tuple[Array, ...]  # L arrays [B, K, M, H]
    positions: Array  # [B, M] int32, absolute


@struct.dataclass
class ModelOutput:
    """What one forward pass reveals about each of its N tokens."""

    logits: Array  # [B, N, V] float32, of the token that follows
    features: Array  # [B, N, F]: the final norm's output, then the residuals of `feature_layers`


# ----------------------------------------------------------------------------- what is guessed


@struct.dataclass
class Draft:
    """A tree of guesses. Node 0 is the root, the pending token; parents precede their children.

    `probs[:, i]` is the law node i's token was drawn from given everything drawn before it. Whether
    a node exists, and its place among its siblings, are decided before its token is drawn; separate
    branches share no randomness. `None` means point masses throughout; a point mass beside sampled
    nodes is a one-hot row. The root's row is ignored. Siblings are tried in storage order.

    A node that has nothing to say is a *filler*: any token, with a one-hot law. `num_drafted`
    counts the others and feeds statistics only. A draft that `force` made of fewer tokens than it
    has nodes has parent -1 at the others, too: they are in no tree.
    """

    tokens: Array  # [B, N] int32
    parents: Array  # [B, N] int32, -1 at the root
    probs: Array | None  # [B, N, V] float32, or None
    num_drafted: Array  # [B] int32, nodes that are neither root nor filler
    # D; deeper nodes are never accepted. With N == D + 1 nodes the tree is a chain, by contract.
    depth: int = struct.field(pytree_node=False)


@struct.dataclass
class Verdict:
    """Which nodes become history, and the one token that the target adds by itself.

    The row gains `num_nodes` tokens: the tokens of path nodes 1.. and then `next_token`. In return
    the keys and values of the path's first `num_nodes` nodes, root first, enter the cache.
    """

    path: Array  # [B, P] int32, node indices, root first; 0 beyond `num_nodes`
    num_nodes: Array  # [B] int32, 0 when the row is done
    next_token: Array  # [B] int32


@struct.dataclass
class Outcome:
    """All that one target pass revealed, for drafters to learn from. The verdict is the cut one."""

    draft: Draft
    output: ModelOutput
    verdict: Verdict


# ----------------------------------------------------------------------------- what a row carries


@struct.dataclass
class Sampling:
    """How each row samples. Traced: one batch may mix them, changing them recompiles nothing."""

    temperature: Array  # [B] float32, 0 is greedy
    top_k: Array  # [B] int32, 0 is off
    top_p: Array  # [B] float32, 1 is off
    min_p: Array  # [B] float32, 0 is off


class Draws(NamedTuple):
    """How random choices are made from keys: the seam at which the laboratory makes its own.

    What a key yields depends on the key alone, so that equal keys give equal noise. Drafters and
    verifiers come here through `sampling.bernoulli`, `categorical` and `pick` only.
    """

    bernoulli: Callable  # (site, keys [B], probs [B, ...]) -> [B, ...] bool, independent
    noise: Callable  # (site, keys [...], shape) -> [..., *shape[:-1], opaque]
    pick: Callable  # (noise [..., opaque], log_weights [..., V], turn) -> [...] int32


@struct.dataclass
class Keys:
    """Two streams of randomness per row, constant while the row decodes.

    `shared` is read through the position of the token being emitted, by `match` and by coupled
    drafts. `private` is read through a site name and the position of the root, by every other draw.
    """

    shared: Array  # [B] PRNG keys
    private: Array  # [B] PRNG keys
    draws: Draws = struct.field(pytree_node=False)


@struct.dataclass
class Context:
    """What anybody may read. The cache is the target's: `cache.length == length - 1`."""

    tokens: Array  # [B, S] int32, history; garbage from `length` on
    length: Array  # [B] int32, at least 1; the last token is pending
    limit: Array  # [B] int32, the length at which the row ends
    cache: Cache
    sampling: Sampling


@struct.dataclass
class DecodeState:
    """Everything a decoder carries from step to step. Every array leads with the batch row."""

    context: Context
    drafter: PyTree
    rng_keys: Keys
    done: Array  # [B] bool
    num_steps: Array  # [B] int32, target passes this row took part in, prompt excluded


@struct.dataclass
class StepInfo:
    """What a step did, along the accepted path: for people, schedulers and cascades."""

    tokens: Array  # [B, P] int32, garbage from `num_tokens` on
    num_tokens: Array  # [B] int32
    num_drafted: Array  # [B] int32, fillers not counted
    logits: Array  # [B, P, V] float32, the target's, before warping
    warped_logits: Array  # [B, P, V] float32, the law each token was judged by


class Params(NamedTuple):
    """The weights of a decoder. Recursive: a cascade's drafter weights are a `Params`."""

    target: PyTree
    drafter: PyTree = ()
    verifier: PyTree = ()


# ----------------------------------------------------------------------------- who does what


class Stack(NamedTuple):
    """What a model of attention layers offers besides, to drafts that are a part of it."""

    num_layers: int  # L
    only: Callable  # (layers) -> Model of these, with the same params and a cache of their own
    gated: Callable  # (gates [L] bool, *arguments of `apply`) -> what `apply` returns; layers whose
    #                  gate is false hand on their input
    attention: Callable | None  # (params, tokens [B,N], positions [B,N], mask [B,N,N], cache)
    #                      -> L arrays [B, K, S] float32, the weight that these tokens' queries lay
    #                      on each of the cache's slots, summed over both


class Model(NamedTuple):
    """Pure functions over a tree of parameters; the cache is an argument, never hidden state."""

    init: Callable  # (rng_key) -> params
    init_cache: Callable  # (batch_size, max_length) -> Cache
    apply: Callable  # (params, tokens [B,N], positions [B,N], mask [B,N,M], cache, block=None)
    #                  -> (ModelOutput, Block). mask[b, i, j]: may new token i see block slot j; the
    #                  new tokens are the last N of the M slots. The cache is visible throughout.
    embed: Callable  # (params, tokens [...]) -> [..., E]
    unembed: Callable  # (params, normed hidden [..., E]) -> logits [..., V] float32, no norm
    vocab_size: int
    hidden_size: int = 0  # E, of `embed` and of the features' first part
    feature_layers: tuple[int, ...] = ()  # whose input residuals, E wide each, follow in features
    stack: Stack | None = None  # of a model that has layers to choose from


LAWS = ("point", "chain", "paths", "siblings", "hybrid", "general", "coupled")


class Proposal(NamedTuple):
    """What a drafter promises about its trees, fixed when it is built.

    Laws: `point` (no randomness), `chain` (one path, exact conditional q), `paths` (i.i.d. paths,
    as long as the tree is deep, that meet in the root only), `siblings` (i.i.d. siblings), `hybrid`
    (the likeliest K-1 tokens in order, then one sampled from the rest), `general` (any law that
    `Draft` allows), `coupled` (tokens drawn from the shared noise or kept from an earlier step).
    """

    law: str
    num_nodes: int
    depth: int

    @property
    def laws(self) -> tuple[str, ...]:
        """Its law and what follows from it: a single path of point masses has an exact q, too."""
        is_chain = self.num_nodes == self.depth + 1
        return ("point", "chain") if self.law == "point" and is_chain else (self.law,)


class Drafter(NamedTuple):
    """A generation strategy."""

    init: Callable  # (batch_size, max_length) -> state; its shape does not depend on the tree
    propose: Callable  # (params: Params, rng_keys: Keys, state, context) -> (Draft, state)
    observe: Callable  # (params: Params, state, context, outcome) -> state; context is the new one
    proposal: Proposal
    vocab_size: int | None = None  # of the models it drafts with; None where it has none


class Verifier(NamedTuple):
    """A refinement mechanism."""

    verify: Callable  # (params: Params, rng_keys: Keys, context, draft, output, warped [B,N,V])
    #                   -> Verdict
    laws: tuple[str, ...]  # of the proposals it is lossless for; `decoder` refuses the others
    lossless: bool = True  # False travels into results, tables and plots
    drafter_invariant: bool = False  # sampled text equals plain sampling's, token for token


class Decoder(NamedTuple):
    """A target, a drafter and a verifier under one step."""

    init: Callable  # (rng_keys [B], sampling, first_tokens [B], limit [B], max_length)
    #                 -> DecodeState
    force: Callable  # (params, state, tokens [B,T], num_tokens [B]) -> DecodeState
    step: Callable  # (params, state) -> (DecodeState, StepInfo)
    proposal: Proposal
    lossless: bool
    vocab_size: int
    drafter_invariant: bool  # its tokens are drawn from the shared noise
