from __future__ import annotations

import pickle
from functools import partial

import pytest

from paceline.configs.errors import ConfigError, DataError
from paceline.configs.vocabulary import Prompt
from paceline.reward.exact import ExactAnswerGrader
from paceline.reward.math_answer import MathAnswerGrader


def prompt(reference: str | None) -> Prompt:
    return Prompt("task:3", "?", (1,), reference)


def test_exact_rewards_equality_and_nothing_less() -> None:
    answers = ["abc", " abc\n", "abcd", "ab", "ABC", ""]
    assert ExactAnswerGrader().grade(prompt("abc"), answers) == [1, 1, 0, 0, 0, 0]
    assert ExactAnswerGrader(ignore_case=True).grade(prompt("abc"), ["ABC", "x"]) == [1, 0]


def test_exact_compares_the_first_group_of_its_pattern() -> None:
    grader = ExactAnswerGrader(pattern=r"#(\d+)")
    assert grader.grade(prompt("5"), ["a:4 #5", "5", "#55", "#4 #5"]) == [1, 0, 0, 0]
    assert ExactAnswerGrader(pattern=r"\d+").grade(prompt("5"), ["so 5."]) == [1]


def test_exact_refuses_what_is_no_pattern() -> None:
    with pytest.raises(ConfigError, match=r"reward\.pattern: not a regular expression: '\('"):
        ExactAnswerGrader(pattern="(")


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("72", ["72", "The answer is 72.", "so \\boxed{72}", "#### 72", "$72.0$"], ["73", "", "x"]),
        ("\\frac{1}{2}", ["\\boxed{0.5}", "$\\frac12$", "1/2"], ["\\boxed{2}", "0.25"]),
        ("$\\sqrt{8}$", ["\\boxed{2\\sqrt{2}}"], ["\\boxed{4}"]),
        ("x^2+1", ["\\boxed{1+x^2}"], ["\\boxed{x^2}"]),
        ("(1, 2)", ["\\boxed{(1,2)}"], ["\\boxed{(2,1)}"]),
        ("1,000", ["1000", "\\boxed{1,000}"], ["100"]),
    ],
)
def test_math_rewards_equal_values_however_written(
    reference: str, right: list[str], wrong: list[str]
) -> None:
    rewards = MathAnswerGrader().grade(prompt(reference), [*right, *wrong])
    assert rewards == [1.0] * len(right) + [0.0] * len(wrong)


def test_math_takes_the_boxed_answer_over_numbers_around_it() -> None:
    completion = "First 3, then 4. \\boxed{7} is 3 + 4."
    assert MathAnswerGrader().grade(prompt("7"), [completion]) == [1]
    assert MathAnswerGrader().grade(prompt("4"), [completion]) == [0]


@pytest.mark.parametrize("grader", [ExactAnswerGrader(), MathAnswerGrader()])
def test_a_missing_reference_is_an_error_not_a_zero(
    grader: ExactAnswerGrader | MathAnswerGrader,
) -> None:
    with pytest.raises(DataError, match="prompt task:3 has no reference"):
        grader.grade(prompt(None), ["5"])


def test_math_refuses_a_reference_without_an_expression() -> None:
    with pytest.raises(DataError, match="reference of prompt task:3 is no mathematical"):
        MathAnswerGrader().grade(prompt(""), ["5"])


def test_graders_can_be_built_in_another_process() -> None:
    for factory in (partial(ExactAnswerGrader, pattern="a", ignore_case=True), MathAnswerGrader):
        assert pickle.loads(pickle.dumps(factory))() is not None
