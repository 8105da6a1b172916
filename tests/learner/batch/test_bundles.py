"""Laws of bundling, and that rows built from bundles hold what they say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.configs.vocabulary import TrainBatch
from paceline.learner.batch.bundles import Bundle, bundle_samples
from paceline.learner.batch.microbatch import build_microbatch
from paceline.learner.batch.sequences import token_sequences
from tests.learner.conftest import (
    random_batch,
    random_group,
    sequences_of,
    with_completion,
    with_samples,
)

CPU = torch.device("cpu")


def group(prompt_length, completion_lengths, seed=0):
    generator = np.random.default_rng(seed)
    return token_sequences([random_group(generator, prompt_length, *completion_lengths)])


batches = st.builds(
    lambda seed, num_samples: sequences_of(random_batch(seed, num_samples)),
    st.integers(0, 1000),
    st.integers(1, 40),
)


@given(batches, st.integers(24, 200), st.integers(1, 4))
def test_every_sample_is_in_one_bundle_with_siblings_only_and_within_capacity(
    samples, capacity, num_ranks
):
    bundles = bundle_samples(samples, capacity, num_ranks)
    assert sorted(i for b in bundles for i in b.samples) == list(range(len(samples)))
    for bundle in bundles:
        assert bundle.size <= capacity
        assert (bundle.prefix > 0) == (len(bundle.samples) > 1)
        first = samples[bundle.samples[0]]
        for index, own in zip(bundle.samples, bundle.own_lengths, strict=True):
            assert samples[index].num_read == bundle.prefix + own
            shared = samples[index].token_ids[: bundle.prefix]
            assert np.array_equal(shared, first.token_ids[: bundle.prefix])


def pasts(row):
    """What each place of a row sees, by its segment's keys: token ids, its own last."""
    tokens = row.token_ids[0]
    keys = torch.arange(len(tokens)) if row.segments.keys is None else row.segments.keys
    found = {}
    for start, end in pairwise(row.segments.key_boundaries.tolist()):
        places = keys[start:end]
        for seen, place in enumerate(places.tolist(), start=1):
            found.setdefault(place, []).append(tokens[places[:seen]].tolist())
    return found


@given(batches, st.integers(24, 200))
def test_each_trained_token_is_predicted_from_exactly_its_own_past(samples, capacity):
    bundles = bundle_samples(samples, capacity)
    microbatch = build_microbatch(bundles, samples, CPU)
    seen = pasts(microbatch.row)
    predictors = iter(microbatch.row.predictors.tolist())
    for index in microbatch.samples:
        for position in range(samples[index].num_prompt, len(samples[index].token_ids)):
            place = next(predictors)
            before = samples[index].token_ids[:position].tolist()
            assert all(past == before for past in seen[place])
            assert microbatch.row.positions[0, place] == position - 1
    targets = [samples[i].token_ids[samples[i].num_prompt :] for i in microbatch.samples]
    assert microbatch.row.targets.tolist() == np.concatenate(targets).tolist()


def test_a_group_is_laid_out_with_its_prompt_once():
    samples = group(10, [3, 5, 1])
    [bundle] = bundle_samples(samples, 100)
    assert bundle == Bundle(10, (0, 1, 2), (2, 4, 0))
    assert (bundle.num_tokens, bundle.num_keys) == (16, 46)
    microbatch = build_microbatch([bundle], samples, CPU)
    assert microbatch.row.token_ids.numel() == 16
    assert len(microbatch.row.targets) == 9


def test_a_sample_alone_shares_nothing():
    generator = np.random.default_rng(0)
    samples = token_sequences([random_group(generator, 4, 3), random_group(generator, 4, 3)])
    assert bundle_samples(samples, 100) == [Bundle(0, (0,), (6,)), Bundle(0, (1,), (6,))]


def test_groups_of_one_prompt_share_it_too():
    """As where a data set is so small that it comes again within a batch."""
    one = random_group(np.random.default_rng(0), 6, 4, 2)
    samples = token_sequences([one, random_group(np.random.default_rng(1), 6, 4), one])
    bundles = bundle_samples(samples, 100)
    assert [bundle.samples for bundle in bundles] == [(0, 1, 3, 4), (2,)]


def test_siblings_whose_prompts_went_to_other_experts_share_none():
    batch = TrainBatch(0, (random_group(np.random.default_rng(0), 6, 4, 4, 4),))
    routing = [np.full((10, 2, 1), expert, np.int16) for expert in (0, 1, 0)]
    routing[2][6:] = 3  # the completions' are their own
    pairs = zip(batch.samples, routing, strict=True)
    routed = with_samples(batch, [with_completion(s, routed_experts=r) for s, r in pairs])
    bundles = bundle_samples(sequences_of(routed), 100)
    assert [bundle.samples for bundle in bundles] == [(0, 2), (1,)]


def test_a_model_reads_all_but_the_last_token_and_nothing_without_a_completion():
    one, none = group(4, [6, 0])
    assert (one.num_prompt, one.num_completion, one.num_read) == (4, 6, 9)
    assert (none.num_completion, none.num_read) == (0, 0)
    assert bundle_samples([none, one], 100) == [Bundle(0, (1,), (9,))]


def test_short_completions_of_a_long_prompt_stay_within_memory():
    """16 samples would read 17 times the prompt's keys for a row of hardly more than one."""
    bundles = bundle_samples(group(100, [3] * 16), capacity=128)
    assert all(bundle.num_keys <= 4 * 128 for bundle in bundles)
    assert max(len(bundle.samples) for bundle in bundles) > 1


def test_bundles_stay_small_enough_to_balance_ranks():
    samples = group(4, [10] * 64)
    whole = sum(sample.num_read for sample in samples)
    assert len(bundle_samples(samples, 10_000, num_ranks=1)) == 1
    for bundle in bundle_samples(samples, 10_000, num_ranks=4):
        assert bundle.num_tokens <= whole / 16


def test_cost_counts_what_every_token_attends_to():
    # alone 10 tokens: 100 pairs (half of them seen); two continuations of 4 add 10**2 - 6**2 each
    assert Bundle(0, (0,), (10,)).cost(0.5) == 10 + 0.5 * 100
    assert Bundle(6, (0, 1), (4, 4)).cost(0.5) == 14 + 0.5 * (36 + 2 * 64)


@given(batches, st.integers(24, 200), st.integers(1, 4))
def test_where_prompts_are_not_shared_every_sample_is_alone(samples, capacity, num_ranks):
    bundles = bundle_samples(samples, capacity, num_ranks, shares_prompts=False)
    assert sorted(b.samples for b in bundles) == [(index,) for index in range(len(samples))]
