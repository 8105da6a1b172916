"""Drafters that are right or wrong on purpose do what they are for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from paceline.controller.verify.drafters import (
    NUM_DRAFTED,
    ModelDrafter,
    ScriptedDrafter,
    Told,
    drafted,
    drafting,
    least_likely,
    likeliest,
    mixed,
)

SETTINGS = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=3))
TEXTS = {(1, 2): [5, 6, 7, 8, 9]}


class Counting:
    """A model whose likeliest next token is the last one plus 1, and the least likely 0."""

    def next_logits(self, contexts):
        logits = torch.rand(len(contexts), 10) * 0.5 + 0.2
        logits[:, 0] = 0.0
        logits[range(len(contexts)), [context[-1] + 1 for context in contexts]] = 1.0
        return logits


def propose(sampled, rows):
    tokens = np.zeros((len(rows), 8), dtype=np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    lengths = np.array([len(ids) for ids in rows])
    return ScriptedDrafter(SETTINGS).propose(sampled, lengths, tokens)


def test_a_script_drafts_for_the_rows_that_were_given_tokens_and_is_cut(monkeypatch):
    monkeypatch.setattr(ScriptedDrafter, "counters", type(ScriptedDrafter.counters)())
    with drafting(Told(TEXTS, 10)):
        drafts = propose([[5], [], [2]], [[1, 2, 5], [1, 2, 5], [3, 2]])
    assert drafts == [[6, 7, 8], [], []]
    assert drafted((1, 2), [5, 6, 7, 0, 0]).tolist() == [-1, 6, 7, 8, -1]
    assert propose([[5]], [[1, 2, 5]]) == [[]], "the script ends with the block"
    counters = ScriptedDrafter.counters
    assert (counters.num_drafted, counters.num_accepted, counters.num_cut) == (3, 0, 1)
    propose([[6, 7, 8]], [[1, 2, 5, 6, 7, 8]])
    assert counters.num_accepted == 2


def test_who_is_told_knows_the_rest_and_nothing_of_other_prompts():
    contexts = [np.array(row) for row in ([1, 2], [1, 2, 5, 6], [1, 3])]
    assert Told(TEXTS, 10)(contexts) == [[5, 6, 7, 8, 9], [7, 8, 9], []]
    assert Told(TEXTS, 10, shift=1)(contexts)[1] == [8, 9, 0]


def test_the_model_drafts_by_rank_each_token_after_the_ones_before():
    contexts = [np.array([4, 1]), np.array([2])]
    assert ModelDrafter(Counting(), likeliest)(contexts) == [[2, 3, 4], [3, 4, 5]]
    assert ModelDrafter(Counting(), least_likely)(contexts) == [[0, 0, 0], [0, 0, 0]]


def test_mixed_drafts_are_of_every_length_and_a_function_of_the_context():
    contexts = [np.array([i, i + 1], dtype=np.int32) for i in range(200)]
    drafts = [mixed(context) for context in contexts]
    assert {len(draft) for draft in drafts} == set(range(NUM_DRAFTED + 1))
    assert drafts == [mixed(context.copy()) for context in contexts]
    assert {rank for draft in drafts for rank in draft} == {0, 1, 2, 3, -1}
