"""The proposer as vLLM calls it: whose words, how long, of what source, and what it counts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from paceline.configs.schema.rollout import DraftingConfig
from paceline.configs.vocabulary import DRAFTED_FROM_HISTORY, DRAFTED_FROM_SIBLINGS, DraftText
from paceline.spec.budget.cost_model import Prediction, StepCosts
from paceline.spec.draft_text import problem_name
from paceline.spec.noise import gumbel, position_streams
from paceline.spec.proposer import DraftRequest, SuffixProposer

ONE, TWO = (1, 2), (3,)
STOP = 99


class Batch:
    """An engine's batch without the engine: rows of text that grow as they are told."""

    def __init__(self, max_tokens=3, budget="none"):
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(num_speculative_tokens=max_tokens),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=8),
        )
        self.proposer = SuffixProposer(config)
        self.texts = {}
        self.proposer.attach(DraftingConfig(budget=budget), lambda: list(self.texts))
        self.proposer.serve(5)

    def begin(self, name, prompt, context=(), max_tokens=20, seed=None):
        self.texts[name] = [*prompt, *context]
        row = tuple(self.texts[name])
        request = DraftRequest(prompt, row, max_tokens, frozenset({STOP}), seed)
        self.proposer.begin(name, request)

    def step(self, **sampled):
        """One step that gave the named rows these tokens; drafts by name."""
        for name, tokens in sampled.items():
            self.texts[name] += tokens
        table = np.zeros((len(self.texts), 64), dtype=np.int32)
        for row, text in enumerate(self.texts.values()):
            table[row, : len(text)] = text
        lengths = np.array([len(text) for text in self.texts.values()], dtype=np.int32)
        new = [sampled.get(name, []) for name in self.texts]
        drafts = self.proposer.propose(new, lengths, table)
        self.proposer.step_took(0.01)
        return dict(zip(self.texts, drafts or [[] for _ in self.texts], strict=True))

    def finish(self, name, *tokens):
        del self.texts[name]
        ids = np.array(tokens, dtype=np.int32)
        return self.proposer.finish(name, ids, by_itself=True).tolist()


def given(prompt, *tokens, version=-1):
    return DraftText(prompt, version, np.array(tokens, dtype=np.int32))


def test_a_draft_continues_what_samples_of_the_same_prompt_said():
    batch = Batch()
    batch.proposer.add_draft_text([given(ONE, 7, 8, 9, 10, 11)])
    batch.begin("a", ONE)
    batch.begin("b", TWO)
    assert batch.step(a=[8], b=[8]) == {"a": [9, 10, 11], "b": []}


def test_a_draft_continues_what_a_sibling_is_saying():
    batch = Batch()
    batch.begin("a", ONE)
    batch.begin("b", ONE)
    batch.step(a=[7])
    batch.step(a=[8])
    batch.step(a=[9])
    assert batch.step(b=[7]) == {"a": [], "b": [8, 9]}


def test_a_sample_that_was_begun_elsewhere_is_matched_by_what_it_had():
    batch = Batch()
    batch.proposer.add_draft_text([given(ONE, 6, 7, 8, 9), given(ONE, 5, 7, 3, 3)])
    batch.begin("a", ONE, context=[5])
    assert batch.step(a=[7]) == {"a": [3, 3]}


def test_drafts_end_where_the_sample_must():
    batch = Batch()
    batch.proposer.add_draft_text([given(ONE, *range(7, 20))])
    batch.begin("a", ONE, max_tokens=4)
    assert batch.step(a=[7]) == {"a": [8, 9]}, "the verifier adds the fourth"
    assert batch.step(a=[8, 9]) == {"a": []}
    assert batch.step(a=[10]) == {"a": []}


def test_a_row_that_still_reads_its_prompt_gets_none():
    batch = Batch()
    batch.proposer.add_draft_text([given(ONE, 7, 8, 9)])
    batch.begin("a", ONE)
    batch.begin("b", ONE)
    assert batch.step(b=[7]) == {"a": [], "b": [8, 9]}


def test_what_was_accepted_after_a_stop_token_is_not_learned_and_nothing_follows_it():
    batch = Batch()
    batch.begin("a", ONE)
    batch.step(a=[7])
    assert batch.step(a=[STOP, 8, 9]) == {"a": []}
    batch.finish("a", 7, STOP)
    (tokens,) = batch.proposer.history.sequences(problem_name(ONE), 5)
    assert tokens.tolist() == [*ONE, 7, STOP]


def test_tokens_after_a_switch_are_of_the_new_version_with_a_little_before_it():
    batch = Batch()
    batch.begin("a", ONE)
    batch.step(a=[7])
    batch.step(a=[8])
    batch.proposer.serve(6)
    batch.step(a=[9])
    history, problem = batch.proposer.history, problem_name(ONE)
    assert [t.tolist() for t in history.sequences(problem, 5)] == [[*ONE, 7, 8]]
    assert [t.tolist() for t in history.sequences(problem, 6)] == [[*ONE, 7, 8, 9]]


@pytest.mark.parametrize(
    ("version", "source", "name"),
    [(5, DRAFTED_FROM_SIBLINGS, "siblings"), (4, DRAFTED_FROM_HISTORY, "history")],
)
def test_accepted_tokens_are_known_by_position_and_source(version, source, name):
    batch = Batch()
    batch.proposer.add_draft_text([given(ONE, 7, 8, 9, 10, version=version)])
    batch.begin("a", ONE, context=[6])
    batch.begin("b", TWO)
    batch.step(a=[7], b=[7])
    batch.step(a=[8, 9, 4], b=[8])  # two of three were accepted
    assert batch.finish("a", 7, 8, 9, 4) == [0, source, source, 0]
    assert batch.finish("b", 7, 8) == [0, 0]
    counters = vars(batch.proposer.counters)
    assert (counters[f"num_drafted_{name}"], counters[f"num_accepted_{name}"]) == (3, 2)
    assert counters["num_rounds"] == 1


def test_accepted_tokens_beyond_the_end_of_a_sample_have_no_place_in_it():
    batch = Batch()
    batch.proposer.add_draft_text([given(ONE, 7, STOP, 9, 10, version=5)])
    batch.begin("a", ONE)
    batch.step(a=[7])
    batch.step(a=[STOP, 9, 4])
    assert batch.finish("a", 7, STOP) == [0, DRAFTED_FROM_SIBLINGS]


def test_a_budget_learns_from_steps_that_only_decoded():
    batch = Batch(budget="throughput")
    batch.proposer.add_draft_text([given(ONE, *range(7, 60))])
    batch.begin("a", ONE, max_tokens=50)
    drafted = 0
    for token in range(7, 40):
        drafted += len(batch.step(a=[token])["a"])
    costs = batch.proposer._planner.costs
    assert costs.is_started and costs.predict(1, 1).seconds == pytest.approx(0.01, rel=0.1)
    assert drafted > 0, "drafts are tried"
    assert batch.proposer.counters.num_draft_steps == 33


def test_memory_is_given_back_when_samples_end():
    batch = Batch()
    for index in range(50):
        batch.begin(str(index), ONE)
        batch.step(**{str(index): [7]})
        batch.finish(str(index), 7)
    assert batch.proposer._reader.num_requests == 0 and not batch.proposer._live


def test_under_coupled_sampling_drafts_are_guessed_with_the_noise_of_their_places():
    """Of two continuations equally often seen, the noise decides; without it the smaller token."""
    seeds = range(40)

    def first_guesses(seed_of):
        batch = Batch(max_tokens=1)
        batch.proposer.add_draft_text([given(ONE, 7, token) for token in (8, 9)])
        for seed in seeds:
            batch.begin(str(seed), ONE, seed=seed_of(seed))
        drafts = batch.step(**{str(seed): [7] for seed in seeds})
        return [drafts[str(seed)][0] for seed in seeds]

    assert set(first_guesses(lambda seed: None)) == {8}
    coupled = first_guesses(lambda seed: seed)
    places = position_streams(np.array(seeds), np.full(len(seeds), len(ONE) + 1))
    noise = gumbel(places[:, None], np.array([[8, 9]]))
    assert coupled == (8 + noise.argmax(axis=1)).tolist()


def test_what_was_sampled_while_nobody_asked_is_learned_when_somebody_does_or_at_the_end():
    batch = Batch(budget="throughput")
    batch.proposer._planner.wants_drafts = lambda: False
    batch.begin("a", ONE)
    batch.begin("b", ONE)
    for token in (7, 8, 9):
        assert batch.step(a=[token], b=[token]) == {"a": [], "b": []}
    assert batch.proposer.history.num_tokens == 0
    batch.finish("a", 7, 8, 9)
    (tokens,) = batch.proposer.history.sequences(problem_name(ONE), 5)
    assert tokens.tolist() == [*ONE, 7, 8, 9]
    batch.proposer.serve(6)
    batch.proposer._planner.wants_drafts = lambda: True
    batch.step(b=[4])
    (tokens,) = batch.proposer.history.sequences(problem_name(ONE), 6)
    assert tokens.tolist() == [*ONE, 7, 8, 9, 4]


@pytest.mark.parametrize("budget", ["none", "throughput"])
def test_drafts_of_a_sample_that_was_preempted_count_for_nothing(budget):
    batch = Batch(budget=budget)
    prompts = [(20 + row,) for row in range(6)]
    planner = batch.proposer._planner
    if planner is not None:  # as if it were known to pay
        planner.costs.costs = lambda num_requests, drafted: StepCosts(1.0, 0.001)
        planner.costs.predict = lambda num_tokens, num_requests: Prediction(1.0, 0.0)
    for prompt in prompts:
        batch.proposer.add_draft_text([given(prompt, *range(7, 40))])
        batch.begin(f"of {prompt[0]}", prompt)
    names = list(batch.texts)
    for token in (7, 8, 9):
        drafts = batch.step(**{name: [token] for name in names})
    assert drafts[names[5]], "the sixth row is drafted for"
    gone = batch.texts.pop(names[5])
    del batch.texts[names[4]], batch.texts[names[3]]
    batch.step(**{name: [10] for name in names[:3]})
    batch.texts[names[5]] = gone
    counted = batch.proposer.counters.num_accepted_history
    batch.step(**{name: [11] for name in (*names[:3], names[5])})
    assert batch.proposer.counters.num_accepted_history == counted
    assert batch.finish(names[5], 7, 8, 9, 11) == [0, 0, 0, 0]


def test_drafts_of_a_sample_that_waited_a_step_count_when_they_hold():
    batch = Batch()
    batch.proposer.add_draft_text([given(ONE, *range(7, 40))])
    batch.begin("a", ONE)
    batch.begin("b", ONE)
    assert batch.step(a=[7], b=[7])["b"] == [8, 9, 10]
    waiting = batch.texts.pop("b")
    batch.step(a=[8, 9, 10, 11])
    batch.texts["b"] = waiting
    batch.step(a=[12], b=[8, 9, 10, 11])
    source = DRAFTED_FROM_HISTORY
    assert batch.finish("b", 7, 8, 9, 10, 11) == [0, source, source, source, 0]
