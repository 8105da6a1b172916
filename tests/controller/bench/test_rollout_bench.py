"""`paceline bench rollout`: its task, its model and its arithmetic; and, slowly, its engines."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from paceline.configs.vocabulary import Completion, VersionSpan
from paceline.controller.bench.rollout import rollout
from paceline.controller.bench.rollout import training as rollout_training
from paceline.controller.bench.rollout.engine import Epoch, Step
from paceline.controller.bench.rollout.modes import COUPLED, ORACLE, OURS, PEER, PLAIN
from paceline.controller.bench.rollout.oracle import NUM_TOKENS, ReplayDrafter
from paceline.controller.bench.rollout.report import (
    Setting,
    report,
    same_samples,
    step_costs,
    targets_of,
)
from paceline.controller.bench.rollout.task import draw_problem, spread_problems
from paceline.controller.bench.rollout.training import END_TOKEN, Training, trained_versions
from paceline.controller.bench.rollout.weights import publish_versions
from paceline.controller.bench.rollout.widened_model import Shape, build, widened

SMALL = Shape(64, 96, num_layers=2, num_heads=4, num_key_value_heads=2)
LARGE = Shape(144, 160, num_layers=3, num_heads=6, num_key_value_heads=3)
SETTING = Setting("a model", "a workload", 0)


def perturbed(shape: Shape, seed: int = 0):
    """A model whose every weight matters, those of its norms too."""
    model = build(shape.config(128, 64, END_TOKEN), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    tokens = torch.randint(0, 128, (2, 50), generator=torch.Generator().manual_seed(9))
    return model(tokens).logits


def test_a_widened_model_has_the_logits_of_the_small_one() -> None:
    small = perturbed(SMALL)
    wide = widened(small, LARGE)
    assert wide.num_parameters() > 3 * small.num_parameters()
    assert logits(small).abs().max() > 1
    assert (logits(small) - logits(wide)).abs().max() < 1e-5


def test_what_was_added_computes_and_would_change_the_logits_if_it_were_let() -> None:
    small = perturbed(SMALL)
    for name in ("o_proj", "down_proj"):
        wide = widened(small, LARGE)
        added = wide.base_model.layers[-1]
        module = added.self_attn.o_proj if name == "o_proj" else added.mlp.down_proj
        with torch.no_grad():
            module.weight.add_(0.1)
        assert (logits(small) - logits(wide)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_layers": 1}, "num_layers shrinks from 2 to 1"),
        ({"num_heads": 6, "num_key_value_heads": 2}, "change partners"),
    ],
)
def test_a_shape_that_would_change_the_function_is_refused(changes, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        widened(perturbed(SMALL), replace(LARGE, **changes))


@pytest.mark.parametrize("plan", [rollout.QUICK, rollout.FULL], ids=["quick", "full"])
def test_the_models_of_the_plans_can_be_widened(plan) -> None:
    small = build(plan.training.shape.config(128, plan.training.max_length, END_TOKEN), 0)
    wide = widened(small, plan.shape)
    assert (logits(small) - logits(wide)).abs().max() < 1e-5


def test_answers_count_as_the_problem_says_in_words_of_their_own() -> None:
    random = np.random.default_rng(0)
    for problem in (draw_problem(random) for _ in range(50)):
        answer = problem.answer(random)
        result = (problem.start + problem.num_lines * problem.step) % 10
        lines = answer.split("\n")
        assert lines[-1] == f"#{result}"
        assert all(line[1] == str(problem.step) for line in lines[: problem.num_lines])
        assert lines[problem.num_lines - 1].endswith(f" {result}")
    (longest, *_) = sorted(spread_problems(6, 0), key=lambda each: -each.num_lines)
    assert longest.answer(random) != longest.answer(random)


def test_few_problems_have_the_whole_tail_and_seeds_differ() -> None:
    problems = spread_problems(6, seed=0)
    sizes = [problem.num_lines for problem in problems]
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 8 * sizes[0]
    assert spread_problems(6, seed=0) == problems
    assert spread_problems(6, seed=1) != problems


def test_a_trained_model_is_found_again_and_trained_anew_where_the_settings_differ(
    tmp_path,
) -> None:
    training = Training(num_steps=2, versions=2, steps_between=1, batch_tokens=600, shape=SMALL)
    paths = trained_versions(training, tmp_path / "model")
    first, second = (rollout_training.load(path) for path in paths)
    assert not torch.equal(logits(first), logits(second)), "a version is some updates later"
    written = paths[0].stat().st_mtime_ns
    assert trained_versions(training, tmp_path / "model") == paths
    assert paths[0].stat().st_mtime_ns == written
    trained_versions(replace(training, seed=1), tmp_path / "model")
    assert paths[0].stat().st_mtime_ns != written


def test_only_answers_are_learned_and_each_label_is_the_token_after(tmp_path) -> None:
    inputs, labels = rollout_training._padded([([5, 6], [7, 8, 9]), ([5], [7, END_TOKEN])])
    ignored = rollout_training.IGNORED
    assert inputs.tolist() == [[5, 6, 7, 8, 9], [5, 7, 1, 0, 0]]
    assert labels.tolist() == [
        [ignored, 7, 8, 9, ignored],
        [7, END_TOKEN, ignored, ignored, ignored],
    ]


def completion(num_tokens: int, logprob: float = -0.5) -> Completion:
    tokens = np.arange(num_tokens, dtype=np.int32)
    logprobs = np.full(num_tokens, logprob, dtype=np.float32)
    return Completion(tokens, logprobs, (VersionSpan(0, 0, num_tokens),), "stop")


def epoch(seconds: float, steps: int = 40) -> Epoch:
    """Two samples of 20 tokens in ``steps`` steps of which a quarter drafted a token each."""
    each = [Step(1, 2 if index % 4 == 0 else 1, seconds / steps) for index in range(steps)]
    return Epoch(
        seconds, 0.9 * seconds, 0.1 * seconds, tuple(each), {"0": (completion(20), completion(20))}
    )


def a_round(plain: float, ours: float, peer: float | None, temperature: float = 0.6):
    seconds = {PLAIN.name: plain, OURS.name: ours} | ({PEER.name: peer} if peer else {})
    return {temperature: {mode: [epoch(each)] * 2 for mode, each in seconds.items()}}


def missed(rounds) -> list[str]:
    return [what for what, target in targets_of(rounds).items() if not target.met]


def test_targets_are_medians_of_the_ratios_within_a_round() -> None:
    # The machine was half as fast in the second round: ratios do not see it.
    rounds = [a_round(6.4, 4, 5), a_round(12.8, 8, 10), a_round(1, 4, 1)]
    targets = targets_of(rounds)
    assert [target.measured.median for target in targets.values()] == pytest.approx([1.6, 1.25] * 2)
    assert not missed(rounds)


def test_the_first_epoch_may_cost_a_little_and_later_ones_must_save_by_temperature() -> None:
    assert missed([a_round(0.98, 1, 2)]) == ["T=0.6, epoch 2: times no drafting"]
    assert missed([a_round(0.96, 1, 2)])[0] == "T=0.6, epoch 1: times no drafting"
    assert not missed([a_round(1.3, 1, 2, temperature=1.0)])
    assert missed([a_round(1.3, 1, 2)]) == ["T=0.6, epoch 2: times no drafting"]
    assert len(missed([a_round(1.6, 1, 0.9)])) == 2


def test_a_peer_that_is_not_installed_is_a_missed_target_and_null_in_the_answer() -> None:
    rounds = [a_round(2, 1, None)]
    assert missed(rounds) == [f"T=0.6, epoch {i}: times {PEER.name}" for i in (1, 2)]
    answer = json.loads(report(SETTING, rounds, 0.0).as_json())
    target = answer["targets"][f"T=0.6, epoch 1: times {PEER.name}"]
    assert target["value"] is None
    assert target["met"] is False


def test_the_answer_holds_every_epoch() -> None:
    rounds = [a_round(2, 1, 3)] * 3
    figures = json.loads(report(SETTING, rounds, 0.5).as_json())["figures"]
    assert len(figures["rounds"]) == 3
    (first, _) = figures["rounds"][0]["0.6"][OURS.name]
    assert first == {
        "seconds": 1,
        "seconds_busy": 0.9,
        "seconds_proposing": 0.1,
        "num_steps": 40,
        "num_tokens": 40,
        "longest": 20,
        "num_drafted": 10,
        "num_accepted": 0,
        "entropy": 0.5,
    }


def test_what_is_saved_is_told_as_a_share_of_what_the_oracle_saves() -> None:
    seconds = {PLAIN.name: 5.0, OURS.name: 2.0, ORACLE.name: 1.0}
    rounds = [{0.6: {mode: [epoch(9.0), epoch(each)] for mode, each in seconds.items()}}]
    table = report(SETTING, rounds, 0.0).tables[0]
    cells = {row[0]: row[table.columns.index("of oracle")] for row in table.rows}
    assert cells == {PLAIN.name: "", OURS.name: "75%", ORACLE.name: "100%"}


def test_samples_that_differ_from_those_without_drafting_are_counted() -> None:
    plain, other = epoch(1.0), epoch(1.0)
    other.completions["0"][1].token_ids[7] = 99
    rounds = [{0.6: {PLAIN.name: [plain], OURS.name: [other]}}]
    assert same_samples(rounds) == 3 / 4


def test_a_tokens_cost_is_the_slope_of_its_steps_and_the_first_step_is_not_among_them() -> None:
    first = Step(4, 4, 100.0)
    plain = [Step(n, n, 0.01 + 0.002 * n) for n in (4, 5, 6, 7) for _ in range(10)]
    drafted = [Step(5, n, 0.02 + 0.003 * n) for n in range(6, 20) for _ in range(10)]
    outlier = Step(5, 6, 1.0)
    measured = Epoch(1.0, 1.0, 0.0, (first, *plain, *drafted, outlier), {"0": (completion(20),)})
    lines = step_costs([{0.6: {PLAIN.name: [measured]}}])
    assert [(line.fewest, line.drafted, line.num_steps) for line in lines] == [
        (4, False, 40),
        (4, True, 141),
    ]
    assert [line.base for line in lines] == pytest.approx([0.01, 0.02])
    assert [line.token for line in lines] == pytest.approx([0.002, 0.003])


def test_modes_take_turns_at_being_first_and_what_is_replayed_comes_before() -> None:
    modes = [PLAIN, ORACLE, OURS, COUPLED]
    assert rollout._in_turn(modes, 0) == [PLAIN, OURS, COUPLED, ORACLE]
    assert rollout._in_turn(modes, 1) == [OURS, COUPLED, PLAIN, ORACLE]
    assert rollout._in_turn(modes, 3) == rollout._in_turn(modes, 0)


def test_every_mode_gets_the_same_requests_and_no_two_samples_share_a_seed() -> None:
    plan = rollout.FULL
    seeds = []
    for number in range(plan.num_rounds):
        for index in range(plan.training.versions):
            for request in rollout._requests(plan, 0.6, number, index):
                seeds += range(request.seed, request.seed + request.num_samples)
    assert len(seeds) == len(set(seeds))
    prompts = [
        [request.prompt_token_ids for request in rollout._requests(plan, 0.6, 0, index)]
        for index in (0, 1)
    ]
    assert prompts[0] == prompts[1], "a later epoch has the same prompts"


def test_the_oracle_drafts_what_was_foretold_and_nothing_once_that_was_wrong() -> None:
    drafter = ReplayDrafter(None)
    drafter.attach(lambda: [("0/0", 2), ("0/1", 2), ("0/2", 2), ("1/0", 2)])
    future = np.arange(10, 30, dtype=np.int32)
    drafter.foretell({"0/0": future, "0/1": future, "0/2": future})
    counts = np.array([5, 5, 2 + len(future), 3], dtype=np.int32)
    drafts = drafter.propose([[11, 12], [99], [29], [10]], counts, np.zeros((4, 64), np.int32))
    assert drafts == [list(range(13, 13 + NUM_TOKENS)), [], [], []]


@pytest.mark.slow
def test_engines_sample_the_same_and_an_oracle_is_always_right(tmp_path) -> None:
    plan = replace(
        rollout.QUICK,
        modes=(PLAIN, COUPLED, ORACLE),
        temperatures=(0.6, 1.0),
        num_problems=2,
        num_samples=2,
        training=Training(num_steps=2, versions=2, max_tokens=24, shape=SMALL),
        shape=LARGE,
    )
    weights = publish_versions(plan.training, plan.shape, tmp_path / "model", tmp_path / "weights")
    (measured,) = rollout._measure(plan, weights, tmp_path)
    epochs = measured[1.0]
    tokens = {
        mode: [
            [each.token_ids.tolist() for group in found.completions.values() for each in group]
            for found in by_epoch
        ]
        for mode, by_epoch in epochs.items()
    }
    assert tokens[PLAIN.name] == tokens[COUPLED.name] == tokens[ORACLE.name]
    for found in epochs[ORACLE.name]:
        assert found.num_accepted > 0.5 * found.num_tokens
        assert len(found.steps) < 0.5 * len(epochs[PLAIN.name][0].steps)
    for found in epochs[PLAIN.name]:
        assert found.num_drafted == found.num_accepted == 0
    assert report(SETTING, [measured], 0.0).figures["step_costs"] is not None
