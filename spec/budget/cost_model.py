"""Cost model of engine steps, fitted while the engine runs: t = c_base + c_tok·n (pure).

n is the number of tokens that a decoding step forwards: one for each live request, and its draft.
DAS (arXiv 2511.13841) models its steps so; measured on vLLM (56.6M parameters, CPU, batches of 4
and more) they take about 9 ms and 0.55 ms a token.

Each bucket of batch sizes has a line of its own, and steps with drafts another than plain ones:
what drafting costs beside its tokens (proposing, rejection sampling) is then part of the ``base``
of drafted steps, and whether drafting pays is a comparison of two measured lines.

A line is recursive least squares in information form, on relative residuals (a step twice as long
is twice as noisy) with exponential forgetting:

    minimise Σ_s λ^age(s) w_s ((t_s - c_base - c_tok·n_s) / t̂_s)²,   c_base, c_tok >= 0

w_s is Huber's weight, 1 within 1.5 standard deviations and falling as 1/|residual| beyond: a
compilation or a weight update that hit a step hardly moves the line. All steps together make a
pooled line, which counts as one observation more in each bucket: a bucket that saw one n only takes
its slope from there. Plain steps are pooled by themselves: a sequence's own token may cost three
times what a drafted one does (where Python is the cost), and what plain steps would take is asked
most where hardly any are made.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

WARM_UP_STEPS = 8
"""Steps that a line collects for its first fit, which is robust to outliers."""
MEMORY_STEPS = 256
"""Steps after which an observation has a weight of 1/e."""
POOL_WEIGHT = 1.0
"""Number of a bucket's observations that the pooled line counts as."""
HUBER_BOUND = 1.5
"""Standard deviations beyond which a residual counts less."""
SCALE_RATE = 0.05
"""Share by which one residual moves the estimate of their spread."""
LEAST_SCALE = 0.005
"""Least relative noise; with 0 every other residual would be an outlier."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step: ``base`` + ``token`` · n."""

    base: float
    token: float

    def seconds(self, num_tokens: float) -> float:
        """Return the seconds of a step that forwards ``num_tokens`` tokens."""
        return self.base + self.token * num_tokens


@dataclass(frozen=True)
class Prediction:
    """Expected seconds of a step and the standard error of that expectation."""

    seconds: float
    standard_error: float

    @property
    def confidence(self) -> float:
        """1 / (1 + relative standard error): from 0 (unknown) to 1 (exact)."""
        return self.seconds / (self.seconds + self.standard_error)


@dataclass
class _Moments:
    """Weighted sums over steps of 1, n, n², t and n·t, which determine the least-squares line."""

    one: float = 0.0
    n: float = 0.0
    nn: float = 0.0
    t: float = 0.0
    nt: float = 0.0

    def add(self, other: _Moments, weight: float) -> _Moments:
        return _Moments(
            self.one + weight * other.one,
            self.n + weight * other.n,
            self.nn + weight * other.nn,
            self.t + weight * other.t,
            self.nt + weight * other.nt,
        )

    @property
    def determinant(self) -> float:
        return self.one * self.nn - self.n * self.n

    @property
    def is_singular(self) -> bool:
        """True if only one n was seen, to rounding."""
        return self.determinant <= 1e-9 * self.one * self.nn

    def solve(self) -> StepCosts:
        """Return the non-negative least-squares line.

        Where only one n was seen, the whole time is attributed to the tokens. Drafting then looks
        as expensive as it can be, until probes have shown what tokens cost.
        """
        if self.is_singular:
            return StepCosts(0.0, self.nt / self.nn)
        base = (self.nn * self.t - self.n * self.nt) / self.determinant
        token = (self.one * self.nt - self.n * self.t) / self.determinant
        if base < 0:
            return StepCosts(0.0, self.nt / self.nn)
        if token < 0:
            return StepCosts(self.t / self.one, 0.0)
        return StepCosts(base, token)

    def variance(self, num_tokens: float) -> float:
        """Return (1, n) G^-1 (1, n)ᵀ with the information matrix G; infinite if G is singular."""
        if self.is_singular:
            at_seen_n = math.isclose(num_tokens * self.one, self.n, rel_tol=1e-6)
            return 1 / self.one if at_seen_n else math.inf
        quadratic = self.nn - 2 * num_tokens * self.n + num_tokens * num_tokens * self.one
        return quadratic / self.determinant


@dataclass
class _Line:
    """A robust line, and the relative spread of its residuals."""

    moments: _Moments = field(default_factory=_Moments)
    num_steps: float = 0.0
    scale: float = 0.0
    waiting: list[tuple[int, float]] = field(default_factory=list)

    @property
    def is_started(self) -> bool:
        return self.moments.one > 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        if self.is_started:
            self._absorb(num_tokens, seconds, self.moments.solve())
            return
        self.waiting.append((num_tokens, seconds))
        if len(self.waiting) == WARM_UP_STEPS:
            self._start()

    def _start(self) -> None:
        line = _theil_sen(self.waiting)
        residuals = [abs(t / line.seconds(n) - 1) for n, t in self.waiting]
        self.scale = max(LEAST_SCALE, 1.4826 * statistics.median(residuals))
        for num_tokens, seconds in self.waiting:
            self._absorb(num_tokens, seconds, line)
        self.waiting.clear()

    def _absorb(self, num_tokens: int, seconds: float, line: StepCosts) -> None:
        expected = max(line.seconds(num_tokens), 1e-9)
        residual = abs(seconds / expected - 1)
        bound = HUBER_BOUND * self.scale
        weight = min(1.0, bound / residual) if residual > 0 else 1.0
        # √(π/2) times the mean absolute value of normal noise is its standard deviation.
        spread = math.sqrt(math.pi / 2) * min(residual, bound)
        self.scale = max(LEAST_SCALE, self.scale + SCALE_RATE * (spread - self.scale))
        step = _Moments(1.0, num_tokens, num_tokens**2, seconds, num_tokens * seconds)
        keep = math.exp(-1 / MEMORY_STEPS)
        self.num_steps = keep * self.num_steps + weight
        self.moments = _Moments().add(self.moments, keep).add(step, weight / expected**2)


def _theil_sen(steps: list[tuple[int, float]]) -> StepCosts:
    """Fit a line by medians of slopes and intercepts (Theil 1950; Sen 1968).

    It is robust to outliers up to about a quarter of the steps.
    """
    slopes = [(t - s) / (n - m) for n, t in steps for m, s in steps if n > m]
    slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
    base = statistics.median(t - slope * n for n, t in steps)
    if base > 0:
        return StepCosts(base, slope)
    return StepCosts(0.0, statistics.median(t / n for n, t in steps))


def batch_bucket(num_requests: int) -> int:
    """Return the bucket, from 0: batches of 1, of 2, of 3-4, of 5-8, … share one."""
    return (num_requests - 1).bit_length()


@dataclass
class CostModel:
    """Seconds of engine steps by bucket of the batch, drafted and plain; observed step by step."""

    _all: _Line = field(default_factory=_Line)
    _plain: _Line = field(default_factory=_Line)
    _lines: dict[tuple[int, bool], _Line] = field(default_factory=dict)

    def observe(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """Add one step that only decoded: prefills are not part of the model.

        ``num_tokens`` are all tokens it forwarded: one for each request, and the drafts.
        """
        assert num_tokens >= num_requests > 0 and seconds > 0, (num_tokens, num_requests, seconds)
        drafted = num_tokens > num_requests
        key = (batch_bucket(num_requests), drafted)
        self._lines.setdefault(key, _Line()).observe(num_tokens, seconds)
        self._all.observe(num_tokens, seconds)
        if not drafted:
            self._plain.observe(num_tokens, seconds)

    @property
    def is_started(self) -> bool:
        """True once enough steps were seen for any prediction."""
        return self._all.is_started

    def costs(self, num_requests: int, drafted: bool) -> StepCosts | None:
        """Return the line for steps of ``num_requests`` requests; None before the first steps."""
        return self._moments(num_requests, drafted).solve() if self.is_started else None

    def predict(self, num_tokens: int, num_requests: int) -> Prediction | None:
        """Predict the seconds of a step of ``num_tokens`` tokens for ``num_requests`` requests."""
        if not self.is_started:
            return None
        drafted = num_tokens > num_requests
        moments = self._moments(num_requests, drafted)
        pool = self._pool(drafted)
        line = self._lines.get((batch_bucket(num_requests), drafted), pool)
        scale = line.scale if line.is_started else pool.scale
        error = scale * math.sqrt(moments.variance(num_tokens))
        return Prediction(moments.solve().seconds(num_tokens), error)

    def _moments(self, num_requests: int, drafted: bool) -> _Moments:
        """Return the sums of a bucket's line and the pooled one; of the pool if it has no line."""
        pool = self._pool(drafted)
        line = self._lines.get((batch_bucket(num_requests), drafted))
        if line is None or not line.is_started:
            return pool.moments
        return line.moments.add(pool.moments, POOL_WEIGHT / pool.num_steps)

    def _pool(self, drafted: bool) -> _Line:
        return self._all if drafted or not self._plain.is_started else self._plain
