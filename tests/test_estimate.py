"""From levels to an estimate: fabricated sequences of which the error is known; nothing is solved.

Random families: "clean" errors A n^-p + B n^-(p+2), "ragged" ones C/n (frac(n c) - 1/2), as of a jump that no node lies
on, "underresolved" ones that die faster than any power before n^-p shows.
"""

import numpy as np
import pytest

from kolmo.refine.estimate import Convergence, Verdict, observed_order

ORDERS = [2.0, 4.0, 6.0]


def grids(rng: np.random.Generator, count: int, ratios: tuple[float, float] = (1.25, 2.0)) -> np.ndarray:
    """Numbers of nodes, growing by one ratio or by a different one each time."""
    ratio = rng.uniform(*ratios, size=count - 1) if rng.random() < 0.5 else np.full(count - 1, rng.uniform(*ratios))
    first = rng.choice([15, 21, 41]) * rng.uniform(1.0, 1.3)
    return np.round(first * np.concatenate([[1.0], np.cumprod(ratio)]))


def clean(rng: np.random.Generator, n: np.ndarray, k: int, p: float, rough: float = 0.3) -> np.ndarray:
    """Errors (levels, points, k)."""
    A, B = rng.uniform(0.3, 1.0, (6, k)) * rng.choice([-1.0, 1.0], k), rough * rng.normal(size=(6, k))
    x = (n / n[0])[:, None, None]
    return A * x**-p + B * x ** -(p + 2.0)


def ragged(rng: np.random.Generator, n: np.ndarray, k: int) -> np.ndarray:
    """Errors of one or two jumps (or kinks), each somewhere in its cell, and a smooth one of order two."""
    N = n[:, None]
    power = rng.choice([1.0, 1.0, 2.0], k)
    smooth = 10.0 ** rng.uniform(-2.0, 1.0, k) * rng.integers(0, 2, k)
    errors = smooth * rng.normal(size=(6, k)) * N[:, None] ** -2.0
    for present in (np.ones(k), rng.random(k) < 0.33):
        place = N * rng.random(k) % 1.0
        sign = np.where(power == 1.0, place - 0.5, place * (1.0 - place) - 1.0 / 6.0 + rng.uniform(-0.3, 0.3, k))
        amplitude = rng.normal(size=k) * (1.0 + 0.3 * rng.normal(size=(6, k)))
        errors = errors + amplitude * (present * sign * N**-power)[:, None]
    return errors


def judged(p: float, n: np.ndarray, errors: np.ndarray, **options: int) -> Verdict:
    """Verdict on answers of size one with these errors (levels, points, k)."""
    return Convergence(p, **options).judge(n, list(1.0 + errors))


def sequence(n: list[float], errors: list[float], p: float, **options: int) -> Verdict:
    return judged(p, np.array(n), np.array(errors)[:, None, None], **options)


def size(errors: np.ndarray) -> np.ndarray:
    return np.abs(errors[-1]).max(0)


# ------------------------------------------------------------------------------------------------ clean sequences
@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("p", [1.0, *ORDERS])
def test_clean_sequences_are_confirmed_and_not_overestimated(p, count):
    rng, ratios, confirmed = np.random.default_rng(int(p)), [], []
    for _ in range(40):
        n = grids(rng, count)
        errors = clean(rng, n, 1, p, rough=0.05)
        verdict = judged(p, n, errors)
        ratios.append(float((verdict.estimate / size(errors))[0]))
        confirmed.append(verdict.confirmed)
    assert np.mean(confirmed) >= 0.95
    assert min(ratios) >= 0.99
    assert np.quantile(ratios, 0.9) <= 3.0


@pytest.mark.parametrize("p", [1.0, *ORDERS])
def test_wildly_different_resolutions(p):
    for n in ([20, 21, 100], [20, 100, 105], [10, 70, 75, 400], [10, 12, 150]):
        errors = (np.array(n) / n[0]) ** -p
        verdict = sequence(n, list(errors), p)
        assert verdict.confirmed, n
        assert 1.0 <= verdict.estimate[0] / errors[-1] <= 3.001, n


def test_the_observed_order_is_exact():
    for n in ([20, 30, 45], [20, 21, 100], [20, 100, 105]):
        for q in (0.5, 1.0, 2.7, 6.0, 11.0):
            powers = np.array(n) ** -q
            found = observed_order(n, np.array([powers[0] - powers[1]]), np.array([powers[1] - powers[2]]))
            assert found[0] == pytest.approx(q, rel=1e-6)


@pytest.mark.parametrize("p", ORDERS)
def test_a_clean_sequence_of_a_lower_order_is_never_underestimated(p):
    """A node on a jump gives order two to a method of order six, a face order one."""
    rng = np.random.default_rng(3)
    for q in (1.0, 2.0):
        for count in (3, 4, 5):
            n = grids(rng, count)
            errors = clean(rng, n, 20, q, rough=0.02)
            ratio = judged(p, n, errors).estimate / size(errors)
            assert ratio.min() >= 0.95
            assert ratio.max() <= 4.0


# ----------------------------------------------------------------------------------------------- erratic sequences
@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("p", ORDERS)
def test_ragged_sequences_are_honest(p, count):
    """No error above ten estimates but in one of 200 (of 40 where three levels are all), hardly any above one."""
    rng, ratios = np.random.default_rng([int(p), count]), []
    for _ in range(60):
        n = grids(rng, count)
        errors = ragged(rng, n, 150)
        ratios.append(size(errors) / np.maximum(judged(p, n, errors).estimate, 1e-300))
    dishonest = np.mean(np.concatenate(ratios) > 10.0)
    assert dishonest <= (0.025 if count == 3 else 0.005)
    assert np.mean(np.concatenate(ratios) > 1.0) <= 0.12


def test_luck_at_three_levels_can_be_refused():
    """With breaks known to lie between nodes three levels confirm nothing."""
    rng, ratios = np.random.default_rng(5), []
    for _ in range(60):
        n = grids(rng, 3)
        errors = ragged(rng, n, 150)
        ratios.append(size(errors) / np.maximum(judged(6.0, n, errors, fewest=4).estimate, 1e-300))
    assert np.mean(np.concatenate(ratios) > 10.0) <= 0.003
    assert not sequence([20, 30, 45], [1.0, 1.5**-6, 2.25**-6], 6.0, fewest=4).confirmed


def test_where_a_search_would_stop_it_is_honest():
    """Seven chances of luck: the first level with an estimate below a random tolerance ends the search."""
    rng, stopped, dishonest = np.random.default_rng(6), 0, 0
    for _ in range(60):
        n, k = grids(rng, 7), 100
        errors = ragged(rng, n, k)
        tolerance = np.abs(errors[0]).max(0) * 10.0 ** rng.uniform(-3.0, 0.0, k)
        searching = np.ones(k, dtype=bool)
        for count in range(3, 8):
            estimate = judged(4.0, n[:count], errors[:count]).estimate
            ends = searching & (estimate <= tolerance)
            searching &= ~ends
            stopped += ends.sum()
            dishonest += (ends & (size(errors[:count]) > 10.0 * estimate)).sum()
    assert stopped > 1000
    assert dishonest <= 0.015 * 60 * 100  # by the order alone, without the other rules, 9 %


@pytest.mark.parametrize("p", ORDERS)
def test_differences_that_change_their_sign_are_not_believed(p):
    for q in (1.0, 2.0, p):
        n = 20.0 * 1.5 ** np.arange(3)
        errors = (n / n[0]) ** -q * (-1.0) ** np.arange(3)
        verdict = sequence(list(n), list(errors), p)
        assert not verdict.confirmed
        assert "sign" in verdict.reason
        assert verdict.estimate[0] >= abs(errors[-1])


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("small", [1e-2, 1e-4, 0.0])
def test_an_accidental_agreement_does_not_make_the_estimate_small(p, small):
    """A last difference that is small, of either sign, after differences that were not: errors stay at 0.3."""
    for before in ([1.0], [0.8, 1.3], [0.9, 0.2, 1.0]):
        for sign in (-1.0, 1.0):
            errors = [*before, 0.3, 0.3 + sign * small]
            verdict = sequence([20.0 * 1.5**i for i in range(len(errors))], errors, p)
            assert not verdict.confirmed
            assert verdict.reason
            assert verdict.estimate[0] >= 0.3
            assert (verdict.hoped <= verdict.estimate).all()


def test_two_fast_declines_of_which_the_last_turned_back_are_not_believed():
    errors = [1.0, 0.3, 0.15, 0.155]
    verdict = sequence([20, 30, 45, 67], errors, 2.0)
    assert not verdict.confirmed
    assert verdict.estimate[0] >= 0.1


def test_an_accident_is_remembered_for_another_level():
    """After 1.0, 0.3, 0.3 a level with a small difference again is no evidence; three are."""
    errors = [1.0, 0.3, 0.3001, 0.30012]
    assert sequence([20, 30, 45, 67], errors, 6.0).estimate[0] > 0.1


def test_an_estimate_falls_no_faster_than_the_method_can():
    """Where the last difference is believed, too: the one before bounds the error of the last level."""
    rng = np.random.default_rng(8)
    for p in ORDERS:
        n = grids(rng, 5, (1.4, 1.6))
        errors = 10.0 ** -np.cumsum(rng.uniform(0.5, 3.0, (5, 1, 400)), axis=0)
        before = np.abs(errors[-2] - errors[-3]).max(0) / ((n[-2] / n[-3]) ** p - 1.0)
        verdict = judged(p, n, errors)
        assert (verdict.estimate >= 0.999 * before * (n[-2] / n[-1]) ** p).all()


@pytest.mark.parametrize("p", ORDERS)
def test_a_plateau_followed_by_a_drop_is_not_believed(p):
    n = 20.0 * 1.5 ** np.arange(4)
    verdict = sequence(list(n), [3.0, 2.0, 1.0, 1.0 - 1.5**-p], p)
    assert not verdict.confirmed
    assert verdict.estimate[0] >= 0.4
    longer = sequence([*n, 20.0 * 1.5**4], [4.0, 3.0, 2.0, 2.0 - 1.5**-p, 2.0 - 1.5**-p - 1.5 ** (-2 * p)], p)
    assert not longer.confirmed
    assert longer.estimate[0] >= 0.4


# --------------------------------------------------------------------------------------------------- smooth starts
@pytest.mark.parametrize("p", ORDERS)
def test_faster_than_the_method_is_believed_once_it_was_seen_twice(p):
    """Underresolved Gaussians: errors fall by 30 a level. Three levels wait, four are sure: the estimate falls, too."""
    n = list(20.0 * 1.3 ** np.arange(5))
    errors = [30.0**-i for i in range(5)]
    assert not sequence(n[:3], errors[:3], p).confirmed
    verdict = sequence(n[:4], errors[:4], p)
    assert verdict.confirmed
    assert verdict.order[0] == max(0.5 * p, 1.0)  # what follows the first part of the error may be slower
    assert errors[3] <= verdict.estimate[0] <= 0.05 * sequence(n[:3], errors[:3], p).estimate[0]


@pytest.mark.parametrize("p", ORDERS)
def test_underresolved_data_are_never_underestimated(p):
    rng = np.random.default_rng(9)
    for _ in range(40):
        n, k = grids(rng, 5), 20
        x = (n / n[0])[:, None, None]
        waves = np.cos(rng.uniform(0.0, 6.3, (6, k)) + 6.3 * rng.random(k) * n[:, None, None])
        errors = np.exp(-rng.uniform(0.5, 2.0, k) * x**2) * waves * rng.normal(size=k)
        errors = errors + 10.0 ** rng.uniform(-4.0, -1.0, k) * rng.normal(size=(6, k)) * x**-p
        for count in (3, 4, 5):
            assert (judged(p, n[:count], errors[:count]).estimate >= 0.5 * size(errors[:count])).all()


# ------------------------------------------------------------------------------------- rounding, zero, few levels
def test_rounding_is_a_floor():
    """Where levels agree to rounding that is the estimate, and no accident."""
    rng = np.random.default_rng(10)
    values = [1.0 + 1e-13 * rng.uniform(-1.0, 1.0, (6, 2)) for _ in range(4)]
    verdict = Convergence(6.0).judge([20, 30, 45, 67], values, rounding=np.array([1e-13, 1e-13]))
    assert verdict.confirmed
    assert (verdict.estimate >= 1e-13).all()
    assert (verdict.estimate <= 4e-13).all()
    exact = Convergence(6.0).judge([20, 30, 45], [np.ones((2, 1))] * 3, rounding=1e-14)
    assert exact.confirmed
    assert exact.estimate[0] == 1e-14


def test_one_agreement_to_rounding_is_an_accident():
    """The level before was far off: not the arithmetic ended the convergence."""
    verdict = Convergence(2.0).judge([20, 30, 45], [np.array([[v]]) for v in (1.0, 1.3, 1.3)], rounding=1e-14)
    assert not verdict.confirmed
    assert verdict.estimate[0] >= 0.1


def test_what_is_larger_than_rounding_is_no_rounding():
    verdict = Convergence(2.0).judge([20, 30, 45], [np.array([[v]]) for v in (1.0, 1.3, 1.1)], rounding=1e-2)
    assert not verdict.confirmed


def test_all_zero_is_told():
    verdict = Convergence(6.0).judge([20, 30, 45], [np.zeros((3, 2))] * 3, rounding=1e-14)
    assert not verdict.confirmed
    assert "zero" in verdict.reason
    assert verdict.silent.tolist() == [True, True]
    one = Convergence(6.0).judge([20, 30, 45], [np.array([[0.0, 1.0]])] * 3, rounding=1e-14)
    assert one.silent.tolist() == [True, False]


def test_few_levels_show_little():
    one = sequence([20], [0.5], 6.0)
    assert not one.confirmed
    assert np.isinf(one.estimate).all()
    two = sequence([20, 30], [1.0, 1.5**-1], 6.0)
    assert not two.confirmed
    assert two.estimate[0] == pytest.approx(1.5**-1)  # exact at order one, whatever the method
    assert two.reason


def test_what_is_no_number_has_no_estimate():
    values = [np.array([[1.0, v]]) for v in (1.0, 1.1, np.nan)]
    verdict = Convergence(2.0).judge([20, 30, 45], values)
    assert not verdict.confirmed
    assert np.isinf(verdict.estimate[1])


# ---------------------------------------------------------------------------------------- columns, points, witnesses
def test_columns_are_judged_by_themselves():
    rng = np.random.default_rng(11)
    n = grids(rng, 4)
    errors = np.concatenate([clean(rng, n, 3, 4.0), ragged(rng, n, 3)], axis=-1)
    together = judged(4.0, n, errors)
    for j in range(6):
        assert judged(4.0, n, errors[..., j : j + 1]).estimate[0] == pytest.approx(together.estimate[j])
    assert together.confirmed == all(judged(4.0, n, errors[..., j : j + 1]).confirmed for j in range(6))


def test_a_witness_tells_an_accident_at_a_point():
    """The answer asked for agrees by accident, the one beside it does not."""
    values = np.array([[0.5, 0.3], [0.4, 0.2], [0.4001, 0.1]])
    assert judged(2.0, np.array([20, 30, 45]), values[..., None]).estimate[0] >= 0.1


@pytest.mark.parametrize("seed", range(10))
def test_what_was_confirmed_stays_so_unless_the_next_level_contradicts_it(seed):
    """Orders that wander by more than they may from one triple to the next: 4, 4, and then about 6."""
    rng = np.random.default_rng(seed)
    n = [20.0, 30.0, 45.0, 60.0]
    errors = [m**-4.0 for m in n[:3]]
    before = sequence(n[:3], errors, 4.5)
    assert before.confirmed
    last = errors[-1] * rng.uniform(0.0, 0.15)  # better than order 4.5 can make it
    after = sequence(n, [*errors, last], 4.5)
    assert after.confirmed
    assert last <= after.estimate[0] <= before.estimate[0]
    away = errors[-1] + before.estimate[0] * rng.uniform(1.5, 5.0) * rng.choice([-1.0, 1.0])
    contradicted = sequence(n, [*errors, away], 4.5)
    assert not contradicted.confirmed
    assert contradicted.estimate[0] >= 0.5 * abs(away)


def grouped(n, p, sizes):
    """Levels (points, groups) of one smooth column at four points with four witnesses each, of the given sizes."""
    shape = np.concatenate([np.ones(4), np.ravel(sizes)])
    groups = np.column_stack([np.arange(4), 4 + np.arange(16).reshape(4, 4)])
    return [1.0 + float(m) ** -p * shape[:, None] for m in n], groups


@pytest.mark.parametrize("seed", range(5))
def test_one_witness_that_errs_more_than_the_others_does_not_rule(seed):
    """In every group one errs by up to a hundred times as much: the estimate stays that of the points, and above it."""
    rng = np.random.default_rng(seed)
    n = [20, 30, 45, 60]
    sizes = rng.uniform(0.5, 1.2, (4, 4))
    sizes[np.arange(4), rng.integers(0, 4, 4)] *= 10 ** rng.uniform(1, 2, 4)
    values, groups = grouped(n, 4.0, sizes)
    verdict = Convergence(4.0).judge(n, values, groups=groups)
    plain = Convergence(4.0).judge(n, values)
    assert verdict.confirmed
    assert n[-1] ** -4.0 <= verdict.estimate[0] <= 5.0 * n[-1] ** -4.0 < plain.estimate[0]


@pytest.mark.parametrize("seed", range(20))
def test_most_witnesses_tell_an_accident_at_every_point(seed):
    """The last difference is next to nothing at all points: three witnesses of four say what it might have been."""
    rng = np.random.default_rng(seed)
    n = [20, 30, 45]
    values, groups = grouped(n, 2.0, rng.uniform(0.5, 2.0, (4, 4)) * rng.choice([-1, 1], (4, 4)))
    values[-1][:4] = values[-2][:4] + 1e-6 * rng.normal(size=(4, 1))
    values[-1][4 + 4 * np.arange(4) + rng.integers(0, 4, 4)] = values[-2][4 + 4 * np.arange(4)]
    missed = np.abs(values[-1][:4] - 1.0).max()
    assert Convergence(2.0).judge(n, values, groups=groups).estimate[0] >= 0.1 * missed
    alone = Convergence(2.0).judge(n, [v[:4] for v in values])
    assert not alone.confirmed or alone.estimate[0] < 0.1 * missed


def test_units_do_not_matter():
    rng = np.random.default_rng(12)
    n = grids(rng, 5)
    for errors in (clean(rng, n, 20, 4.0), ragged(rng, n, 20)):
        for s in (1e-200, 1e200):
            values = [s * (1.0 + e) for e in errors]
            scaled, plain = Convergence(4.0).judge(7.0 * n, values), judged(4.0, n, errors)
            assert scaled.estimate / s == pytest.approx(plain.estimate, rel=1e-6)


# ----------------------------------------------------------------------------------------------------- confirmation
def test_a_shifted_grid_confirms_or_contradicts():
    n, errors = [20.0, 30.0, 45.0, 45.0], [1.0, 0.3, 0.3001]
    contradicted = sequence(n, [*errors, -0.2], 4.0)
    assert contradicted.estimate[0] >= 0.5
    confirmed = sequence(n, [*errors, 0.3002], 4.0)
    assert confirmed.confirmed
    assert confirmed.estimate[0] < sequence(n[:3], errors, 4.0).estimate[0]


def test_a_shifted_grid_makes_three_lucky_levels_honest():
    rng, before, after = np.random.default_rng(13), [], []
    for _ in range(40):
        n = grids(rng, 3)
        k, n4 = 150, np.append(n, n[-1])
        place = rng.random(k)
        shift = np.array([0.0, 0.0, 0.0, 0.5])
        errors = ((n4[:, None] * place + shift[:, None]) % 1.0 - 0.5)[:, None] / n4[:, None, None]
        before.append(size(errors[:3]) / np.maximum(judged(6.0, n, errors[:3]).estimate, 1e-300))
        after.append(size(errors) / judged(6.0, n4, errors).estimate)
    assert np.mean(np.concatenate(after) > 10.0) < 0.5 * np.mean(np.concatenate(before) > 10.0) + 1e-9


# -------------------------------------------------------------------------------------------------- next resolution
@pytest.mark.parametrize("p", ORDERS)
def test_the_next_level_meets_what_is_allowed(p):
    n, policy = [20.0, 30.0, 45.0], Convergence(p)
    errors = [(x / 20.0) ** -p for x in n]
    for excess in (2.0, 10.0, 100.0):
        verdict = sequence(n, errors, p)
        allowed = verdict.estimate / excess
        after = policy.next_resolution(n, verdict, allowed, least=1.0, most=1e3)
        then = sequence([*n, after], [*errors, (after / 20.0) ** -p], p)
        assert 0.4 <= then.estimate[0] / allowed[0] <= 2.2


def test_growth_is_bounded():
    n, policy = [20.0, 30.0, 45.0], Convergence(2.0)
    verdict = sequence(n, [1.0, 1.5**-2, 2.25**-2], 2.0)
    assert policy.next_resolution(n, verdict, np.array([1e-30]), least=1.2, most=2.0) == pytest.approx(90.0)
    assert policy.next_resolution(n, verdict, np.array([0.0]), least=1.2, most=2.0) == pytest.approx(90.0)
    assert policy.next_resolution(n, verdict, np.array([1e30]), least=1.2, most=2.0) == pytest.approx(54.0)
    assert policy.next_resolution(n[:2], sequence(n[:2], [1.0, 0.4], 2.0), np.array([1e-9]), least=1.2, most=2.0) == 36


def test_a_surprise_asks_for_a_level_near_by():
    """What may be luck is looked at from close by; what is slow in earnest takes a long step."""
    n, policy, allowed = [20.0, 30.0, 45.0], Convergence(4.0), np.array([1e-3])
    lucky = sequence(n, [1.0, 1e-1, 1e-1 - 1e-4], 4.0)
    assert lucky.hoped[0] == pytest.approx(1e-4 / (1.5**4 - 1.0))  # at the order of the method
    slow = sequence(n, [1.0, 0.5, 0.3], 4.0)
    assert policy.next_resolution(n, lucky, allowed, least=1.2, most=2.0) == pytest.approx(54.0)
    assert policy.next_resolution(n, slow, allowed, least=1.2, most=2.0) == pytest.approx(90.0)


# ------------------------------------------------------------------------------------- between the last two levels
@pytest.mark.parametrize("p", ORDERS)
def test_a_level_between_confirms_what_fell_fast(p):
    """Errors that fall faster than the method at first, as of smooth data: one between costs less than another."""
    n, errors = [20.0, 32.0, 51.2], [1.0, 0.8**p * 1.6**-p, 0.8**p * 2.56**-p]
    errors[0] *= 3.0  # the first grid saw little
    verdict = sequence(n, errors, p)
    assert not verdict.confirmed
    between = Convergence(p).between(n, verdict, 1.01 * verdict.hoped, least=1.2)
    assert between == pytest.approx((32.0 * 51.2) ** 0.5)
    after = sequence([*n[:2], between, n[2]], [*errors[:2], 0.8**p * (between / 20.0) ** -p, errors[2]], p)
    assert after.confirmed
    assert errors[-1] <= after.estimate[0] <= 6.0 * errors[-1]


def test_no_level_between_where_it_cannot_help():
    n, policy = [20.0, 30.0, 60.0], Convergence(4.0)
    lucky, clean_ = sequence(n, [1.0, 1e-1, 1e-1 - 1e-4], 4.0), sequence(n, [1.0, 1.5**-4, 3.0**-4], 4.0)
    assert policy.between(n, lucky, lucky.hoped, least=1.2) is not None
    assert policy.between(n, lucky, 0.9 * lucky.hoped, least=1.2) is None  # a better one is needed
    assert policy.between(n, lucky, lucky.hoped, least=1.5) is None  # the last two are near each other
    assert policy.between(n[:2], sequence(n[:2], [1.0, 0.1], 4.0), np.array([9.0]), least=1.2) is None
    assert policy.between(n, clean_, 9.0 * clean_.hoped, least=1.2) is None  # believed as it is


def test_a_search_that_looks_between_is_honest():
    """Errors of a jump somewhere in its cell, resolutions as the policy asks for them, until a tolerance is met."""
    rng, policy, stopped, between, dishonest = np.random.default_rng(23), Convergence(4.0), 0, 0, 0
    for _ in range(400):
        place, amplitude = rng.random(2), np.array([1.0, 0.5 * rng.integers(0, 2)])
        allowed = np.array([10.0 ** rng.uniform(-3.5, -1.5)])
        n = [20.0 * rng.uniform(1.0, 1.5)]
        for _ in range(9):
            levels = [np.array([[1.0 + (amplitude * ((x * place) % 1.0 - 0.5)).sum() / x]]) for x in n]
            verdict = policy.judge(n, levels)
            if len(n) >= 3 and verdict.estimate <= allowed:
                stopped += 1
                dishonest += abs(levels[-1].item() - 1.0) > 10.0 * verdict.estimate.item()
                break
            middle = policy.between(n, verdict, allowed, least=1.2)
            between += middle is not None
            n = sorted([*n, middle or policy.next_resolution(n, verdict, allowed, least=1.2, most=2.0)])
    assert stopped > 120
    assert between > 200
    assert dishonest <= 0.015 * stopped
