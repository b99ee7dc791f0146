from math import exp, isnan, log, nan

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lepton.policies import Comparison
from lepton_rollout.bets import (
    Bet,
    highest_ratio,
    interval,
    log_mismatch,
    log_totals,
    odds_ratios,
    ratios_against,
    times_odds,
)
from lepton_rollout.trials import Counts, Trial
from scipy.special import betaln
from scipy.stats import betabinom, binom, nchypergeom_fisher
from scipy.stats import binomtest as exact

ODDS = st.floats(0.02, 300)


@st.composite
def windows(draw: st.DrawFn, largest: int) -> tuple[int, int, int]:
    """(candidate, stable, bad) answers of a window."""
    candidate, stable = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    return candidate, stable, draw(st.integers(1, candidate + stable - 1))


def slowly(candidate: int, stable: int, bad: int, odds: float, zero: float) -> float:
    """log Σ C(candidate, k) C(stable, bad-k) (odds^k - relative to zero^k), every term added."""
    k = np.arange(max(0, bad - stable), min(bad, candidate) + 1)
    terms = -betaln(candidate - k + 1, k + 1) - np.log(candidate + 1) - betaln(stable - bad + k + 1, bad - k + 1)
    return float(np.logaddexp.reduce(terms + k * log(odds)) - np.logaddexp.reduce(terms + k * log(zero)))


@settings(max_examples=150)
@given(windows(400), st.data())
def test_likelihood_ratios_are_those_of_fishers_noncentral_distribution(
    window: tuple[int, int, int], data: st.DataObject
) -> None:
    candidate, stable, bad = window
    ours = data.draw(st.integers(max(0, bad - stable), min(bad, candidate)))
    null, other = data.draw(st.floats(0.1, 10)), data.draw(st.floats(0.1, 10))
    [[found]] = odds_ratios((ours, bad - ours), (candidate, stable), [(null, [other])])
    seen = [nchypergeom_fisher.logpmf(ours, candidate + stable, candidate, bad, odds) for odds in (other, null)]
    assume(min(seen) > -30)  # Beyond that the oracle loses its own precision.
    assert found == pytest.approx(seen[0] - seen[1], abs=1e-8)


@settings(max_examples=200)
@given(windows(100_000), ODDS, ODDS)
def test_sums_that_leave_terms_out_are_exact_to_a_billionth(
    window: tuple[int, int, int], odds: float, other: float
) -> None:
    found = log_totals(*window, [log(odds), log(other)])
    assert found[0] - found[1] == pytest.approx(slowly(*window, odds, other), abs=2e-9, rel=1e-12)


@pytest.mark.parametrize(
    ("bad", "of"), [((0, 0), (10, 90)), ((10, 90), (10, 90)), ((3, 0), (10, 0)), ((0, 3), (0, 90))]
)
def test_a_window_that_compares_nothing_says_nothing(bad: tuple[int, int], of: tuple[int, int]) -> None:
    assert odds_ratios(bad, of, [(1.0, [2.0]), (1.5, [1.0])]) == [[], []]


@given(windows(1000), ODDS, st.data())
def test_which_version_is_called_the_candidate_makes_no_difference(
    window: tuple[int, int, int], odds: float, data: st.DataObject
) -> None:
    candidate, stable, bad = window
    ours = data.draw(st.integers(max(0, bad - stable), min(bad, candidate)))
    one = odds_ratios((ours, bad - ours), (candidate, stable), [(1.0, [odds])])
    other = odds_ratios((bad - ours, ours), (stable, candidate), [(1.0, [1 / odds])])
    assert one[0] == pytest.approx(other[0], abs=1e-9)


@given(windows(1000), ODDS, st.data())
def test_good_and_bad_answers_are_mirror_images(window: tuple[int, int, int], odds: float, data: st.DataObject) -> None:
    candidate, stable, bad = window
    ours = data.draw(st.integers(max(0, bad - stable), min(bad, candidate)))
    one = odds_ratios((ours, bad - ours), (candidate, stable), [(1.0, [odds])])
    good = (candidate - ours, stable - bad + ours)
    assert one[0] == pytest.approx(odds_ratios(good, (candidate, stable), [(1.0, [1 / odds])])[0], abs=1e-9)


@given(windows(300), st.floats(0.2, 5), st.floats(0.2, 5))
def test_one_window_makes_no_wealth_on_average_under_its_null_hypothesis(
    window: tuple[int, int, int], null: float, other: float
) -> None:
    candidate, stable, bad = window
    counts = range(max(0, bad - stable), min(bad, candidate) + 1)
    [norm] = log_totals(*window, [log(null)])
    mean, total = 0.0, 0.0
    for ours in counts:
        [[ratio]] = odds_ratios((ours, bad - ours), (candidate, stable), [(null, [other])])
        weight = exp(_term(candidate, stable, bad, ours) + ours * log(null) - norm)
        total += weight
        mean += weight * exp(ratio)
    assert mean / total == pytest.approx(1, abs=1e-7)


def _term(candidate: int, stable: int, bad: int, k: int) -> float:
    terms = -betaln(candidate - k + 1, k + 1) - betaln(stable - bad + k + 1, bad - k + 1)
    return float(terms - np.log(candidate + 1) - np.log(stable + 1) + betaln(1, 1))


# --- bets -------------------------------------------------------------------------------------------------------------


def test_a_bet_begins_with_one_and_keeps_it_when_nothing_is_won() -> None:
    bet = Bet()
    for _ in range(1000):
        bet = bet.alert([0.0, 0.0, 0.0])
        assert bet.value == pytest.approx(1, abs=1e-9)


def test_a_bet_that_only_loses_keeps_what_it_has_not_placed() -> None:
    bet = Bet()
    for _ in range(3000):
        bet = bet.alert([-5.0, -9.0])
    assert bet.value == pytest.approx(0.5 * 300 / 3300, rel=0.01)


def test_one_window_wins_a_little_however_bad_it_was() -> None:
    assert Bet().alert([500.0, 500.0]).log <= 1.5


def test_the_peak_is_remembered() -> None:
    bet = Bet().alert([2.0]).alert([2.0])
    later = bet.alert([-50.0])
    assert later.value < bet.value
    assert later.highest == bet.highest == bet.value


def test_a_bet_on_nan_is_nan_and_stays_so() -> None:
    bet = Bet().alert([nan, 1.0]).alert([0.0, 0.0])
    assert isnan(bet.log)
    assert isnan(bet.peak)


@pytest.mark.parametrize("odds", [1.0, 0.8])
def test_false_alarms_are_as_rare_as_promised_although_every_window_is_looked_at(odds: float) -> None:
    rng = np.random.default_rng(11)
    values, alarms = [], 0
    for _ in range(200):
        trial = Trial()
        for second in range(50):
            base = 0.05 * (1 + 0.8 * np.sin(second / 7))
            candidate_odds = odds * base / (1 - base)
            ours = int(rng.binomial(20, candidate_odds / (1 + candidate_odds)))
            trial = trial.seen(Counts(ours, 20), Counts(int(rng.binomial(80, base)), 80), Comparison())
        values.append(trial.worse.value)
        alarms += trial.worse.highest >= 20
    assert np.mean(values) <= 1 + 3 * np.std(values) / 200**0.5
    assert alarms <= 0.05 * 200


def test_what_is_at_the_margin_is_rarely_proven_to_be_below_it() -> None:
    rng = np.random.default_rng(12)
    values, proofs = [], 0
    comparison = Comparison(margin=1.5, acceptable=0.05)
    for _ in range(200):
        trial, best = Trial(), 0.0
        for _ in range(50):
            base = 0.06 / (1 - 0.06)
            ours = int(rng.binomial(50, 1.5 * base / (1 + 1.5 * base)))
            trial = trial.seen(Counts(ours, 50), Counts(int(rng.binomial(50, 0.06)), 50), comparison)
            best = max(best, trial.proof)
        values.append(trial.proof)
        proofs += best >= 20
    assert np.mean(values) <= 1 + 3 * np.std(values) / 200**0.5
    assert proofs <= 0.05 * 200


# --- ratios -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_ratios_against_a_ratio_are_binomial(bad: int, good: int, null: float, other: float) -> None:
    of = bad + good
    expected = binom.logpmf(bad, of, other) - binom.logpmf(bad, of, null)
    assert ratios_against(bad, of, null, [other]) == [pytest.approx(expected, abs=1e-7)]


@given(st.floats(0.001, 0.999), st.floats(0.1, 100))
def test_odds_are_multiplied(ratio: float, factor: float) -> None:
    after = times_odds(ratio, factor)
    assert after / (1 - after) == pytest.approx(factor * ratio / (1 - ratio), rel=1e-6)


@given(st.integers(0, 300), st.integers(1, 300), st.sampled_from([0.1, 0.01, 0.001]))
def test_the_highest_ratio_is_at_least_the_exact_bound(bad: int, more: int, level: float) -> None:
    of = bad + more
    exactly = exact(bad, of, alternative="less").proportion_ci(1 - level, method="exact").high
    assert highest_ratio(bad, of, level) >= exactly - 1e-9


def test_without_data_any_ratio_is_possible() -> None:
    assert highest_ratio(0, 0, 0.05) == 1
    assert interval(0, 0) == (0, 1)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_interval_is_wilsons(errors: int, more: int) -> None:
    if errors + more:
        wilson = exact(errors, errors + more).proportion_ci(0.95, method="wilson")
        assert interval(errors, errors + more) == pytest.approx((wilson.low, wilson.high), abs=1e-9)


# --- splits -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2000), st.integers(0, 2000), st.floats(0.001, 0.9))
def test_a_mismatch_is_a_beta_binomial_against_a_binomial(ours: int, theirs: int, share: float) -> None:
    of = ours + theirs
    expected = betabinom.logpmf(ours, of, 100 * share, 100 * (1 - share)) - binom.logpmf(ours, of, share)
    assert log_mismatch(ours, theirs, share) == pytest.approx(expected, abs=1e-6)


def test_a_split_as_it_should_be_is_rarely_called_a_mismatch() -> None:
    rng = np.random.default_rng(13)
    alarms = 0
    for _ in range(500):
        ours = np.cumsum(rng.binomial(100, 0.1, 60))
        alarms += any(
            log_mismatch(int(each), 100 * (at + 1) - int(each), 0.1) >= log(100) for at, each in enumerate(ours)
        )
    assert alarms <= 0.01 * 500 + 5
