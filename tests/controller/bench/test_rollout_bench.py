"""`paceline bench rollout`: its task, its model and its arithmetic; and, slowly, its engines."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from paceline.configs.vocabulary import Completion, VersionSpan
from paceline.controller.bench.harness.compare import interleaved
from paceline.controller.bench.harness.result import Measured
from paceline.controller.bench.rollout import rollout, training
from paceline.controller.bench.rollout.engine import EngineProcess, Epoch, Step
from paceline.controller.bench.rollout.modes import COUPLED, ORACLE, OURS, PLAIN
from paceline.controller.bench.rollout.oracle import NUM_TOKENS, ReplayDrafter
from paceline.controller.bench.rollout.rollout import Rollouts, epoch_figures, targets_of
from paceline.controller.bench.rollout.task import draw_problem, spread_problems
from paceline.controller.bench.rollout.training import END_TOKEN, Training, trained_versions
from paceline.controller.bench.rollout.weights import publish_versions
from paceline.controller.bench.rollout.widened_model import Shape, build, widened

SMALL = Shape(64, 96, num_layers=2, num_heads=4, num_key_value_heads=2)
LARGE = Shape(144, 160, num_layers=3, num_heads=6, num_key_value_heads=3)


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
    asked = Training(num_steps=2, versions=2, steps_between=1, batch_tokens=600, shape=SMALL)
    paths = trained_versions(asked, tmp_path / "model")
    first, second = (training.load(path) for path in paths)
    assert not torch.equal(logits(first), logits(second)), "a version is some updates later"
    written = paths[0].stat().st_mtime_ns
    assert trained_versions(asked, tmp_path / "model") == paths
    assert paths[0].stat().st_mtime_ns == written
    trained_versions(replace(asked, seed=1), tmp_path / "model")
    assert paths[0].stat().st_mtime_ns != written


def test_only_answers_are_learned_and_each_label_is_the_token_after(tmp_path) -> None:
    inputs, labels = training._padded([([5, 6], [7, 8, 9]), ([5], [7, END_TOKEN])])
    ignored = training.IGNORED
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


def test_figures_of_an_epoch_count_what_was_drafted_right_and_in_vain() -> None:
    figures = epoch_figures(epoch(2.0, steps=32))
    # 32 tokens come without drafts, so 8 of the 8 drafted ones were right
    assert figures["tokens"] == 40
    assert figures[rollout.SPEED] == 30
    assert figures["accepted"] == 8 / 32
    assert figures["wasted"] == 0
    assert epoch_figures(epoch(2.0))["wasted"] == 10 / 50, "40 sequences a step, 10 drafted in vain"


def test_the_first_epoch_may_cost_a_little_and_later_ones_must_save_by_temperature() -> None:
    wanted = {target.what: target.target for target in targets_of(rollout.FULL)}
    for temperature, saved in ((1, 1.25), (0.6, 1.5)):
        asked = [
            wanted[f"T={temperature}, epoch {index}: times no drafting"] for index in range(1, 5)
        ]
        assert asked == [0.97, saved, saved, saved]
        assert wanted[f"T={temperature}, epoch 3: times vLLM suffix"] == 1


def test_ours_is_judged_by_seconds_and_a_peer_that_is_not_installed_is_a_missed_target() -> None:
    seconds = {PLAIN.name: 3.2, OURS.name: 2.0}
    found = {name: epoch_figures(epoch(each)) for name, each in seconds.items()}
    measured = Measured({case: [found] for case in rollout.QUICK.epochs})
    judged = {target.what: target.judge(measured) for target in targets_of(rollout.QUICK)}
    plain = judged["T=0.6, epoch 2: times no drafting"]
    assert (plain.measured.median, plain.met) == (pytest.approx(1.6), True)
    assert not judged["T=0.6, epoch 2: times vLLM suffix"].met


def test_samples_that_differ_from_those_without_drafting_are_counted() -> None:
    plain, other = epoch(1.0), epoch(1.0)
    other.completions["0"][1].token_ids[7] = 99
    rollouts = Rollouts(rollout.QUICK, None, {})
    rollouts.epochs["case", 0] = {PLAIN.name: plain, OURS.name: other}
    assert rollouts.same_samples().startswith("75.0% of the samples")


def test_what_is_replayed_is_measured_after_what_replays_it() -> None:
    for case in rollout.cases_of(rollout.FULL).values():
        for number in range(case.num_rounds):
            assert case.in_turn(number)[-1] == ORACLE.name


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
    settings = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=NUM_TOKENS)
    )
    drafter = ReplayDrafter(settings)
    drafter.attach(lambda: [("0/0", 2), ("0/1", 2), ("0/2", 2), ("1/0", 2)])
    future = np.arange(10, 30, dtype=np.int32)
    drafter.foretell({"0/0": future, "0/1": future, "0/2": future})
    tokens = np.zeros((4, 64), np.int32)
    for row, sampled in enumerate([[10, 11, 12], [10, 11, 99], future, [10]]):
        tokens[row, 2 : 2 + len(sampled)] = sampled
    counts = np.array([5, 5, 2 + len(future), 3], dtype=np.int32)
    drafts = drafter.propose([[11, 12], [99], [29], [10]], counts, tokens)
    assert drafts == [list(range(13, 13 + NUM_TOKENS)), [], [], []]


@pytest.mark.slow
def test_engines_sample_the_same_tokens_and_an_oracle_is_always_right(tmp_path) -> None:
    plan = replace(
        rollout.QUICK,
        modes=(PLAIN, COUPLED, ORACLE),
        temperatures=(1.0,),
        num_problems=2,
        num_samples=2,
        training=Training(num_steps=2, versions=1, max_tokens=24, shape=SMALL),
        shape=LARGE,
    )
    weights = publish_versions(plan.training, plan.shape, tmp_path / "model", tmp_path / "weights")
    with closing(EngineProcess(tmp_path / "log")) as engine:
        rollouts = Rollouts(plan, weights, dict.fromkeys(plan.installed, engine))
        (rounds,) = interleaved(rollout.cases_of(plan), rollouts.measure).rounds.values()
    (by_mode,) = rollouts.epochs.values()
    tokens = {
        name: {
            request: [each.token_ids.tolist() for each in group]
            for request, group in found.completions.items()
        }
        for name, found in by_mode.items()
    }
    assert tokens[PLAIN.name] == tokens[COUPLED.name] == tokens[ORACLE.name]
    plain, oracle = rounds[0][PLAIN.name], rounds[0][ORACLE.name]
    assert by_mode[ORACLE.name].num_accepted > 0.5 * oracle["tokens"]
    assert oracle["steps"] < 0.5 * plain["steps"]
    assert plain["accepted"] is None, "nothing was drafted"
