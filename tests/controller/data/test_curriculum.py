"""The curriculum: which prompts are passed over, and that nothing else about the feed changes."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from paceline.configs.errors import ConfigError
from paceline.configs.load import load_config
from paceline.configs.schema.data import CurriculumConfig, PromptFormat
from paceline.configs.vocabulary import Prompt, Record, StepReport, WeightVersion
from paceline.controller.data.curriculum import Curriculum, Estimate, Outcome, difficulty
from paceline.controller.data.feed import PromptFeed, PromptSet
from paceline.controller.data.rendering import PromptRenderer
from paceline.controller.data.tokenizer import characters_tokenizer
from paceline.controller.groups.assembly import Collector
from paceline.controller.groups.buffer import WorkBuffer
from paceline.controller.groups.freshness import FreshnessBudget
from paceline.controller.groups.signal_filter import SignalFilter
from paceline.controller.ledger.journal import Journal
from paceline.controller.ledger.memory import MemoryStore
from paceline.controller.ledger.state import Batch, LedgerState
from paceline.controller.parts import StepView
from paceline.controller.run.metering import RunTotals
from paceline.controller.run.phases import TrainingObserver
from paceline.controller.run.recovery import recover
from tests.controller.builders import make_group, make_prompt
from tests.controller.run.test_recovery import SurvivingStore, state_at

TOKENIZER = characters_tokenizer()
NUM_ROWS = 20


@dataclass
class Rows:
    """A data set whose rows come again each epoch under their own id, or a task without end."""

    num_records: int | None = NUM_ROWS

    def record(self, index: int) -> Record:
        row = index if self.num_records is None else index % self.num_records
        return Record(f"row/{row}", {"question": "x" * (row % 7 + 1) + str(row), "level": row % 5})


def prompt_set(
    num_records: int | None = NUM_ROWS, seed: int = 0, **curriculum: object
) -> PromptSet:
    config = CurriculumConfig.model_validate(curriculum) if curriculum else None
    renderer = PromptRenderer(PromptFormat(), TOKENIZER, max_length=64, max_tokens=16)
    return PromptSet(Rows(num_records), renderer, 2, curriculum=config, seed=seed)


def make_feed(
    num_records: int | None = NUM_ROWS, seed: int = 0, **curriculum: object
) -> PromptFeed:
    return prompt_set(num_records, seed, **curriculum).feed()


def draw(feed: PromptFeed, count: int) -> list[tuple[int, Prompt]]:
    return list(itertools.islice(feed, count))


def keys() -> st.SearchStrategy[str]:
    return st.sampled_from(["prompt", "prompt_length", "level"])


rewards = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=8, max_size=8)
story = st.lists(st.tuples(st.integers(1, 8), rewards), max_size=8)
"""How many prompts are drawn, and how each goes, again and again."""


def tell(feed: PromptFeed, story: list[tuple[int, list[float]]]) -> list[tuple[int, Prompt]]:
    """Live through a story; all that was drawn."""
    drawn = []
    for count, outcomes in story:
        now = draw(feed, count)
        feed.observe(Outcome(prompt, r) for (_, prompt), r in zip(now, outcomes, strict=False))
        drawn += now
    return drawn


def test_without_a_curriculum_the_feed_is_what_it_was() -> None:
    feed = make_feed()
    assert feed.observe([Outcome(make_prompt(0), 1.0)]) == {}
    expected = [i for i in range(2, 100) if i % NUM_ROWS >= 2]
    assert [position for position, _ in draw(feed, len(expected))] == expected
    assert feed.state().keys() == {"position", "kept_apart"}


@given(keys(), st.integers(0, 60))
@settings(max_examples=20, deadline=None)
def test_where_nothing_is_known_everything_is_admitted(key: str, count: int) -> None:
    assert draw(make_feed(key=key, keep_outside=0), count) == draw(make_feed(), count)


@given(keys(), story, story)
@settings(max_examples=60, deadline=None)
def test_a_restored_feed_decides_as_the_other_would_have(
    key: str, before: list, after: list
) -> None:
    feed, resumed = make_feed(key=key), make_feed(key=key)
    tell(feed, before)
    resumed.restore(json.loads(json.dumps(feed.state())))
    assert tell(resumed, after) == tell(feed, after)
    assert resumed.state() == feed.state()


@given(keys(), story, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_same_outcomes_give_the_same_prompts_and_positions_stay_pure(
    key: str, told: list, seed: int
) -> None:
    drawn = tell(make_feed(seed=seed, key=key), told)
    assert drawn == tell(make_feed(seed=seed, key=key), told)
    plain = make_feed()
    assert drawn == [(position, plain.at(position)) for position, _ in drawn]
    positions = [position for position, _ in drawn]
    assert positions == sorted(set(positions))


@given(keys(), story, st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_no_more_than_max_passed_prompts_are_passed_over_in_a_row(
    key: str, told: list, max_passed: int
) -> None:
    feed = make_feed(key=key, keep_outside=0, max_passed=max_passed)
    positions = [position for position, _ in tell(feed, [*told, (40, [])])]
    allowed = [i for i in range(positions[-1] + 1) if i % NUM_ROWS >= 2]
    admitted = [allowed.index(position) for position in positions]
    assert all(b - a - 1 <= max_passed for a, b in itertools.pairwise([-1, *admitted]))


def test_where_all_is_mastered_every_so_many_th_is_sampled_still() -> None:
    feed = make_feed(keep_outside=0, max_passed=30)
    feed.observe(Outcome(prompt, 1.0) for _, prompt in draw(make_feed(), NUM_ROWS - 2))
    start = feed.position
    positions = [position for position, _ in draw(feed, 9)]
    allowed = [i for i in range(start, positions[-1] + 1) if i % NUM_ROWS >= 2]
    assert positions == allowed[30::31]


def test_prompts_out_of_the_target_are_kept_with_the_probability_asked_for() -> None:
    feed = make_feed(keep_outside=0.2, max_passed=1000)
    feed.observe(Outcome(prompt, 0.0) for _, prompt in draw(make_feed(), NUM_ROWS - 2))
    first = feed.position
    num_kept = 1000
    draw(feed, num_kept)
    looked_at = (feed.position - first) * (NUM_ROWS - 2) / NUM_ROWS
    assert num_kept / looked_at == pytest.approx(0.2, abs=0.02)


def test_a_mastered_row_is_passed_over_in_the_next_epoch_and_a_hard_one_comes_again() -> None:
    feed = make_feed(keep_outside=0)
    epoch = draw(feed, NUM_ROWS - 2)
    feed.observe(Outcome(prompt, 1.0 if int(prompt.id[4:]) < 12 else 0.5) for _, prompt in epoch)
    assert [prompt.id for _, prompt in draw(feed, 8)] == [f"row/{row}" for row in range(12, 20)]


def test_difficulties_are_counted_by_prompt_length_or_field() -> None:
    prompt = Prompt("row/3", "", tuple(range(17)), None, {"level": 4})
    found = {
        "prompt": difficulty(CurriculumConfig(key="prompt"), prompt),
        "length": difficulty(CurriculumConfig(key="prompt_length", length_bucket=5), prompt),
        "field": difficulty(CurriculumConfig(key="level"), prompt),
        "absent": difficulty(CurriculumConfig(key="grade"), prompt),
    }
    assert found == {"prompt": "row/3", "length": "3", "field": "4", "absent": "None"}


def test_an_estimate_is_the_mean_of_the_first_groups_and_follows_later_ones() -> None:
    estimate, means = Estimate(), []
    for reward in (1.0, 0.0, 0.5, 1.0, 1.0):
        estimate.observe(reward, newest_weight=0.25)
        means.append(estimate.mean)
    assert means == pytest.approx([1.0, 0.5, 0.5, 0.625, 0.71875])
    assert estimate.count == 5


def test_too_few_groups_are_no_knowledge() -> None:
    curriculum = Curriculum(CurriculumConfig(min_groups=3, keep_outside=0), seed=0)
    admitted = []
    for _ in range(4):
        admitted.append(curriculum.admits(0, make_prompt(0), 0))
        curriculum.observe([Outcome(make_prompt(0), 0.0)])
    assert admitted == [True, True, True, False]


def test_both_ends_of_the_target_belong_to_it() -> None:
    curriculum = Curriculum(CurriculumConfig(target=(0.25, 0.75), keep_outside=0), seed=0)
    found = (0.2, 0.25, 0.75, 0.8)
    curriculum.observe(Outcome(make_prompt(i), reward) for i, reward in enumerate(found))
    assert [curriculum.admits(i, make_prompt(i), 0) for i in range(4)] == [False, True, True, False]


def test_only_so_many_estimates_are_kept_and_the_oldest_observed_is_forgotten() -> None:
    curriculum = Curriculum(CurriculumConfig(max_keys=3), seed=0)
    for index in (0, 1, 2, 0, 3):
        curriculum.observe([Outcome(make_prompt(index), 0.5)])
    assert [key for key, *_ in curriculum.state()] == ["p2", "p0", "p3"]
    restored = Curriculum(CurriculumConfig(max_keys=3), seed=0)
    restored.restore(curriculum.state())
    restored.observe([Outcome(make_prompt(4), 0.5)])
    assert [key for key, *_ in restored.state()] == ["p0", "p3", "p4"]


def test_metrics_tell_what_was_passed_over_and_what_hit_the_target() -> None:
    feed = make_feed(keep_outside=0)
    epoch = draw(feed, NUM_ROWS - 2)
    outcomes = [Outcome(prompt, 1.0 if i < 9 else 0.5) for i, (_, prompt) in enumerate(epoch)]
    first = feed.observe(outcomes)
    draw(feed, 9)
    second = feed.observe([])
    assert first == {"curriculum_passed": 0, "curriculum_on_target": 0.5, "curriculum_known": 18}
    assert second == {"curriculum_passed": 0.5, "curriculum_on_target": 0, "curriculum_known": 18}


def test_a_checkpoint_from_before_there_was_a_curriculum_is_gone_on_from() -> None:
    plain, feed = make_feed(), make_feed(keep_outside=0)
    draw(plain, 5)
    feed.restore(plain.state())
    assert draw(feed, 5) == draw(plain, 5)
    curious = make_feed(keep_outside=0)
    tell(curious, [(5, [1.0] * 5)])
    without = make_feed()
    without.restore(curious.state())
    assert without.position == curious.position


def test_a_key_that_tells_nothing_of_later_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"those of this source never do.*\(level, question\)"):
        prompt_set(None, key="prompt")
    with pytest.raises(ConfigError, match="got 'levle', expected .*: level, question"):
        prompt_set(key="levle")
    with pytest.raises(ValidationError, match="give the lower mean reward first"):
        CurriculumConfig(target=(0.9, 0.1))
    assert draw(make_feed(None, key="level"), 3)


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_where_nothing_is_sampled_a_curriculum_is_refused(recipe: str) -> None:
    with pytest.raises(ConfigError, match=f"goes by the rewards of samples, and {recipe} samples"):
        load_config(recipe, ["data.curriculum.key=prompt_length"])


def simulate(curriculum: dict, num_groups: int = 4000) -> tuple[float, float, float]:
    """A learner that learns only from mixed groups, on problems of five levels.

    Its skill, and the shares of mixed groups in its first and in its last thousand.
    """
    noise, feed, skill = random.Random(0), make_feed(None, **curriculum), 0.0
    was_mixed = []
    for _ in range(num_groups // 16):
        outcomes = []
        for _, prompt in draw(feed, 16):
            chance = 1 / (1 + math.exp(2.0 * (2 * prompt.metadata["level"] - skill)))
            outcomes.append(Outcome(prompt, sum(noise.random() < chance for _ in range(8)) / 8))
        mixed = [0 < outcome.reward < 1 for outcome in outcomes]
        skill += 0.004 * sum(mixed)
        was_mixed += mixed
        feed.observe(outcomes)
    return skill, sum(was_mixed[:1000]) / 1000, sum(was_mixed[-1000:]) / 1000


def test_a_mix_of_easy_and_hard_converges_to_what_can_be_learned_from() -> None:
    plain_skill, plain_first, _ = simulate({})
    skill, first, last = simulate({"key": "level", "target": (0.1, 0.9), "min_groups": 4})
    assert first > 1.5 * plain_first
    assert last > 0.5
    assert skill > 1.3 * plain_skill


def test_the_levels_that_are_sampled_move_up_with_the_learner() -> None:
    feed = make_feed(None, key="level", newest_weight=0.5)
    sampled = []
    for solved in range(5):  # levels below are mastered, those above hopeless
        for _ in range(20):
            now = [prompt for _, prompt in draw(feed, 10)]
            feed.observe(
                Outcome(p, 0.5 if p.metadata["level"] == solved else p.metadata["level"] < solved)
                for p in now
            )
        sampled.append(Counter(p.metadata["level"] for p in now).most_common(1)[0][0])
    assert sampled == [0, 1, 2, 3, 4]


def collect_and_recover(rewards_in_order: list, faulty: int):
    """The batch of a step, and the same one from the ledger after a crash."""

    async def scenario():
        store, budget = SurvivingStore(), FreshnessBudget(4, 1, 2)
        journal = Journal(store, revocable=True)
        buffer = WorkBuffer(budget, journal)
        collector = Collector(buffer, journal, SignalFilter(), 2)
        collecting = asyncio.ensure_future(collector.collect(0))
        for position, found in enumerate(rewards_in_order):
            await buffer.admit(lambda position=position: (position, make_prompt(position)))
            work = await buffer.claim()
            fault = "grader_error" if position == faulty else None
            await buffer.finish(replace(make_group(work.group_id, found), fault=fault))
        batch = await asyncio.wait_for(collecting, 5)
        journal = Journal(store, revocable=True)
        recovered = await recover(journal, state_at(0, 0), make_prompt, fits=True)
        again = Collector(
            WorkBuffer(budget, journal), journal, SignalFilter(), 2, recorded=recovered.batches
        )
        return batch, await again.collect(0)

    return asyncio.run(scenario())


def test_outcomes_of_trained_and_dropped_groups_are_told_and_told_alike_after_a_crash() -> None:
    third = (1 / 3, 1 / 3)
    batch, again = collect_and_recover([third, (0, 1), (0, 0), (1, 1), (0, 0.5)], faulty=2)
    expected = [(0, 1 / 3), (1, 0.5), (3, 1.0), (4, 0.25)]
    assert batch.outcomes == tuple(Outcome(make_prompt(i), reward) for i, reward in expected)
    assert again.outcomes == batch.outcomes
    assert again.dropped == batch.dropped == {"zero_signal": 2, "grader_error": 1}


def test_a_ledger_from_before_rewards_were_kept_is_read_as_it_was() -> None:
    old = {"trained": [1], "held": [], "dropped": {"0": "zero_signal"}}
    batch = Batch.from_detail(0, old)
    assert batch == Batch(0, (1,), (), {0: "zero_signal"}, {})
    whole = LedgerState(batches={0: batch}).as_dict()
    assert whole["batches"] == [[0, (1,), (), {0: "zero_signal"}]]
    assert LedgerState.from_dict(json.loads(json.dumps(whole))).batches == {0: batch}


def test_a_snapshot_of_the_ledger_keeps_the_rewards_of_dropped_groups() -> None:
    batch = Batch(0, (1,), (), {0: "zero_signal"}, {0: 1 / 3})
    whole = json.loads(json.dumps(LedgerState(batches={0: batch}).as_dict()))
    assert LedgerState.from_dict(whole).batches == {0: batch}


class Witness:
    """Recorder, meter and pool of an observer: notes what happens in which order."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def observe(self, outcomes: object) -> dict[str, float]:
        self.events.append(outcomes)
        return {"curriculum_passed": 0.25}

    async def counters(self) -> list:
        self.events.append("waits")
        await asyncio.sleep(0)
        return []

    def measure(self, step: StepView, *_: object) -> dict:
        return dict(step.report.metrics)

    def step(self, record: dict) -> None:
        self.events.append(record)

    def samples(self, *_: object) -> None: ...

    def states(self) -> None: ...

    def workers(self, *_: object) -> None: ...


def test_a_step_is_observed_before_its_slots_can_be_freed_and_its_metrics_are_recorded() -> None:
    batch, _ = collect_and_recover([(0, 1), (0, 1)], faulty=-1)
    witness = Witness()
    observer = TrainingObserver(
        recorder=witness,
        meter=witness,
        totals=RunTotals(),
        pool=witness,
        journal=Journal(MemoryStore()),
        samples_per_step=1,
        metrics=[lambda step: witness.observe(step.batch.outcomes)],
    )
    report = StepReport(WeightVersion(1), 1, 1, 0, 0.0, {"loss": 1.0})
    asyncio.run(observer.after_step(StepView(batch, report, {}, {}, 0, is_last=False)))
    assert witness.events == [batch.outcomes, "waits", {"loss": 1.0, "curriculum_passed": 0.25}]
