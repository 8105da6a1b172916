"""The statistic passes what is drawn from the model, however drafted, and finds what is not."""

from __future__ import annotations

import pytest
import torch

from paceline.configs.vocabulary import SamplingParameters
from paceline.controller.verify.checks.distribution import (
    SLACK,
    SUSPICIOUS,
    as_often_as,
    chi_square,
    constrained,
    even_each,
    even_in_pairs,
    evened,
)

VOCABULARY = 12


def some_logits(count, seed=0):
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2.0


def drawn(probabilities, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def judged(probabilities, tokens, seed=0):
    draws = torch.rand(len(tokens), generator=torch.Generator().manual_seed(9000 + seed)).double()
    return even_each("", evened(probabilities, tokens, draws)).probability


def verified(probabilities, drafts, seed=0, keep_draft=False):
    """Tokens as a rejection sampler gives them that verifies one draft at each place."""
    generator = torch.Generator().manual_seed(seed)
    own = probabilities.gather(1, drafts[:, None])[:, 0]
    accepted = torch.rand(len(drafts), generator=generator) < own
    rest = probabilities.clone()
    if not keep_draft:
        rest.scatter_(1, drafts[:, None], 0.0)
    other = torch.multinomial(rest.clamp_min(1e-30), 1, generator=generator)[:, 0]
    return torch.where(accepted, drafts, other)


def test_temperature_top_k_and_top_p_cut_what_they_should():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    whole = constrained(logits, SamplingParameters(0.5))
    torch.testing.assert_close(whole, (logits.double() * 2).softmax(-1))
    assert constrained(logits, SamplingParameters(1.0, top_k=2))[0, 2:].tolist() == [0.0, 0.0]
    # masses .64, .24, .09, .03: the second reaches .8, and stays
    nucleus = constrained(logits, SamplingParameters(1.0, top_p=0.8))
    assert (nucleus > 0).tolist() == [[True, True, False, False]]
    assert constrained(logits, SamplingParameters(1.0, top_p=1e-6))[0, 0] == 1.0
    for way in (SamplingParameters(0.7, top_k=3, top_p=0.9), SamplingParameters(0.0)):
        torch.testing.assert_close(constrained(logits, way).sum().item(), 1.0)


def test_a_token_at_the_very_edge_is_kept_or_dropped_as_the_slack_says():
    logits = torch.tensor([[1.0, 0.5, 0.5 - SLACK / 2, -1.0]], dtype=torch.float64)
    way = SamplingParameters(1.0, top_k=2)
    kept = [(constrained(logits, way, slack) > 0).sum().item() for slack in (-SLACK, 0.0, SLACK)]
    assert kept == [2, 2, 3]
    masses = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    for top_p, expected in ((0.8 + SLACK / 2, [2, 3, 3]), (0.8 - SLACK / 2, [2, 2, 3])):
        way = SamplingParameters(1.0, top_p=top_p)
        kept = [(constrained(masses, way, s) > 0).sum().item() for s in (-SLACK, 0.0, SLACK)]
        assert kept == expected
    ordinary = constrained(some_logits(1), SamplingParameters(1.0, top_k=5), -SLACK)
    assert (ordinary > 0).sum() == 5, "the last token that is kept is not at the edge"


@pytest.mark.parametrize("way", [SamplingParameters(0.6), SamplingParameters(1.0, top_k=4)])
def test_numbers_of_a_right_sampler_are_even_whatever_is_drafted(way):
    probabilities = constrained(some_logits(20_000), way)
    ranks = probabilities.argsort(-1, descending=True)
    assert judged(probabilities, drawn(probabilities)) > 1e-3
    for rank in (0, 1, VOCABULARY - 1):
        assert judged(probabilities, verified(probabilities, ranks[:, rank])) > 1e-3


def test_probabilities_of_a_right_sampler_are_even_themselves():
    probabilities = constrained(some_logits(1000), SamplingParameters(1.0))
    found = [judged(probabilities, drawn(probabilities, seed), seed) for seed in range(400)]
    tenths = torch.tensor(found).mul(10).long()
    assert chi_square("", tenths, 10).probability > 1e-4


def test_a_wrong_temperature_and_an_accepted_draft_are_found():
    logits = some_logits(20_000)
    right, wrong = (constrained(logits, SamplingParameters(t)) for t in (1.0, 1.1))
    assert judged(right, drawn(wrong)) < SUSPICIOUS
    drafts = right.argmax(-1)
    one_in_ten = torch.rand(len(drafts), generator=torch.Generator().manual_seed(1)) < 0.1
    assert judged(right, torch.where(one_in_ten, drafts, drawn(right))) < SUSPICIOUS
    assert judged(right, verified(right, drafts, keep_draft=True)) < SUSPICIOUS


def test_a_rivals_tokens_are_found_where_both_are_equally_sure():
    ours, rivals = (constrained(some_logits(2000, i), SamplingParameters(1.0)) for i in (0, 1))
    near = (0.8 * ours.log() + 0.2 * rivals.log()).softmax(-1)
    draws = torch.rand(2000, generator=torch.Generator().manual_seed(7)).double()
    for sampled, is_right in ((near, True), (ours, False)):
        numbers = evened(near, drawn(sampled), draws, rival=ours)
        assert even_each("", numbers).is_suspicious is not is_right


def test_randomness_that_is_used_twice_is_found_in_pairs_alone():
    numbers = torch.rand(2000, 10, generator=torch.Generator().manual_seed(0)).double()
    assert even_in_pairs("", numbers).probability > 1e-3
    numbers[:, 1::2] = (numbers[:, ::2] + 0.1 * numbers[:, 1::2]) % 1.0
    assert even_each("", numbers.flatten()).probability > 1e-3
    assert even_in_pairs("", numbers).probability < SUSPICIOUS


def test_drafts_that_come_out_too_often_are_found_by_counting_them():
    probabilities = constrained(some_logits(4000), SamplingParameters(1.0))
    drafts = probabilities.argsort(-1, descending=True)[:, 2]
    own = probabilities.gather(1, drafts[:, None])[:, 0]
    right, again = (verified(probabilities, drafts, keep_draft=keep) for keep in (False, True))
    assert as_often_as("", right == drafts, own).probability > 1e-3
    assert as_often_as("", again == drafts, own).probability < SUSPICIOUS
    assert as_often_as("", torch.ones(50, dtype=torch.bool), torch.full((50,), 0.5)) is None


def test_nothing_at_all_is_no_evidence():
    assert even_each("", torch.zeros(0, dtype=torch.float64)).probability == 1.0
