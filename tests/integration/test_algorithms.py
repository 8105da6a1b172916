"""Algorithms in whole runs: every named one, one of a user's, and one that fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.commands import run, run_in
from tests.integration.conftest import LEARNS_QUICKLY, train

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"

BROKEN = """
from dataclasses import dataclass
import numpy as np
from paceline.learner.objective.advantages import Estimate, Outcome
from paceline.learner.objective.losses.policy import Reinforce
from paceline.learner.objective.objective import Objective

@dataclass(frozen=True)
class Broken(Outcome):
    calls: int = 0

    def __call__(self, tokens, token_rewards):
        advantages = tokens.of_tokens(tokens.rewards).astype(float)
        if tokens.ages.max() > 0:  # once some step was taken
            advantages[-1] = np.nan
        return Estimate(advantages)

def build():
    return Objective(Broken(), Reinforce(), "token_mean", max_tokens=16)
"""


def completed(tmp_path, *arguments):
    ended = run(*arguments, cwd=tmp_path)
    return ended.code, ended.errors


def test_the_example_of_the_page_is_an_algorithm_as_it_stands(tmp_path):
    text = PAGE.read_text().partition("## An algorithm of your own")[2]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (line,) = re.findall(r"```yaml\nalgorithm: (.*?)\n```", text)
    (tmp_path / "best_of_group.py").write_text(code)
    found = completed(tmp_path, *train("own", "loop.num_steps=3", f"algorithm={line}"))
    assert found == (0, "")
    shares = [step.metrics["better_fraction"] for step in run_in(tmp_path, "own").steps]
    assert len(shares) == 3
    assert all(0 < share < 1 for share in shares)


def test_a_step_that_cannot_be_taken_is_kept_and_fails_again_by_itself(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    algorithm = 'algorithm={type: import, import_path: "broken:build"}'
    code, errors = completed(tmp_path, *train("kept", "loop.num_steps=9", algorithm))
    assert code == 2
    said = re.search(r"the advantage of sample \d+ of group \d+ is nan", errors)
    kept = re.search(r"kept in (\S+): `paceline reproduce (\S+)`", errors)
    assert said and kept, errors
    code, again = completed(tmp_path, "reproduce", kept[2])
    assert code == 2
    assert said[0] in again
    assert len(again.splitlines()) == 1


@pytest.mark.parametrize("name", ["ppo", "gspo", "decoupled_ppo"])
def test_algorithms_unlike_each_other_train_in_whole_runs(tmp_path, name):
    found = completed(tmp_path, *train(name, "loop.num_steps=2", f"algorithm.type={name}"))
    assert found == (0, "")
    steps = run_in(tmp_path, name).steps
    assert [step.step for step in steps] == [1, 2]
    assert all(step.metrics["grad_norm"] > 0 for step in steps)
    assert steps[0].metrics["mismatch_fresh"] < 1e-4, "engine and learner agree on fresh tokens"


PAIRS = (
    "data.source={type: import, import_path: 'paceline.reward.spelling_pairs:SpellingPairs', "
    "parameters: {parameters: {min_word_len: 3, max_word_len: 6}}, prompt_template: '{word}='}",
    "reward={type: exact}",
    "loop.samples_per_group=2",
)


@pytest.mark.parametrize(
    ("name", "overrides", "metric"),
    [("sft", ("loop.samples_per_group=1",), "loss"), ("dpo", PAIRS, "preference_loss")],
)
def test_runs_without_sampling_learn_in_the_same_loop(tmp_path, name, overrides, metric):
    arguments = train(
        name, "loop.num_steps=12", f"algorithm={{type: {name}}}", *LEARNS_QUICKLY, *overrides
    )
    assert completed(tmp_path, *arguments) == (0, "")
    run_folder = run_in(tmp_path, name)
    steps = run_folder.steps
    found = [step.loss if metric == "loss" else step.metrics[metric] for step in steps]
    assert len(found) == 12
    assert found[-1] < found[0]
    unmeasured = {(step.age_max, step.reward) for step in steps}
    assert unmeasured == {(None, None)}, "what nobody sampled has neither age nor reward"
    assert run("ledger", str(run_folder.folder.root), cwd=tmp_path).code == 0
