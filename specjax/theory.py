"""What the papers' models promise: acceptance of the rules, tokens per pass, speed, and limits.

The words mean the same throughout:

    acceptance     chance that a drafted token is kept once all before it are, from 0 to 1
    tokens         expected tokens per target pass, the target's own included: `mat` of `metrics`
    cost           time in units of one target pass over one token per row, the plain decoding step
    law            probabilities over V tokens, [..., V]; p is the target's, q the draft's
    num_drafted    γ, tokens of a drafted chain;  num_drafts  K, siblings at one node

Functions of laws broadcast over leading axes and return one figure for each, [...].
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

MAX_STRINGS = 2**24  # the most strings of tokens an enumeration holds at once


def _within(name: str, values: ArrayLike, low: float, high: float = math.inf) -> None:
    values = np.ravel(values)
    outside = values[~((values >= low) & (values <= high))]
    if len(outside):
        bound = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {outside[0]}; it must be {bound}.")


def _above(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0.")


def _whole(name: str, value: int, least: int) -> None:
    if value != int(value) or value < least:
        raise ValueError(f"{name} is {value}; it must be a whole number of at least {least}.")


def _enumerable(count: int) -> None:
    if count > MAX_STRINGS:
        raise ValueError(f"{count} strings of tokens are to be enumerated; {MAX_STRINGS} can be.")


def _laws(p: ArrayLike, q: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both laws in float64 and one shape [..., V], their rounding divided out."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if not p.size or not q.size or p.shape[-1:] != q.shape[-1:] or () in (p.shape, q.shape):
        raise ValueError(f"p has shape {p.shape} and q {q.shape}; need [..., V] for one V.")
    for name, law in (("p", p), ("q", q)):
        _within(f"a probability of {name}", law.min(), 0)
        _within(f"the sum of {name}", law.sum(-1), 0.999, 1.001)
    p, q = np.broadcast_arrays(p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True))
    return p, q


def _normalized(weights: np.ndarray) -> np.ndarray:
    """Weights [..., V] as laws; rows of zeros stay."""
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


# --------------------------------------------------------------------------------------- a chain


def chain_tokens(acceptance: float, num_drafted: int) -> float:
    """Tokens per pass of a chain: (1 - α^(γ+1)) / (1 - α). Leviathan et al., arXiv 2211.17192.

    >>> chain_tokens(0.5, 2), chain_tokens(1, 4)
    (1.75, 5.0)
    """
    _within("acceptance", acceptance, 0, 1)
    _whole("num_drafted", num_drafted, 0)
    # The sum that the fraction abbreviates, which also holds at α = 1.
    return float((float(acceptance) ** np.arange(num_drafted + 1)).sum())


def speedup(tokens: float, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Speed-up over plain decoding when each pass waits for its draft: tokens / (draft + verify).

    A chain's draft costs γ c, horizontal cascades (arXiv 2312.11462) the sum of their drafters, a
    parallel drafter one pass whatever γ. When serving, `verify_cost` is T_V(B, L, γ+1) /
    T_T(B, L, 1) for batch B and context L, plus scheduling and cache moves; it is 1 only while
    memory bounds the pass, see `roofline_tokens`. No draft of depth D passes `speedup(D + 1, 0,
    verify_cost)`.

    >>> speedup(3.0, 0.25, verify_cost=1.25)
    2.0
    """
    _within("tokens", tokens, 0)
    _within("draft_cost", draft_cost, 0)
    _above("verify_cost", verify_cost)
    return tokens / (draft_cost + verify_cost)


def chain_speedup(acceptance: float, num_drafted: int, cost: float) -> float:
    """Speed-up (1 - α^(γ+1)) / ((1 - α) (1 + γ c)) for drafted tokens that cost c each.

    Some γ gains if and only if α > c. Leviathan et al., arXiv 2211.17192.

    >>> chain_speedup(0.5, 1, 0.25)
    1.2
    """
    _within("cost", cost, 0)
    return speedup(chain_tokens(acceptance, num_drafted), num_drafted * cost)


def best_chain(acceptance: float, cost: float) -> tuple[int, float]:
    """The γ of the highest `chain_speedup`, and that speed-up; (0, 1.0) if no draft gains.

    >>> num_drafted, gain = best_chain(0.8, 0.05)
    >>> num_drafted, round(gain, 2)
    (8, 3.09)

    Raises:
        ValueError: certain or free tokens, of which more are always better.
    """
    _within("acceptance", acceptance, 0, 1)
    _within("cost", cost, 0)
    if cost < acceptance and (acceptance == 1 or cost == 0):
        raise ValueError(
            f"acceptance is {acceptance} and cost {cost}; the one below 1 and the other above 0 "
            "have a best length."
        )
    # Tokens are concave in γ and time is linear, so their ratio falls once it stops rising.
    best, gain, tokens = 0, 1.0, 1.0
    while (following := (tokens + acceptance ** (best + 1)) / (1 + (best + 1) * cost)) > gain:
        tokens += acceptance ** (best + 1)
        best, gain = best + 1, following
    return best, gain


def operations_ratio(acceptance: float, num_drafted: int, draft_operations: float) -> float:
    """Arithmetic per token over plain decoding's: (1 - α) (γ ĉ + γ + 1) / (1 - α^(γ+1)).

    `draft_operations`: ĉ, the drafter's operations per token over the target's.
    Leviathan et al., arXiv 2211.17192.

    >>> operations_ratio(0.5, 1, 0.25)
    1.5
    """
    _within("draft_operations", draft_operations, 0)
    operations = num_drafted * draft_operations + num_drafted + 1
    return operations / chain_tokens(acceptance, num_drafted)


def position_tokens(acceptances: Sequence[float]) -> float:
    """Tokens per pass when acceptance depends on the position: 1 + Σ_k Π_{i≤k} β_i.

    `acceptances` [γ] are conditional: `alpha_pos` of `metrics`.

    >>> position_tokens([0.75, 0.5, 0.5])
    2.3125
    """
    _within("acceptance", acceptances, 0, 1)
    return float(1 + np.cumprod(acceptances).sum())


# ------------------------------------------------------------------------------------- one draft


def overlap(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """Acceptance Σ min(p, q) = 1 - TV of rejection sampling, the most one draft can have.

    Leviathan et al., arXiv 2211.17192. Summed over positions, 1 - overlap is the least expected
    number of rejections of any lossless rule: Yin et al., arXiv 2411.00841.

    >>> print(overlap([0.5, 0.5, 0], [0.2, 0.3, 0.5]))
    0.5
    """
    return np.minimum(*_laws(p, q)).sum(-1)


def match_acceptance(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """Acceptance Σ p q when target and draft sample independently and must agree.

    >>> print(match_acceptance([0.5, 0.5], [0.25, 0.75]))
    0.5
    """
    return np.multiply(*_laws(p, q)).sum(-1)


def coupled_acceptance(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """Acceptance Σ_x 1 / Σ_y max(p_y / p_x, q_y / q_x) when both sample with the same Gumbel noise.

    Tokens that either law excludes add nothing. Daliri, Musco, Suresh, arXiv 2408.07978.

    >>> print(coupled_acceptance([0.5, 0.5, 0], [0.5, 0, 0.5]).round(6))
    0.333333
    """
    p, q = _laws(p, q)
    # The maximum is the p term exactly for tokens y whose ratio p / q is not below that of x.
    ratio = np.divide(p, q, out=np.where(p > 0, np.inf, 0.0), where=q > 0)
    order = ratio.argsort(-1)
    p, q = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)
    p_from = p[..., ::-1].cumsum(-1)[..., ::-1]
    q_before = q.cumsum(-1) - q
    both = p * q
    return np.divide(both, p_from * q + q_before * p, out=np.zeros_like(p), where=both > 0).sum(-1)


def coupled_bound(p: ArrayLike, q: ArrayLike) -> np.ndarray:
    """The least `coupled_acceptance` at a distance: (1 - TV) / (1 + TV). arXiv 2408.07978.

    >>> print(coupled_bound([0.5, 0.5, 0], [0.5, 0, 0.5]).round(6))
    0.333333
    """
    shared = overlap(p, q)
    return shared / (2 - shared)


# ----------------------------------------------------------------------- rules for a whole chain


class BlockEfficiency(NamedTuple):
    """Tokens per pass of a chain under two rules, and what bounds every rule."""

    token: float  # token-wise rejection, Leviathan et al., arXiv 2211.17192
    block: float  # block verification, the best for a single path, Sun et al., arXiv 2403.10444
    joint: float  # 1 + Σ_i (1 - TV(P_1:i, Q_1:i)), had the rule known the later laws, same paper


def block_efficiency(p: Sequence[ArrayLike], q: Sequence[ArrayLike]) -> BlockEfficiency:
    """Tokens per pass of a chain of given laws, by enumeration of all V^γ strings.

    Args:
        p: γ laws, for position i [V], or [V**i, V] by the i tokens before it, the last fastest.
        q: likewise.

    >>> efficiency = block_efficiency([[1 / 3, 2 / 3]] * 2, [[2 / 3, 1 / 3]] * 2)
    >>> [round(9 * (tokens - 1), 9) for tokens in efficiency]
    [10.0, 11.0, 12.0]
    """
    if len(p) != len(q):
        raise ValueError(f"p has {len(p)} positions and q {len(q)}; a chain needs as many of both.")
    # Chances of each string: under p, to be drafted, and to be drafted and accepted by the rules.
    target = drafted = token = block = np.ones(1)
    tokens = np.ones(3)
    for i in range(len(p)):
        p_i, q_i = _laws(p[i], q[i])
        _enumerable(p_i.shape[-1] ** (i + 1))
        if p_i.shape[:-1] not in ((), target.shape):
            raise ValueError(f"Laws {i} have shape {p_i.shape}; need [V] or [{target.size}, V].")
        target, drafted = (target[:, None] * p_i).ravel(), (drafted[:, None] * q_i).ravel()
        token = (token[:, None] * np.minimum(p_i, q_i)).ravel()
        # A drafted string survives with the paper's w_i = min(1, w_{i-1} p_i / q_i).
        block = np.minimum((block[:, None] * p_i).ravel(), drafted)
        tokens += token.sum(), block.sum(), np.minimum(target, drafted).sum()
    return BlockEfficiency(*tokens.tolist())


# -------------------------------------------------------------------- several drafts at one node


def optimal_acceptance(p: ArrayLike, q: ArrayLike, num_drafts: int) -> np.ndarray:
    """The most any lossless rule accepts of K i.i.d. drafts: min over sets T of p(T) + 1 - q(T)^K.

    The optimal transport of SpecTr (arXiv 2310.15141) as subset selection, Hu et al., arXiv
    2502.18779.

    >>> print(optimal_acceptance([1 / 3, 2 / 3], [2 / 3, 1 / 3], 2).round(6))
    0.888889
    """
    _whole("num_drafts", num_drafts, 1)
    p, q = _laws(p, q)
    # As a function of (p(T), q(T)) this is concave, so it lies below its tangent at the best T. The
    # set that minimises the tangent p(T) - c q(T) + const is {x : p_x < c q_x}, hence as good: of
    # the 2^V sets only those of the tokens of least p / q need trying.
    order = np.divide(p, q, out=np.full(p.shape, np.inf), where=q > 0).argsort(-1)
    p_in = np.take_along_axis(p, order, -1).cumsum(-1)
    q_in = np.take_along_axis(q, order, -1).cumsum(-1)
    return (p_in + 1 - q_in**num_drafts).min(-1)


def naive_acceptance(p: ArrayLike, q: ArrayLike, num_drafts: int) -> np.ndarray:
    """Naive sampling, Y ~ p kept if drafted: Σ p (1 - (1 - q)^K). SpecInfer, arXiv 2305.09781.

    >>> print(naive_acceptance([0.5, 0.5], [0.5, 0.5], 2))
    0.75
    """
    _whole("num_drafts", num_drafts, 1)
    p, q = _laws(p, q)
    return (p * (1 - (1 - q) ** num_drafts)).sum(-1)


def recursive_acceptance(
    p: ArrayLike, q: ArrayLike, num_drafts: int, replacement: bool = True
) -> np.ndarray:
    """Recursive rejection: drafts are tried in turn against what the rejected ones left of p.

    With replacement (SpecInfer, arXiv 2305.09781) every try is against q; without (RSD, arXiv
    2402.14160; Sequoia, arXiv 2402.12374) q loses each rejected token, and V^K strings are
    enumerated.

    >>> p, q = [1 / 3, 2 / 3], [2 / 3, 1 / 3]
    >>> print(recursive_acceptance(p, q, 2).round(6), recursive_acceptance(p, q, 2, False).round(6))
    0.777778 1.0
    """
    _whole("num_drafts", num_drafts, 1)
    p, q = _laws(p, q)
    if not replacement:
        _enumerable(p.size * p.shape[-1] ** (num_drafts - 1))

    def accepted(p: np.ndarray, q: np.ndarray, num_drafts: int) -> np.ndarray:
        first = np.minimum(p, q).sum(-1)
        if num_drafts == 1:
            return first
        left = _normalized(np.maximum(p - q, 0))
        if replacement:
            return first + (1 - first) * accepted(left, q, num_drafts - 1)
        # One younger law [V, V] for each token that the first try can have rejected.
        younger = _normalized(q[..., None, :] * (1 - np.eye(q.shape[-1])))
        rejected = np.maximum(q - p, 0)
        return first + (rejected * accepted(left[..., None, :], younger, num_drafts - 1)).sum(-1)

    return accepted(p, q, num_drafts)


def kseq_acceptance(p: ArrayLike, q: ArrayLike, num_drafts: int) -> np.ndarray:
    """K-SEQ: each draft is tried against p / ρ, with the ρ at which the accepted follow p.

    ρ in [1, K] solves 1 - (1 - β)^K = ρ β, β = Σ min(p / ρ, q); the acceptance is ρ β.
    SpecTr, Sun et al., arXiv 2310.15141.

    >>> print(kseq_acceptance([1 / 3, 2 / 3], [2 / 3, 1 / 3], 2).round(6))
    0.81142
    """
    _whole("num_drafts", num_drafts, 1)
    p, q = _laws(p, q)
    low, high = np.ones(p.shape[:-1]), np.full(p.shape[:-1], float(num_drafts))
    for _ in range(60):  # halves K down to the resolution of float64
        rho = (low + high) / 2
        kept = np.minimum(p, rho[..., None] * q).sum(-1)
        above = 1 - (1 - kept / rho) ** num_drafts < kept
        low, high = np.where(above, low, rho), np.where(above, rho, high)
    return np.minimum(p, high[..., None] * q).sum(-1)


def hybrid_acceptance(p: ArrayLike, q: ArrayLike, num_drafts: int) -> np.ndarray:
    """The K - 1 likeliest drafts H and one sampled from q', q outside H: p(H) + Σ min(p, q').

    The optimum for these drafts, and attained. Hu et al., arXiv 2502.18779.

    >>> print(hybrid_acceptance([0.2, 0.6, 0.2], [0.5, 0.25, 0.25], 2).round(6))
    0.9
    """
    _whole("num_drafts", num_drafts, 1)
    p, q = _laws(p, q)
    fixed = (-q).argsort(-1, kind="stable").argsort(-1) < num_drafts - 1
    sampled = _normalized(np.where(fixed, 0, q))
    return np.where(fixed, p, np.minimum(p, sampled)).sum(-1)


# ----------------------------------------------------------------------------------------- trees


def _positional(acceptance: Sequence[float]) -> None:
    _within("acceptance", acceptance, 0, 1)
    if sum(acceptance) > 1 + 1e-6:
        raise ValueError(
            f"acceptance sums to {sum(acceptance):g}; at most one child is accepted, so to at "
            "most 1."
        )


def tree_tokens(parents: Sequence[int], acceptance: Sequence[float]) -> float:
    """Tokens per pass of a static tree: F(T) = Σ over nodes of Π a_rank along their paths.

    `parents` [N], -1 at node 0, the root, which counts 1; `acceptance` [K], the chance that the
    k-th child of an accepted node is the accepted one. Sequoia, Chen et al., arXiv 2402.12374.

    >>> tree_tokens([-1, 0, 0, 1], [0.5, 0.25])
    2.0
    """
    _positional(acceptance)
    if len(parents) == 0 or parents[0] != -1:
        raise ValueError(f"Tree {tuple(parents)} must start with its root, whose parent is -1.")
    value, rank = [1.0], [0] * len(parents)  # rank: children of each node so far
    for i, parent in enumerate(parents[1:], 1):
        if not 0 <= parent < i:
            raise ValueError(f"Node {i} has parent {parent}; it needs one of 0 to {i - 1}.")
        if rank[parent] == len(acceptance):
            raise ValueError(
                f"Node {parent} has more than {len(acceptance)} children; acceptance has no more."
            )
        value.append(value[parent] * acceptance[rank[parent]])
        rank[parent] += 1
    return math.fsum(value)


def best_tree(acceptance: Sequence[float], size: int, depth: int) -> tuple[float, tuple[int, ...]]:
    """The tree of most `tree_tokens` with at most `size` nodes and `depth` levels below its root.

    The root is one of the nodes; fewer are used only where more do not fit or gain nothing. For
    the fastest tree compare `speedup(tokens, depth * cost, verify_cost)` over sizes and depths.
    Sequoia's dynamic program, arXiv 2402.12374.

    Returns:
        Its tokens, and its parents [N] breadth first.

    >>> best_tree([0.5, 0.25], 4, 2)
    (2.0, (-1, 0, 0, 1))
    """
    _positional(acceptance)
    _whole("size", size, 1)
    _whole("depth", depth, 0)
    best = np.ones(size + 1)  # by nodes allowed, of trees of the depth so far
    children: list[list[tuple[int, ...]]] = []  # by depth and nodes, sizes of the subtrees
    for _ in range(depth):
        value = [np.ones(size + 1)]  # by children of the root
        split: list[list[tuple[int, ...]]] = [[()] * (size + 1)]
        for a in acceptance:
            value.append(np.full(size + 1, -np.inf))
            split.append([()] * (size + 1))
            for n in range(2, size + 1):
                options = value[-2][n - 1 : 0 : -1] + a * best[1:n]  # last child's size: 1 to n - 1
                last = int(options.argmax()) + 1
                value[-1][n] = options[last - 1]
                split[-1][n] = (*split[-2][n - last], last)
        best = np.max(value, 0)
        children.append([split[k][n] for n, k in enumerate(np.argmax(value, 0))])
    parents: list[int] = []
    queue = [(-1, size, depth)]
    for parent, n, levels in queue:
        parents.append(parent)
        if levels:
            queue += [(len(parents) - 1, m, levels - 1) for m in children[levels - 1][n]]
    return float(best[size]), tuple(parents)


def lookahead_tokens(acceptance: float, num_drafted: int, num_guesses: int) -> float:
    """Tokens per pass of b independent guesses of γ tokens: γ + 1 - Σ_{i=1..γ} (1 - α^i)^b.

    Lookahead decoding, Fu et al., arXiv 2402.02057.

    >>> lookahead_tokens(0.5, 1, 2), lookahead_tokens(0.5, 2, 1)
    (1.75, 1.75)
    """
    _within("acceptance", acceptance, 0, 1)
    _whole("num_drafted", num_drafted, 0)
    _whole("num_guesses", num_guesses, 1)
    reached = float(acceptance) ** np.arange(1, num_drafted + 1)
    return float(num_drafted + 1 - ((1 - reached) ** num_guesses).sum())


# ---------------------------------------------------------------- cascades and parallel drafting


def cascade_speedup(
    acceptance: float,
    num_passes: int,
    cost: float,
    inner_acceptance: float,
    inner_drafted: int,
    inner_cost: float,
) -> float:
    """Speed-up of a drafter that a smaller one drafts for: (1 - α φ(α)^n) / ((1 - α) time).

    The drafter runs n passes of `cost` c, each over k tokens of `inner_cost` d: time is
    1 + n c + n k d. φ generates the tokens of one such pass, φ(x) = E x^M. CS-Drafting's vertical
    cascade, Chen et al., arXiv 2312.11462.

    >>> cascade_speedup(0.5, 1, 0, inner_acceptance=0.5, inner_drafted=1, inner_cost=0)  # 1 or 2
    1.625
    """
    _within("acceptance", acceptance, 0, 1)
    _whole("num_passes", num_passes, 0)
    _within("cost", cost, 0)
    _within("inner_acceptance", inner_acceptance, 0, 1)
    _within("inner_cost", inner_cost, 0)
    # φ(α) = 1 - (1 - α) s; written with s the fraction has no 0 / 0 at α = 1.
    s = chain_tokens(acceptance * inner_acceptance, inner_drafted)
    phi = 1 - (1 - acceptance) * s
    tokens = 1 + acceptance * s * float((phi ** np.arange(num_passes)).sum())
    return speedup(tokens, num_passes * (cost + inner_drafted * inner_cost))


def parallel_speedup(
    tokens: float,
    draft_cost: float,
    hit_rate: float = 1.0,
    miss_tokens: float = 0.0,
    backup_cost: float = 0.0,
) -> float:
    """Speed-up when the next draft is made while the target verifies, which is the unit of cost.

    By default tokens / max(draft, 1): PEARL, Liu et al., arXiv 2408.11850. A round that keeps all
    γ has no token of the target's own, so 1 / c is the most. If only a share h of the outcomes was
    foreseen and a backup drafts after the others, (h E + (1 - h) E_miss) / (h max(draft, 1) +
    (1 - h) (1 + backup)): speculative speculative decoding, Kumar et al., arXiv 2603.03251.

    >>> parallel_speedup(4.0, 1.25), parallel_speedup(4.0, 0.5, 0.75, 4.0, 1.0)
    (3.2, 3.2)
    """
    _within("hit_rate", hit_rate, 0, 1)
    _within("tokens", (tokens, miss_tokens), 0)
    _within("draft_cost", draft_cost, 0)
    _within("backup_cost", backup_cost, 0)
    time = hit_rate * max(draft_cost, 1) + (1 - hit_rate) * (1 + backup_cost)
    return (hit_rate * tokens + (1 - hit_rate) * miss_tokens) / time


# --------------------------------------------------------------------------------------- serving


def roofline_tokens(peak_flops: float, bandwidth: float, bytes_per_weight: float = 2.0) -> float:
    """Tokens B (γ + 1) up to which a dense pass waits for its weights: bytes · FLOP/s / (2 · B/s).

    Each weight is read once and multiplied and added once per token. Caches of long contexts and
    a mixture's experts come on top. Roofline model, Williams et al., doi 10.1145/1498765.1498785.

    >>> round(roofline_tokens(197e12, 819e9))  # bfloat16 on a TPU v5e
    241
    """
    for name, value in (("peak_flops", peak_flops), ("bytes_per_weight", bytes_per_weight)):
        _within(name, value, 0)
    _above("bandwidth", bandwidth)
    return bytes_per_weight * peak_flops / (2 * bandwidth)


def goodput(
    acceptance: float,
    num_drafted: int,
    batch_size: int,
    draft_time: Callable[[int], float],
    target_time: Callable[[int], float],
) -> float:
    """Tokens per second of a batch: n E / (k T_D(n) + T_T(n (k + 1))), E as of `chain_tokens`.

    `draft_time` and `target_time` give seconds by tokens in a pass. SmartSpec, Liu et al.,
    arXiv 2406.14066.

    >>> goodput(0.5, 1, 8, lambda n: 0.01, lambda n: 0.02)
    400.0
    """
    _whole("batch_size", batch_size, 1)
    tokens = batch_size * chain_tokens(acceptance, num_drafted)
    drafting = num_drafted * draft_time(batch_size) if num_drafted else 0.0
    return tokens / (drafting + target_time(batch_size * (num_drafted + 1)))


def best_goodput(
    acceptance: float,
    max_drafted: int,
    batch_size: int,
    draft_time: Callable[[int], float],
    target_time: Callable[[int], float],
) -> tuple[int, float]:
    """The k of the highest `goodput` among 0 .. max_drafted, the least of equals, and its value.

    >>> best_goodput(0.5, 8, 8, lambda n: 0.01, lambda n: 0.02 * max(1, n / 8))  # bound by compute
    (0, 400.0)
    """
    _whole("max_drafted", max_drafted, 0)
    served = [
        goodput(acceptance, k, batch_size, draft_time, target_time) for k in range(max_drafted + 1)
    ]
    best = int(np.argmax(served))
    return best, served[best]


def admit(
    confidences: ArrayLike, passes_per_second: Callable[[int], float]
) -> tuple[np.ndarray, float]:
    """How many drafted tokens of each row to verify, greedily by their chance to be reached.

    Tokens per second are Σ_r (1 + Σ_{j≤ℓ_r} a_rj) · passes_per_second(Σ_r (1 + ℓ_r)), a_r the
    running products of row r of `confidences` [R, γ]. Admission stops at the first token that does
    not raise them, which is the optimum where the time of a pass is convex. It keeps the law only
    if confidences do not depend on the tokens they decide about. DSpark, arXiv 2607.05147.

    Returns:
        Lengths ℓ [R], and the tokens per second.

    >>> lengths, rate = admit([[0.75, 0.5], [0.25, 0.5]], lambda n: 100 if n <= 3 else 60)
    >>> lengths.tolist(), rate
    ([1, 0], 275.0)
    """
    confidences = np.asarray(confidences, np.float64)
    if confidences.ndim != 2 or len(confidences) == 0:
        raise ValueError(f"confidences has shape {confidences.shape}; need [rows, positions].")
    _within("confidence", confidences, 0, 1)
    reached = np.cumprod(confidences, 1).ravel()
    lengths = np.zeros(len(confidences), np.int64)
    tokens, budget = float(len(lengths)), len(lengths)
    rate = tokens * passes_per_second(budget)
    # Chances fall along a row, so what is taken of it is a prefix; of equals earlier rows go first.
    for i in np.argsort(-reached, kind="stable"):
        following = (tokens + reached[i]) * passes_per_second(budget + 1)
        if following <= rate:
            break
        lengths[i // confidences.shape[1]] += 1
        tokens, budget, rate = tokens + reached[i], budget + 1, following
    return lengths, float(rate)


def sparse_draft_reads(acceptance_rate: float, num_drafted: int, kept: float) -> float:
    """Cache reads per token of a draft that attends to a share s of it: (k s + 1) / (k α + 1).

    Relative to plain decoding. α is accepted / drafted, not the chance of one token.
    SparseSpec, Zhao et al., arXiv 2512.01278.

    >>> round(1 / sparse_draft_reads(0.75, 16, 0.05), 2)
    7.22
    """
    _within("acceptance_rate", acceptance_rate, 0, 1)
    _whole("num_drafted", num_drafted, 0)
    _within("kept", kept, 0, 1)
    return (num_drafted * kept + 1) / (num_drafted * acceptance_rate + 1)
