from __future__ import annotations

import asyncio
from functools import partial

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.errors import ConfigError
from paceline.configs.vocabulary import Prompt, Record
from paceline.reward.pool import GraderPool
from paceline.reward.reasoning_gym_task import ReasoningGymTaskGrader, ReasoningGymTaskSource

TASKS: list[tuple[str, dict[str, int]]] = [
    ("spell_backward", {"min_word_len": 3, "max_word_len": 10}),
    ("word_sequence_reversal", {"min_words": 2, "max_words": 8}),
    ("chain_sum", {"min_terms": 2, "max_terms": 8, "min_digits": 1, "max_digits": 1}),
]


def as_prompt(record: Record) -> Prompt:
    return Prompt(record.id, "", (), record.reference, record.fields)


@pytest.mark.parametrize(("task", "parameters"), TASKS)
def test_the_gold_answer_gets_one_and_others_zero(task: str, parameters: dict[str, int]) -> None:
    source = ReasoningGymTaskSource(task, parameters, seed=5)
    grader = ReasoningGymTaskGrader(task, parameters, threshold=1.0)
    for index in range(200):
        record = source.record(index)
        gold = record.fields["answer"]
        completions = [gold, gold + "x", gold[:-1], ""]
        assert grader.grade(as_prompt(record), completions) == [1, 0, 0, 0], record


def test_partial_credit_counts_only_down_to_the_threshold() -> None:
    prompt = Prompt("p", "", (), "nus", {"question": "", "metadata": {}})
    grade = lambda threshold: ReasoningGymTaskGrader(  # noqa: E731
        "spell_backward", {}, threshold
    ).grade(prompt, ["nus", "nux", "xxx"])
    assert grade(1.0) == [1, 0, 0]
    assert grade(0.5) == [1, 1, 0]


def test_reasoning_gym_still_scores_some_wrong_answers_above_one() -> None:
    """When this fails, the upper bound in `ReasoningGymTaskGrader` has become needless."""
    task = reasoning_gym.create_dataset("spell_backward", seed=0, size=1)
    assert task.score_answer("abcdefghix", {"answer": "abcdefghi"}) > 1


@given(indices=st.lists(st.integers(0, 5000), min_size=1, max_size=20))
def test_an_index_means_the_same_problem_whatever_was_drawn_before(indices: list[int]) -> None:
    drawn = ReasoningGymTaskSource("chain_sum", {}, seed=2)
    for index in indices:
        assert drawn.record(index) == ReasoningGymTaskSource("chain_sum", {}, seed=2).record(index)


def test_neighbouring_seeds_share_no_problems() -> None:
    numbers = {"min_terms": 6, "max_terms": 6, "min_digits": 4, "max_digits": 4}
    questions = [
        {
            ReasoningGymTaskSource("chain_sum", numbers, seed).record(index).fields["question"]
            for index in range(500)
        }
        for seed in (0, 1)
    ]
    assert not questions[0] & questions[1]


@pytest.mark.parametrize("task", ["gsm_symbolic", "list_functions"])
def test_tasks_with_a_fixed_size_have_no_end_either(task: str) -> None:
    source = ReasoningGymTaskSource(task, {}, seed=0)
    questions = {source.record(index).fields["question"] for index in range(990, 1010)}
    assert len(questions) > 10


@pytest.mark.parametrize(
    ("task", "parameters", "message"),
    [
        ("spell_backwards", {}, "no task 'spell_backwards'; did you mean spell_backward"),
        ("spell_backward", {"min_len": 3}, "takes no min_len; it takes data_file, max_word_len"),
        ("spell_backward", {"seed": 3}, "takes no seed"),
        ("spell_backward", {"min_word_len": 9, "max_word_len": 3}, "max_word_len must be >="),
        ("spell_backward", {"min_word_len": 90, "max_word_len": 99}, "empty sequence"),
    ],
)
def test_a_task_that_cannot_be_built_is_a_configuration_error(
    task: str, parameters: dict[str, int], message: str
) -> None:
    for build in (
        lambda: ReasoningGymTaskSource(task, parameters, seed=0),
        lambda: ReasoningGymTaskGrader(task, parameters, threshold=1.0),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            build()
        assert str(caught.value).startswith("data.source.")


def test_tasks_grade_in_a_process_of_their_own() -> None:
    async def grade() -> list[list[float]]:
        rewards = []
        for task, parameters in TASKS:
            prompt = as_prompt(ReasoningGymTaskSource(task, parameters, seed=1).record(0))
            factory = partial(ReasoningGymTaskGrader, task, parameters, 1.0)
            pool = GraderPool(factory, num_processes=1, time_limit_seconds=10)
            try:
                await pool.start()
                rewards.append(await pool.grade(prompt, [str(prompt.reference), "no"]))
            finally:
                await asyncio.to_thread(pool.close)
        return rewards

    assert asyncio.run(grade()) == [[1.0, 0.0]] * 3
