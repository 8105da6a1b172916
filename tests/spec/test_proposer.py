"""The proposer as vLLM calls it: whose history, how long, how many, and what it counts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from paceline.spec.proposer import SuffixProposer

ONE, TWO = (1, 2), (3,)


def proposer_of(rows, max_tokens=3, max_sequences=8, max_prompts=8):
    config = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=max_tokens))
    proposer = SuffixProposer(config)
    proposer.attach(lambda: rows, max_sequences, max_prompts)
    return proposer


def propose(proposer, texts, sampled=None):
    tokens = np.zeros((len(texts), 32), dtype=np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    sampled = [[text[-1]] for text in texts] if sampled is None else sampled
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    return proposer.propose(sampled, lengths, tokens)


def learned(proposer, prompt, *samples):
    for sample in samples:
        proposer.learn(prompt, np.array(sample, dtype=np.int32))


def test_a_draft_continues_what_samples_of_the_same_prompt_said():
    proposer = proposer_of([("a", ONE), ("b", TWO)])
    learned(proposer, ONE, [7, 8, 9, 10, 11])
    assert propose(proposer, [[1, 2, 7, 8], [3, 7, 8]]) == [[9, 10, 11], []]


def test_a_draft_is_never_longer_than_asked_for():
    proposer = proposer_of([("a", ONE)], max_tokens=2)
    learned(proposer, ONE, range(7, 20))
    assert propose(proposer, [[1, 2, 7]]) == [[8, 9]]


def test_a_row_that_still_reads_its_prompt_gets_none():
    proposer = proposer_of([("a", ONE), ("b", ONE)])
    learned(proposer, ONE, [7, 8, 9])
    assert propose(proposer, [[1, 2], [1, 2, 7]], sampled=[[], [7]]) == [[], [8, 9]]


def test_more_sequences_than_configured_get_none():
    rows = [(str(i), ONE) for i in range(3)]
    proposer = proposer_of(rows, max_sequences=2)
    learned(proposer, ONE, [7, 8, 9])
    assert propose(proposer, [[1, 2, 7]] * 3) == [[], [], []]
    assert propose(proposer, [[1, 2, 7]] * 3, sampled=[[7], [], [7]]) == [[8, 9], [], [8, 9]]


def test_the_least_recently_used_prompt_is_forgotten():
    proposer = proposer_of([("a", ONE)], max_prompts=2)
    learned(proposer, ONE, [7, 8])
    learned(proposer, TWO, [7, 8])
    assert propose(proposer, [[1, 2, 7]]) == [[8]]
    learned(proposer, (4,), [7, 8])
    assert propose(proposer, [[1, 2, 7]]) == [[8]], "used a moment ago"
    assert len(proposer._histories) == 2


def test_accepted_tokens_are_counted_by_request_wherever_its_row_went():
    rows = [("a", ONE), ("b", ONE)]
    proposer = proposer_of(rows)
    learned(proposer, ONE, [7, 8, 9, 10])
    propose(proposer, [[1, 2, 7], [1, 2, 7, 8]])
    assert (proposer.counters.num_rounds, proposer.counters.num_drafted) == (2, 5)
    rows[:] = [("b", ONE), ("c", ONE)]  # a is gone, b moved up, c is new
    propose(proposer, [[1, 2, 7, 8, 9, 10, 5], [1, 2]], sampled=[[9, 10, 5], []])
    assert proposer.counters.num_accepted == 2
