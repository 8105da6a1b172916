"""What a configuration's training is fed with."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from paceline.configs.load import load_config
from paceline.configs.vocabulary import Group
from paceline.controller.data.tokenizer import characters_tokenizer
from paceline.controller.groups.buffer import Work
from paceline.controller.groups.generation import Rollouts
from paceline.controller.wiring.algorithms import training_temperature
from paceline.controller.wiring.drafting import with_draft_budget
from paceline.controller.wiring.preparation import prompt_set
from paceline.controller.wiring.services import Services

FEW = ("data.num_held_out=4", "warm_start=null")


def started(recipe: str, *overrides: str) -> Services:
    """The services of a recipe, not started: what fills groups only keeps them for later."""
    config = load_config(recipe, (*FEW, *overrides))
    tokenizer = characters_tokenizer()
    prompts = prompt_set(config, tokenizer)
    inputs = SimpleNamespace(prompts=prompts, tokenizer=tokenizer, stop_token_ids=(1,))
    unused = SimpleNamespace(grade=None, generate=None)
    return Services(config, inputs, grader=unused, learner=unused, pool=unused)


def first_group(recipe: str, *overrides: str) -> Group:
    services = started(recipe, *overrides)
    position, prompt = next(services.inputs.prompts.feed())
    return asyncio.run(services.training_groups()(Work(position, prompt)))


def test_supervised_training_is_fed_with_the_gold_completion():
    group = first_group("sft")
    (trajectory,) = group.trajectories
    assert trajectory.text == group.prompt.reference
    assert trajectory.reward == 1.0


def test_preferences_are_fed_with_the_better_completion_and_then_the_worse():
    group = first_group("dpo")
    chosen, rejected = group.trajectories
    assert chosen.text == group.prompt.reference != rejected.text
    assert group.rewards.tolist() == [1.0, 0.0]


def test_a_file_of_pairs_is_enough(tmp_path):
    rows = [{"question": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n)} for n in range(8)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = f"data.source={{type: dataset, path: '{path}', answer_field: chosen}}"
    group = first_group("dpo", source)
    number = int(group.prompt.text.partition("+")[0])
    assert [t.text for t in group.trajectories] == [str(number + 1), str(number)]
    assert group.prompt.reference == str(number + 1)


def test_reinforcement_learning_is_fed_with_samples():
    assert isinstance(started("grpo").training_groups(), Rollouts)


@pytest.mark.parametrize(("recipe", "temperature"), [("grpo", 0.7), ("sft", 1.0), ("dpo", 1.0)])
def test_only_what_was_sampled_is_trained_at_the_temperature_of_the_sampling(recipe, temperature):
    config = load_config(recipe, ("rollout.sampling.temperature=0.7",))
    assert training_temperature(config) == temperature


@pytest.mark.parametrize(
    ("max_lag", "drafting", "budget"),
    [
        (0, "{}", "makespan"),
        (2, "{}", "throughput"),
        (2, "{budget: makespan}", "makespan"),
        (0, "{budget: none}", "none"),
    ],
)
def test_drafts_shorten_what_the_pace_of_training_waits_for(max_lag, drafting, budget):
    config = load_config("grpo", (*FEW, f"loop.max_lag={max_lag}", f"rollout.drafting={drafting}"))
    assert with_draft_budget(config).drafting.budget == budget
