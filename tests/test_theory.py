"""Every formula of `theory` against what it abbreviates: steps of rules, brute force or chance."""

import doctest
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.optimize import brentq, linprog

from specjax import theory, trees

Law = np.ndarray  # [V]
Node = tuple[Law, float]  # what a rule emits [V], and its chance that this is among the drafts

A, B = np.array([1, 2]) / 3, np.array([2, 1]) / 3  # the example of block verification's paper

# By acceptance and cost, the best number of drafted tokens and its speed-up.
BEST_CHAINS = """
       .01      .02      .05      .10      .20
.5   5 1.88   4 1.79   3 1.63   2 1.46   1 1.25
.6   7 2.30   6 2.17   4 1.92   3 1.67   2 1.40
.7   9 2.97   8 2.76   6 2.35   4 1.98   3 1.58
.8  14 4.23  11 3.82   8 3.09   6 2.47   4 1.87
.9  24 7.49  19 6.37  13 4.67  10 3.43   7 2.37
"""


def random_laws(rng: np.random.Generator, *shape: int, sparse: bool = True) -> np.ndarray:
    """Laws of mixed sharpness, some with excluded tokens."""
    weights = rng.gamma(rng.choice([0.2, 1.0, 5.0], (*shape[:-1], 1)), size=shape) + 1e-12
    if sparse:
        excluded = rng.random(shape) < 0.2
        excluded[..., 0] = False
        weights = np.where(excluded, 0, weights)
    return weights / weights.sum(-1, keepdims=True)


def left_over(p: Law, q: Law) -> Law:
    """What is sampled from after a rejection; p where rounding left nothing."""
    left = np.maximum(p - q, 0)
    return left / left.sum() if left.sum() > 1e-14 else p


def test_doctests() -> None:
    result = doctest.testmod(theory)
    assert result.failed == 0
    assert result.attempted > 20


# ---------------------------------------------------------------------------------------- chains


def test_best_chain_reproduces_the_table() -> None:
    costs, *rows = (line.split() for line in BEST_CHAINS.strip().splitlines())
    for acceptance, *cells in rows:
        for cost, best, gain in zip(costs, cells[::2], cells[1::2], strict=True):
            found = theory.best_chain(float(acceptance), float(cost))
            assert (found[0], f"{found[1]:.2f}") == (int(best), gain), (acceptance, cost)


@pytest.mark.parametrize("acceptance", [0.0, 0.05, 0.3, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("cost", [0.01, 0.3, 0.75, 1.5])
def test_chain(acceptance: float, cost: float) -> None:
    for n in range(6):
        # The first n tries of a coin: the target's own token, and one more per success in a row.
        tries = itertools.product([True, False], repeat=n)
        expected = sum(
            math.prod(acceptance if kept else 1 - acceptance for kept in kepts)
            * (1 + len(list(itertools.takewhile(bool, kepts))))
            for kepts in tries
        )
        assert theory.chain_tokens(acceptance, n) == pytest.approx(expected, rel=1e-12)
        assert theory.position_tokens([acceptance] * n) == pytest.approx(expected, rel=1e-12)
        work = theory.operations_ratio(acceptance, n, cost)
        assert work == pytest.approx((n * cost + n + 1) / expected, rel=1e-12)
    if acceptance == 1 and cost < 1:
        with pytest.raises(ValueError, match=r"acceptance is 1.0 and cost"):
            theory.best_chain(acceptance, cost)
        return
    speedups = [theory.chain_speedup(acceptance, n, cost) for n in range(200)]
    best, gain = theory.best_chain(acceptance, cost)
    assert best == np.argmax(speedups)
    assert gain == pytest.approx(max(speedups), rel=1e-12)
    assert (best > 0) == (acceptance > cost)


def test_positions() -> None:
    alphas = [0.9, 0.6, 0.3]
    lengths = [0.1, 0.9 * 0.4, 0.9 * 0.6 * 0.7, 0.9 * 0.6 * 0.3]  # chances to accept 0 .. 3
    assert theory.position_tokens(alphas) == pytest.approx(1 + np.dot(lengths, range(4)), rel=1e-12)
    assert theory.position_tokens([]) == 1


# ------------------------------------------------------------------------------------- one draft


def test_coupled_acceptance_is_the_plain_formula() -> None:
    rng = np.random.default_rng(0)
    for v in (1, 2, 3, 8, 40):
        p, q = random_laws(rng, 30, 2, v), random_laws(rng, 30, 2, v)
        p[:5], q[5:10] = q[:5], 1 / v  # the same laws, and many equal ratios
        expected = np.zeros((30, 2))
        for at in np.ndindex(30, 2):
            for x in np.flatnonzero((p[at] > 0) & (q[at] > 0)):
                expected[at] += 1 / np.maximum(p[at] / p[at][x], q[at] / q[at][x]).sum()
        found = theory.coupled_acceptance(p, q)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-15)
        assert (found <= theory.overlap(p, q) + 1e-12).all()
        assert (found >= theory.coupled_bound(p, q) - 1e-12).all()
        np.testing.assert_allclose(found[:5], 1, rtol=1e-12)
    found = theory.coupled_acceptance(p[:, :1], q[0])  # broadcasts
    np.testing.assert_allclose(found[3, 0], theory.coupled_acceptance(p[3, 0], q[0, 0]))


def test_coupled_acceptance_of_many_long_rows() -> None:
    p, q = random_laws(np.random.default_rng(1), 2, 100, 4096)
    found = theory.coupled_acceptance(p, q)  # V^2 of these rows would take 13 GB
    x = np.flatnonzero(p[7] * q[7])[:, None]
    plain = (1 / np.maximum(p[7] / p[7][x], q[7] / q[7][x]).sum(1)).sum()
    assert found[7] == pytest.approx(plain, rel=1e-9)


def test_acceptance_of_sampling() -> None:
    """Rates of 200,000 draws lie within five of their standard errors."""
    rng, n = np.random.default_rng(2), 200_000
    for p, q in zip(random_laws(rng, 3, 6), random_laws(rng, 3, 6), strict=True):
        with np.errstate(divide="ignore"):
            noise = rng.gumbel(size=(n, 6))
            draft, target = (noise + np.log(q)).argmax(1), (noise + np.log(p)).argmax(1)
        own = rng.choice(6, n, p=p)
        kept = rng.random(n) * q[draft] < p[draft]
        for rate, acceptance in [
            ((draft == target).mean(), theory.coupled_acceptance(p, q)),
            ((draft == own).mean(), theory.match_acceptance(p, q)),
            (kept.mean(), theory.overlap(p, q)),
        ]:
            assert abs(rate - acceptance) <= 5 * math.sqrt(acceptance * (1 - acceptance) / n)


# ----------------------------------------------------------------------- rules for a whole chain


def token_rule(p: list[Law], q: list[Law], x: Sequence[int]) -> float:
    """Expected number of accepted tokens of one drafted string, laws along it given."""
    accepted, live = 0.0, 1.0
    for p_i, q_i, x_i in zip(p, q, x, strict=True):
        live *= min(1, p_i[x_i] / q_i[x_i])
        accepted += live
    return accepted


def block_rule(p: list[Law], q: list[Law], x: Sequence[int]) -> float:
    """Likewise; the paper's rule keeps the last length whose own coin falls."""
    accepted, rejected_later = 0.0, 1.0
    w = [1.0]
    for p_i, q_i, x_i in zip(p, q, x, strict=True):
        w.append(min(1, w[-1] * p_i[x_i] / q_i[x_i]))
    for i in range(len(x), 0, -1):
        keep = w[i]
        if i < len(x):
            excess = np.maximum(w[i] * p[i] - q[i], 0).sum()
            keep = excess / (excess + 1 - w[i]) if excess + 1 - w[i] > 1e-14 else 1
        accepted += rejected_later * keep * i
        rejected_later *= 1 - keep
    return accepted


def test_the_paper_s_example_of_block_verification() -> None:
    for n, token, block in [(2, 10 / 9, 11 / 9), (3, 1.40741, 1.66667), (4, 1.60494, 2.04938)]:
        found = theory.block_efficiency([A] * n, [B] * n)
        np.testing.assert_allclose(found[:2], [1 + token, 1 + block], atol=5e-6)
        assert found.token == pytest.approx(theory.chain_tokens(theory.overlap(A, B), n), rel=1e-12)
    assert theory.block_efficiency([A] * 2, [B] * 2).joint == pytest.approx(21 / 9, rel=1e-12)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_block_efficiency_is_that_of_the_rules(length: int) -> None:
    rng, v = np.random.default_rng(length), 3
    for _ in range(10):
        # The last laws depend on no token, the others on all before them.
        rows = [v**i if i < 2 else 1 for i in range(length)]
        p, q = ([random_laws(rng, n, v) for n in rows] for _ in range(2))
        expected, shared = np.ones(2), 0.0
        for x in itertools.product(range(v), repeat=length):
            prefix = [sum(t * v ** (i - 1 - j) for j, t in enumerate(x[:i])) for i in range(length)]
            p_x = [p[i][k % rows[i]] for i, k in enumerate(prefix)]
            q_x = [q[i][k % rows[i]] for i, k in enumerate(prefix)]
            if drafted := math.prod(law[t] for law, t in zip(q_x, x, strict=True)):
                rules = token_rule(p_x, q_x, x), block_rule(p_x, q_x, x)
                expected += drafted * np.array(rules)
            for i in range(length):  # chances of x[:i + 1], counted once for each way to go on
                both = [math.prod(law[i][x[i]] for i in range(i + 1)) for law in (p_x, q_x)]
                shared += min(both) / v ** (length - 1 - i)
        laws = [[law[0] if len(law) == 1 else law for law in side] for side in (p, q)]
        found = theory.block_efficiency(*laws)
        np.testing.assert_allclose(found, [*expected, 1 + shared], rtol=1e-12)
        assert found.token <= found.block + 1e-12 <= found.joint + 2e-12


# -------------------------------------------------------------------- several drafts at one node


def tried(p: Law, x: int, q: Law, otherwise: Callable[[Law], Node]) -> Node:
    """A draft x ~ q against p; if it is rejected, what is done with the rest of p."""
    keep = min(1, p[x] / q[x])
    law, accepted = otherwise(left_over(p, q)) if keep < 1 else (p, 0.0)
    return keep * np.eye(len(p))[x] + (1 - keep) * law, keep + (1 - keep) * accepted


def naive_rule(p: Law, q: Law, drafts: Sequence[int]) -> Node:
    return p, p[list(set(drafts))].sum()


def with_replacement_rule(p: Law, q: Law, drafts: Sequence[int]) -> Node:
    if not drafts:
        return p, 0.0
    return tried(p, drafts[0], q, lambda left: with_replacement_rule(left, q, drafts[1:]))


def without_replacement_rule(p: Law, q: Law, drafts: Sequence[int]) -> Node:
    if not drafts:
        return p, 0.0
    others = np.where(np.arange(len(q)) == drafts[0], 0, q)
    younger = others / max(others.sum(), 1e-300)
    return tried(p, drafts[0], q, lambda left: without_replacement_rule(left, younger, drafts[1:]))


def kseq_rule(p: Law, q: Law, drafts: Sequence[int], rho: float) -> Node:
    k, beta = len(drafts), np.minimum(p / rho, q).sum()
    law, live = np.zeros(len(p)), 1.0
    for x in drafts:
        keep = min(1, p[x] / (rho * q[x]))
        law[x] += live * keep
        live *= 1 - keep
    rest = np.maximum(p - np.minimum(p / rho, q) * (1 - (1 - beta) ** k) / max(beta, 1e-300), 0)
    return law + live * (rest / rest.sum() if rest.sum() > 1e-14 else p), 1 - live


def kseq_rho(p: Law, q: Law, k: int) -> float:
    def excess(rho: float) -> float:
        beta = np.minimum(p / rho, q).sum()
        return 1 - (1 - beta) ** k - rho * beta

    ends = excess(1), excess(k)
    return brentq(excess, 1, k, xtol=1e-14) if ends[0] > 1e-13 and ends[1] < 0 else float(k)


def hybrid_rule(p: Law, q: Law, fixed: Sequence[int], x: int, sampled: Law) -> Node:
    def rest(left: Law) -> Node:
        return left, left[list(fixed)].sum()

    return tried(p, x, sampled, rest)


def drafts_of(q: Law, k: int, replacement: bool = True) -> list[tuple[tuple[int, ...], float]]:
    """All ordered drafts and their chances."""
    found = []
    for drafts in itertools.product(np.flatnonzero(q), repeat=k):
        chance, rest = 1.0, q.copy()
        for x in drafts:
            chance *= rest[x] / rest.sum()
            if not replacement:
                rest[x] = 0
        if chance:
            found.append((drafts, float(chance)))
    return found


def mean(nodes: list[tuple[Node, float]]) -> Node:
    law = sum(weight * node[0] for node, weight in nodes)
    return law, sum(weight * node[1] for node, weight in nodes)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_acceptance_is_that_of_the_rules_and_they_are_lossless(k: int) -> None:
    rng = np.random.default_rng(k)
    for i in range(20):
        p, q = random_laws(rng, 4), random_laws(rng, 4, sparse=False)
        if i % 2:  # still three tokens for three siblings
            q = q * [1, 1, 1, 0] / q[:3].sum()
        iid, rho = drafts_of(q, k), kseq_rho(p, q, k)
        fixed = np.argsort(-q)[: k - 1]
        others = np.where(np.isin(np.arange(4), fixed), 0, q)
        others /= others.sum()
        cases = [
            (
                theory.naive_acceptance(p, q, k),
                [(naive_rule(p, q, x), weight) for x, weight in iid],
            ),
            (
                theory.recursive_acceptance(p, q, k),
                [(with_replacement_rule(p, q, x), weight) for x, weight in iid],
            ),
            (
                theory.recursive_acceptance(p, q, k, replacement=False),
                [(without_replacement_rule(p, q, x), w) for x, w in drafts_of(q, k, False)],
            ),
            (
                theory.kseq_acceptance(p, q, k),
                [(kseq_rule(p, q, x, rho), weight) for x, weight in iid],
            ),
            (
                theory.hybrid_acceptance(p, q, k),
                [(hybrid_rule(p, q, fixed, x, others), others[x]) for x in np.flatnonzero(others)],
            ),
        ]
        for acceptance, nodes in cases:
            law, accepted = mean(nodes)
            np.testing.assert_allclose(law, p, atol=1e-12)
            assert acceptance == pytest.approx(accepted, abs=1e-12)
        bound = theory.optimal_acceptance(p, q, k) + 1e-12
        assert max(acceptance for acceptance, _ in (cases[0], cases[1], cases[3])) <= bound
        if k == 1:
            expected = [theory.match_acceptance(p, q)] + 4 * [theory.overlap(p, q)]
            np.testing.assert_allclose([a for a, _ in cases], expected, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_optimal_acceptance_is_the_least_over_all_sets(k: int) -> None:
    rng = np.random.default_rng(10 + k)
    for v in (2, 3, 5, 9):
        p, q = random_laws(rng, 200, v), random_laws(rng, 200, v)
        p[:20] = q[:20]
        sets = np.array(list(itertools.product([0, 1], repeat=v))).T  # [V, 2 ** V]
        expected = (p @ sets + 1 - (q @ sets) ** k).min(-1)
        np.testing.assert_allclose(theory.optimal_acceptance(p, q, k), expected, atol=1e-12)
        if k == 1:
            np.testing.assert_allclose(expected, theory.overlap(p, q), atol=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_optimal_acceptance_is_the_optimal_transport(k: int) -> None:
    """Most mass on (drafts, token drafted), over joint laws with the marginals q^K and p."""
    rng, v = np.random.default_rng(k), 3
    for p, q in zip(random_laws(rng, 5, v), random_laws(rng, 5, v, sparse=False), strict=True):
        drafts = drafts_of(q, k)
        gain = [-float(y in x) for x, _ in drafts for y in range(v)]
        rows = np.kron(np.eye(len(drafts)), np.ones(v))
        columns = np.tile(np.eye(v), len(drafts))
        marginals = [*(weight for _, weight in drafts), *p]
        plan = linprog(gain, A_eq=np.vstack([rows, columns]), b_eq=marginals)
        assert theory.optimal_acceptance(p, q, k) == pytest.approx(-plan.fun, abs=1e-7)


def test_laws_without_a_common_token() -> None:
    p, q = [0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]
    for found in (
        theory.overlap(p, q),
        theory.match_acceptance(p, q),
        theory.coupled_acceptance(p, q),
        theory.coupled_bound(p, q),
        theory.optimal_acceptance(p, q, 2),
        theory.recursive_acceptance(p, q, 2),
        theory.recursive_acceptance(p, q, 3, replacement=False),  # one more than q can draft
        theory.kseq_acceptance(p, q, 2),
        theory.hybrid_acceptance(p, q, 3),
        theory.block_efficiency([p, p], [q, q]).block - 1,
    ):
        assert found == 0


def test_rules_of_many_drafts_broadcast() -> None:
    p, q = random_laws(np.random.default_rng(4), 2, 3, 2, 4)
    for rule in (
        theory.optimal_acceptance,
        theory.naive_acceptance,
        theory.recursive_acceptance,
        lambda p, q, k: theory.recursive_acceptance(p, q, k, replacement=False),
        theory.kseq_acceptance,
        theory.hybrid_acceptance,
    ):
        found = rule(p, q, 3)
        assert found.shape == (3, 2)
        for at in np.ndindex(3, 2):
            assert found[at] == pytest.approx(rule(p[at], q[at], 3), abs=1e-14)


# ----------------------------------------------------------------------------------------- trees


def breadth_first(size: int, depth: int) -> list[tuple[int, ...]]:
    """All trees of at most `size` nodes and `depth` levels below the root."""
    found = []
    for n in range(1, size + 1):
        for parents in itertools.product(*(range(i) for i in range(1, n))):
            if list(parents) == sorted(parents):
                tree = trees.topology((-1, *parents))
                if tree.depth <= depth:
                    found.append((-1, *parents))
    return found


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 6])
def test_best_tree_is_the_best_of_all(depth: int) -> None:
    rng, size = np.random.default_rng(depth), 7
    candidates = [trees.topology(parents) for parents in breadth_first(size, depth)]
    for i in range(8):
        # Children that are accepted less and less, or in any order, the first never.
        acceptance = rng.dirichlet([1] * 4)[:3] if i % 2 else np.sort(rng.dirichlet([1] * 4))[:0:-1]
        if i == 7:
            acceptance[0] = 0
        values = []
        for tree in candidates:
            if tree.rank.max() < 3:
                steps = np.where(tree.parents < 0, 1, acceptance[tree.rank])
                paths = np.where(tree.mask, steps, 1).prod(1)
                values.append(paths.sum())
                found = theory.tree_tokens(tree.parents.tolist(), acceptance.tolist())
                assert found == pytest.approx(values[-1], rel=1e-12)
        tokens, parents = theory.best_tree(acceptance.tolist(), size, depth)
        assert tokens == pytest.approx(max(values), rel=1e-12)
        assert tokens == pytest.approx(theory.tree_tokens(parents, acceptance.tolist()), rel=1e-12)
        tree = trees.topology(parents)  # breadth first
        assert tree.depth <= depth
        assert len(parents) <= size


def test_best_tree_of_a_benchmark_s_size() -> None:
    acceptance = [0.6, 0.15, 0.08, 0.05, 0.03, 0.02]
    tokens, parents = theory.best_tree(acceptance, 64, 10)
    assert len(parents) == 64
    assert tokens == pytest.approx(theory.tree_tokens(parents, acceptance), rel=1e-12)
    chain = theory.tree_tokens(range(-1, 10), acceptance)
    assert chain == pytest.approx(theory.chain_tokens(0.6, 10), rel=1e-12)
    assert tokens > chain


def test_tree_tokens_of_walks() -> None:
    """The mean of 100,000 walks lies within five of its standard errors."""
    parents, acceptance, n = (-1, 0, 0, 0, 1, 1, 4, 2), [0.5, 0.2, 0.1], 100_000
    rng, children = np.random.default_rng(0), {}
    for i, parent in enumerate(parents):
        children.setdefault(parent, []).append(i)
    lengths = np.ones(n)
    for walk, ranks in enumerate(rng.choice(4, (n, 3), p=[*acceptance, 0.2])):
        node = 0
        for rank in ranks:  # 3: no child is accepted
            if rank >= len(children.get(node, ())):
                break
            node = children[node][rank]
            lengths[walk] += 1
    error = lengths.std() / math.sqrt(n)
    assert abs(lengths.mean() - theory.tree_tokens(parents, acceptance)) <= 5 * error


@pytest.mark.parametrize("guesses", [1, 2, 3])
def test_lookahead(guesses: int) -> None:
    alpha, n = 0.7, 3
    chances = [(1 - alpha) * alpha**i for i in range(n)] + [alpha**n]  # of 0 .. n right tokens
    expected = sum(
        math.prod(chances[length] for length in lengths) * (1 + max(lengths))
        for lengths in itertools.product(range(n + 1), repeat=guesses)
    )
    assert theory.lookahead_tokens(alpha, n, guesses) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------- cascades, parallel drafting, serving


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_cascade(alpha: float) -> None:
    inner, k = 0.7, 2
    one_pass = [0, *((1 - inner) * inner**i for i in range(k)), inner**k]  # chances of 0 .. k + 1
    lengths = np.ones(1)
    for n in range(4):
        tokens = sum(w * theory.chain_tokens(alpha, m) for m, w in enumerate(lengths))
        expected = tokens / (1 + n * 0.1 + n * k * 0.02)
        found = theory.cascade_speedup(alpha, n, 0.1, inner, k, 0.02)
        assert found == pytest.approx(expected, rel=1e-12)
        plain = theory.chain_speedup(alpha, n, 0.1)
        assert theory.cascade_speedup(alpha, n, 0.1, 0.7, 0, 0.02) == pytest.approx(plain)
        lengths = np.convolve(lengths, one_pass)


def test_parallel_drafting() -> None:
    # At c = 1 / γ a draft hides behind its verification, and γ accepted tokens are 1 / c faster.
    assert theory.parallel_speedup(8, 8 * 0.125) == 1 / 0.125
    tokens, draft = theory.chain_tokens(0.8, 4), 4 * 0.125
    never = theory.parallel_speedup(0, draft, 0.0, tokens, draft)  # every draft comes afterwards
    assert never == pytest.approx(theory.chain_speedup(0.8, 4, 0.125), rel=1e-12)
    rates = [theory.parallel_speedup(tokens, draft, h, tokens, draft) for h in (0, 0.5, 1)]
    assert rates == sorted(rates)


def test_roofline() -> None:
    for flops, bandwidth, tokens in [(989e12, 3.35e12, 295), (918e12, 1.64e12, 560)]:
        assert theory.roofline_tokens(flops, bandwidth) == pytest.approx(tokens, abs=0.5)
    assert theory.roofline_tokens(989e12, 3.35e12, 1) == pytest.approx(295 / 2, abs=0.5)


def test_goodput() -> None:
    for k in range(5):
        alone = theory.goodput(0.8, k, 1, lambda n: 0.1, lambda n: 1.0)
        assert alone == pytest.approx(theory.chain_speedup(0.8, k, 0.1), rel=1e-12)
    best, gain = theory.best_goodput(0.8, 20, 1, lambda n: 0.1, lambda n: 1.0)
    assert (best, gain) == pytest.approx(theory.best_chain(0.8, 0.1), rel=1e-12)
    # The larger the batch, the sooner compute binds the pass and the fewer tokens pay.
    lengths = [
        theory.best_goodput(0.8, 20, batch, lambda n: 0.05, lambda n: max(1, n / 64))[0]
        for batch in (1, 8, 16, 32, 64)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 8
    assert lengths[-1] == 0


def test_admission_is_optimal_where_time_is_convex() -> None:
    rng = np.random.default_rng(0)
    for i in range(40):
        confidences = rng.random((3, 3)) ** rng.choice([0.1, 1.0])
        if i % 4 == 0:
            confidences[1] = 1  # equal chances all along a row
        knee, slope = rng.integers(2, 12), rng.random()

        def rate(n: int, knee: int = knee, slope: float = slope) -> float:
            return 1 / (1 + 0.01 * n + slope * max(0, n - knee))

        reached = np.pad(np.cumprod(confidences, 1).cumsum(1), [(0, 0), (1, 0)])
        expected = max(
            sum(1 + row[n] for row, n in zip(reached, lengths, strict=True))
            * rate(3 + sum(lengths))
            for lengths in itertools.product(range(4), repeat=3)
        )
        lengths, found = theory.admit(confidences, rate)
        assert found == pytest.approx(expected, rel=1e-12)
        kept = sum(1 + row[n] for row, n in zip(reached, lengths, strict=True))
        assert found == pytest.approx(kept * rate(3 + lengths.sum()), rel=1e-12)


def test_sparse_reads_are_those_of_a_round() -> None:
    # 16 drafted tokens read 5 % of the cache each, verification all of it; 12 + 1 are kept.
    assert theory.sparse_draft_reads(0.75, 16, 0.05) == pytest.approx((16 * 0.05 + 1) / 13)
    assert theory.sparse_draft_reads(0.5, 0, 0.05) == 1


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.chain_tokens(1.3, 2), "acceptance is 1.3; it must be from 0 to 1."),
        (lambda: theory.chain_tokens(math.nan, 2), "acceptance is nan; it must be from 0 to 1."),
        (
            lambda: theory.chain_tokens(0.5, 2.5),
            "num_drafted is 2.5; it must be a whole number of at least 0.",
        ),
        (lambda: theory.chain_speedup(0.5, 2, -1), "cost is -1; it must be at least 0."),
        (lambda: theory.speedup(2, 0, 0), "verify_cost is 0; it must be above 0."),
        (
            lambda: theory.best_chain(0.5, 0),
            "acceptance is 0.5 and cost 0; the one below 1 and the other above 0 have a best "
            "length.",
        ),
        (
            lambda: theory.position_tokens([0.5, -0.1]),
            "acceptance is -0.1; it must be from 0 to 1.",
        ),
        (
            lambda: theory.overlap([0.5, 0.4], [0.5, 0.5]),
            "the sum of p is 0.9; it must be from 0.999 to 1.001.",
        ),
        (
            lambda: theory.overlap([0.5, 0.5], [1.5, -0.5]),
            "a probability of q is -0.5; it must be at least 0.",
        ),
        (
            lambda: theory.overlap([1.0], [0.5, 0.5]),
            "p has shape (1,) and q (2,); need [..., V] for one V.",
        ),
        (lambda: theory.overlap(1.0, 1.0), "p has shape () and q (); need [..., V] for one V."),
        (
            lambda: theory.block_efficiency([A], [B, B]),
            "p has 1 positions and q 2; a chain needs as many of both.",
        ),
        (
            lambda: theory.block_efficiency([A, [A] * 3], [B, B]),
            "Laws 1 have shape (3, 2); need [V] or [2, V].",
        ),
        (
            lambda: theory.block_efficiency([np.ones(4097) / 4097] * 2, [np.ones(4097) / 4097] * 2),
            "16785409 strings of tokens are to be enumerated; 16777216 can be.",
        ),
        (
            lambda: theory.recursive_acceptance(np.ones(100) / 100, np.ones(100) / 100, 4, False),
            "100000000 strings of tokens are to be enumerated; 16777216 can be.",
        ),
        (
            lambda: theory.kseq_acceptance(A, B, 0),
            "num_drafts is 0; it must be a whole number of at least 1.",
        ),
        (
            lambda: theory.tree_tokens([0, 0], [0.5]),
            "Tree (0, 0) must start with its root, whose parent is -1.",
        ),
        (
            lambda: theory.tree_tokens([-1, 1], [0.5]),
            "Node 1 has parent 1; it needs one of 0 to 0.",
        ),
        (
            lambda: theory.tree_tokens([-1, 0, 0], [0.5]),
            "Node 0 has more than 1 children; acceptance has no more.",
        ),
        (
            lambda: theory.best_tree([0.8, 0.4], 4, 2),
            "acceptance sums to 1.2; at most one child is accepted, so to at most 1.",
        ),
        (
            lambda: theory.cascade_speedup(0.5, 1, 0.1, 1.3, 1, 0.1),
            "inner_acceptance is 1.3; it must be from 0 to 1.",
        ),
        (
            lambda: theory.parallel_speedup(2, 1, hit_rate=2),
            "hit_rate is 2; it must be from 0 to 1.",
        ),
        (lambda: theory.roofline_tokens(1, 0), "bandwidth is 0; it must be above 0."),
        (
            lambda: theory.admit([0.5], lambda n: 1.0),
            "confidences has shape (1,); need [rows, positions].",
        ),
        (
            lambda: theory.admit([[0.5, 1.5]], lambda n: 1.0),
            "confidence is 1.5; it must be from 0 to 1.",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011, the whole message is compared
        call()
    assert str(raised.value) == message
