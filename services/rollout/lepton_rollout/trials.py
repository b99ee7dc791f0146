"""One kind of bad answer: how it is counted, and what its windows prove for and against the candidate."""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import inf, log

from lepton.policies import Comparison, Judging, Policy, Strategy
from lepton.rollouts import Gate, GateState
from lepton_common.events import Tally, VersionWindow
from lepton_common.sketch import bucket_of, count_above, milliseconds_of

from lepton_rollout.bets import Bet, highest_ratio, odds_ratios, ratios_against, times_odds

ERRORS, REFUSED, SLOW_P95, SLOW_P99 = "errors", "refused", "slow_p95", "slow_p99"
SHADOW_ERRORS, SHADOW_LABELS = "shadow_errors", "shadow_labels"
# Alternatives as factors of the odds ratio that is tolerated, so that from 1.2 on every harm is near one of them.
_WORSE = tuple(1.2 * (32 / 1.2) ** (step / 9) for step in range(10))
# Alternatives below a margin, as powers of it: half way to "no difference", no difference, and better.
_POWERS = (0.5, 0.75, 1.0, 1.3, 1.8)
# Alternatives below an acceptable ratio, and above a ratio of the past, as factors.
_LESS = (0.7, 0.4, 0.15, 0.02)
_MORE = (1.5, 3.0, 8.0, 30.0, 200.0)
# How often the stable is right where just one of a labelled pair is, if the other is worse.
_STABLE_RIGHT = (0.55, 0.62, 0.72, 0.85, 0.97)
# How far the odds may move from one time to another by themselves. Where no stable runs beside the candidate, time and
# version cannot be told apart, and only what goes beyond this is blamed on the version.
DRIFT = 4.0


@dataclass(frozen=True, slots=True)
class Counts:
    """Bad answers of all answers."""

    bad: int = 0
    of: int = 0

    def plus(self, other: "Counts") -> "Counts":
        return Counts(self.bad + other.bad, self.of + other.of)


NONE = Counts()


@dataclass(frozen=True, slots=True)
class Trial:
    """All that a rollout has learned about one kind of bad answer.

    `worse` bets that the odds are above the tolerated ones, `no_worse` that they are below the margin, `low` that the
    candidate's own ratio is below the acceptable one, `past` that it is beyond the stable's of before the step.
    """

    candidate: Counts = NONE
    stable: Counts = NONE
    worse: Bet = field(default_factory=Bet)
    no_worse: Bet = field(default_factory=Bet)
    low: Bet = field(default_factory=Bet)
    past: Bet = field(default_factory=Bet)

    @property
    def proof(self) -> float:
        """The evidence that the candidate may be promoted. A version that must not be is at the margin or beyond it
        and has too many bad answers, so the mean of what speaks against the one and the other is evidence, too."""
        return (self.no_worse.value + self.low.value) / 2

    def seen(
        self, candidate: Counts | None, stable: Counts | None, comparison: Comparison, past: float | None = None
    ) -> "Trial":
        """The trial after a window. `past`: the ratio of the stable that no candidate may exceed, where it is alone."""
        if candidate is None or candidate.of <= 0:
            return self
        acceptable = comparison.acceptable
        low = self.low.steady(ratios_against(candidate.bad, candidate.of, acceptable, _below(acceptable)))
        alone = self.past
        if past is not None and 0 < past < 1:
            beyond = [times_odds(past, factor) for factor in _MORE]
            alone = alone.alert(ratios_against(candidate.bad, candidate.of, past, beyond))
        ours = self.candidate.plus(candidate)
        if stable is None or stable.of <= 0:
            return Trial(ours, self.stable, self.worse, self.no_worse, low, alone)
        worse, no_worse = odds_ratios(
            (candidate.bad, stable.bad), (candidate.of, stable.of), (_harm(comparison), _margin(comparison))
        )
        theirs = self.stable.plus(stable)
        if not worse:
            return Trial(ours, theirs, self.worse, self.no_worse, low, alone)
        return Trial(ours, theirs, self.worse.alert(worse), self.no_worse.steady(no_worse), low, alone)

    def paired(self, only_stable: int, only_shadow: int) -> "Trial":
        """The trial after labelled pairs of which just one was right: if the two are equally good, each is in half of
        them (McNemar's test, one window after the other)."""
        pairs = only_stable + only_shadow
        if pairs == 0:
            return self
        return replace(
            self,
            candidate=self.candidate.plus(Counts(only_stable, pairs)),
            stable=self.stable.plus(Counts(only_shadow, pairs)),
            worse=self.worse.alert(ratios_against(only_stable, pairs, 0.5, _STABLE_RIGHT)),
        )


@lru_cache(maxsize=256)
def _harm(comparison: Comparison) -> tuple[float, tuple[float, ...]]:
    return comparison.tolerated, tuple(comparison.tolerated * factor for factor in _WORSE)


@lru_cache(maxsize=256)
def _margin(comparison: Comparison) -> tuple[float, tuple[float, ...]]:
    # Below a margin near 1 there is no room for "no difference"; then it takes a better version to prove anything.
    room = max(comparison.margin, 1.2)
    return comparison.margin, tuple(comparison.margin * room**-power for power in _POWERS)


@lru_cache(maxsize=256)
def _below(ratio: float) -> tuple[float, ...]:
    return tuple(ratio * factor for factor in _LESS)


# --- what is counted --------------------------------------------------------------------------------------------------


def kinds(policy: Policy) -> dict[str, Comparison]:
    """Every kind of bad answer that a version is judged by, and how."""
    judge = policy.judge
    counters = {f"counter_{name}": comparison for name, comparison in sorted(policy.counters.items())}
    return {ERRORS: judge.errors, REFUSED: judge.refused, SLOW_P95: judge.slow, SLOW_P99: judge.slow, **counters}


def proves(kind: str) -> bool:
    """Whether promotion asks for proof of this kind: what is beyond the 95th percentile proves latency well enough, and
    how often callers ask wrongly is their own affair as long as it is no more than with the stable."""
    return kind not in (SLOW_P99, REFUSED)


def level(policy: Policy) -> float:
    """The part of alpha that each test for harm may spend (Bonferroni).

    Each kind is tested beside the stable and, where the version bakes, against the past; a shadow by its failures and
    by its labels.
    """
    tests = len(kinds(policy)) * (1 if policy.strategy is Strategy.IMMEDIATE else 2)
    return policy.judge.alpha / (tests + (2 if policy.strategy is Strategy.SHADOW else 0))


def judged(tally: Tally) -> int:
    """The requests a version can be blamed for: those that were not shed."""
    return tally.ok + tally.client_errors + tally.errors


def slow_above(p_bucket: int, judge: Judging) -> int:
    """The bucket above which an answer is slow."""
    return bucket_of(milliseconds_of(p_bucket) / 1e3 * (1 + judge.slack))


def heads(window: VersionWindow, policy: Policy) -> Tally:
    """Who is counted: with sticky users the users, because the requests of one hang together, and the user is what was
    chosen by chance; else, or where nobody told of users, the requests."""
    return window.users if policy.sticky and window.users is not None else window


def counted(kind: str, window: VersionWindow | None, policy: Policy, percentile: int | None) -> Counts | None:
    """The window's bad answers of this kind; `percentile` is the bucket that slow is measured by. None: not known."""
    if window is None:
        return None
    if kind.startswith("counter_"):
        # Occurrences of one request cannot be told from those of many: a request counts at most once.
        requests = judged(window)
        return Counts(min(window.counters.get(kind.removeprefix("counter_"), 0), requests), requests)
    tally = heads(window, policy)
    if kind == ERRORS:
        return Counts(tally.errors, judged(tally))
    if kind == REFUSED:
        # A user who asks wrongly goes on doing so: where users stay on a version, that is no version's doing.
        return None if policy.sticky else Counts(tally.client_errors, judged(tally))
    if percentile is None:
        return None
    return Counts(count_above(tally.latency, slow_above(percentile, policy.judge)), sum(tally.latency.values()))


def past_limit(before: Counts, comparison: Comparison, part: float) -> float | None:
    """The ratio of bad answers that a candidate without a stable beside it must not exceed: the most the stable's may
    truly have been, moved by DRIFT. None: too little is known of the past."""
    limit = times_odds(highest_ratio(before.bad, before.of, part / 2), DRIFT * comparison.tolerated)
    return limit if 0 < limit < 0.95 else None


# --- in words ---------------------------------------------------------------------------------------------------------


def harm(name: str, trial: Trial, part: float) -> Gate:
    """Passed as long as there is no proof of harm. Waiting when the evidence is not a number, so nothing goes on."""
    needed, needed_past = 1 / part, 2 / part
    crossed = trial.worse.peak >= log(needed) or trial.past.peak >= log(needed_past)
    fine = trial.worse.peak < log(needed) and trial.past.peak < log(needed_past)
    candidate, stable = trial.candidate, trial.stable
    numbers = {
        "evidence": trial.worse.highest,
        "needed": needed,
        "candidate_bad": float(candidate.bad),
        "candidate_of": float(candidate.of),
        "stable_bad": float(stable.bad),
        "stable_of": float(stable.of),
    }
    if trial.past.windows:
        numbers |= {"evidence_against_past": trial.past.highest, "needed_against_past": needed_past}
    words = _words(name)
    if crossed:
        beside = f"the stable's {stable.bad} of {stable.of}" if trial.worse.peak >= log(needed) else "the time before"
        detail = f"{words}: worse than the stable, {candidate.bad} of {candidate.of} against {beside}"
        return Gate(name=name, state=GateState.FAILED, detail=detail, numbers=finite(numbers))
    if fine and trial.worse.value >= needed**0.5:
        # Half of the way to proof, in the logarithm: nothing grows meanwhile, and if it was chance it goes by itself.
        detail = f"{words}: look worse than the stable's, {candidate.bad} of {candidate.of}; waits until that is clear"
        return Gate(name=name, state=GateState.WAITING, detail=detail, numbers=finite(numbers))
    if fine:
        return Gate(name=name, state=GateState.PASSED, detail=f"{words}: no proof of harm", numbers=finite(numbers))
    return Gate(name=name, state=GateState.WAITING, detail=f"{words}: the evidence is not a number")


def proof(name: str, trial: Trial, beta: float) -> Gate:
    """Passed once the candidate is proven to be no worse than the margin, or to have few bad answers at all."""
    passed = trial.proof >= 1 / beta
    numbers = {"evidence": trial.proof, "needed": 1 / beta, "no_worse": trial.no_worse.value, "low": trial.low.value}
    detail = (
        f"{_words(name)}: proven to be no worse" if passed else f"waits for proof that it is no worse: {_words(name)}"
    )
    state = GateState.PASSED if passed else GateState.WAITING
    return Gate(name=f"proof_{name}", state=state, detail=detail, numbers=finite(numbers))


def finite(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers that JSON has a form for."""
    return {key: value for key, value in numbers.items() if -inf < value < inf}


def _words(name: str) -> str:
    words = {
        ERRORS: "errors",
        REFUSED: "requests refused as the caller's mistake",
        SLOW_P95: "answers slower than the stable's 95th percentile",
        SLOW_P99: "answers slower than the stable's 99th percentile",
        SHADOW_ERRORS: "failed answers to copies",
        SHADOW_LABELS: "wrong answers to labelled copies",
    }
    return words.get(name, name.removeprefix("counter_"))
