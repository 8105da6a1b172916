"""Segments without an engine: whatever comes between them, a sample is whole, its spans tile."""

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.vocabulary import Completion, VersionSpan, WeightVersion
from paceline.rollout.segments import SegmentRequest, continuation_seed
from tests.rollout.conftest import assert_spans_tile, make_request


class FakeEngine:
    """Samples, as token and as log-probability, the version that samples: truth is in the token."""

    def __init__(self, request, version):
        self.active, self.version = SegmentRequest(request), version
        self.tokens = {index: [] for index in self.active.open_samples}
        self.limits = {index: self.active.task(index).max_tokens for index in self.tokens}

    def step(self, stops):
        for index in self.active.open_samples:
            tokens = self.tokens[index]
            tokens.append(self.version)
            if index in stops:
                self.close(index, "stop")
            elif len(tokens) == self.limits[index]:
                self.close(index, "length")

    def abort(self):
        for index in self.active.open_samples:
            self.close(index, "abort")
        return self.active.result().completions

    def close(self, index, reason):
        tokens = np.array(self.tokens[index], dtype=np.int32)
        starts = [0, *(np.flatnonzero(np.diff(tokens)) + 1).tolist(), len(tokens)]
        spans = tuple(
            VersionSpan(WeightVersion(int(tokens[start])), start, end)
            for start, end in itertools.pairwise(starts)
            if end > start
        )
        new = Completion(tokens, -tokens.astype(np.float32), spans, reason)
        self.active.close_sample(index, new)


engine_events = st.lists(
    st.one_of(st.just("swap"), st.just("abort"), st.sets(st.integers(0, 2), max_size=1)),
    max_size=25,
)


@given(engine_events, st.integers(1, 12), st.integers(0, 4))
def test_spans_tile_and_name_who_sampled_each_token_whatever_happens(events, max_tokens, segment):
    request = make_request("r", num_samples=3, max_tokens=max_tokens, segment_tokens=segment)
    engine = FakeEngine(request, version=0)
    completions = ()
    for event in events:
        if event == "swap":
            engine.version += 1
        elif event != "abort":
            engine.step(stops=event)
        if event == "abort" or engine.active.is_finished:
            before, completions = completions, engine.abort()
            for earlier, whole in zip(before, completions, strict=bool(before)):
                grown = len(whole.token_ids) - len(earlier.token_ids)
                assert 0 <= grown <= (segment or max_tokens)
                assert whole.token_ids[: len(earlier.token_ids)].tolist() == list(earlier.token_ids)
                if earlier.is_finished:
                    assert whole is earlier
            engine = FakeEngine(replace(request, partial=completions), engine.version)
    for completion in engine.abort():
        assert_spans_tile(completion)
        assert len(completion.token_ids) <= max_tokens
        assert (completion.logprobs == -completion.token_ids).all()
        for span in completion.versions:
            assert set(completion.token_ids[span.start : span.end].tolist()) == {span.version}
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == max_tokens
        elif completion.finish_reason != "stop":
            assert len(completion.token_ids) < max_tokens


def test_a_sample_without_budget_left_is_finished_however_it_ended():
    """A resumed run may have a smaller max_tokens than the run that sampled the partial."""
    engine = FakeEngine(make_request("r", num_samples=3, max_tokens=8), version=0)
    for _ in range(5):
        engine.step(stops=())
    active = SegmentRequest(make_request("r", num_samples=3, max_tokens=4, partial=engine.abort()))
    assert active.is_finished
    assert {c.finish_reason for c in active.result().completions} == {"length"}


def test_no_segment_of_a_sample_draws_from_a_stream_that_another_drew_from():
    seeds = {
        continuation_seed(1000 + sample, tokens) for sample in range(16) for tokens in range(64)
    }
    assert len(seeds) == 16 * 64
    assert continuation_seed(1003, 0) == 1003
