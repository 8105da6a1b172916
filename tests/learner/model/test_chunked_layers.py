"""Going through a row in chunks is going through the row: every value and every gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from paceline.configs.errors import ModelError
from paceline.configs.schema.learner import LearnerConfig
from paceline.learner.model.attention import chunks_of
from paceline.learner.model.chunked_layers import chunk_layers
from paceline.learner.model.model import load_policy, write_initial_model
from tests.learner import ranks
from tests.learner.conftest import VOCAB_SIZE, model_config, random_batch
from tests.learner.engines.test_ranks import relative_error
from tests.learner.model.live_memory import LiveMemory
from tests.learner.model.test_attention import CPU, gradients, logits, packed_row, random_sequences
from tests.learner.test_worker import assert_same


@st.composite
def layouts(draw):
    """Lengths of a row's sequences, and for each which earlier one it continues (-1: none)."""
    lengths, prefixes = [], []
    for index in range(draw(st.integers(1, 6))):
        whole = [i for i in range(index) if prefixes[i] < 0]
        lengths.append(draw(st.integers(1, 9)))
        prefixes.append(draw(st.sampled_from([-1, *whole])))
    return lengths, prefixes


def values_and_gradients(policy, row):
    policy.zero_grad()
    (values,) = policy(row, logits)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    (values * weights).sum().backward()
    return values.detach(), gradients(policy)


def assert_equal_passes(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    assert found[1].keys() == expected[1].keys()
    scales = {name: gradient.abs().max().item() for name, gradient in expected[1].items()}
    # where every sequence has one token, those of queries and keys are rounding alone, of 1e-7 of
    # the largest
    floor = 0.1 * max(scales.values())
    for name, gradient in expected[1].items():
        scale = max(scales[name], floor)
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5 * scale, rtol=1e-5)


@pytest.fixture(scope="module")
def policies(model_folder):
    return load_policy(model_folder), load_policy(model_folder)


@given(layout=layouts(), tokens_per_chunk=st.integers(1, 60))
@example(layout=([1, 1], [-1, -1]), tokens_per_chunk=1)
def test_any_layout_in_chunks_of_any_size_has_the_gradients_of_the_whole_row(
    policies, layout, tokens_per_chunk
):
    whole, chunked = policies
    lengths, prefixes = layout
    row = packed_row(random_sequences(lengths), prefixes)
    chunk_layers(chunked.causal_lm, tokens_per_chunk)
    assert_equal_passes(values_and_gradients(chunked, row), values_and_gradients(whole, row))


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("qwen3", {"tie_word_embeddings": False}),
        ("qwen2", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ],
)
def test_every_family_can_be_trained_in_chunks(model_type, extra, tmp_path):
    folder = str(tmp_path)
    write_initial_model(model_config(model_type, **extra), VOCAB_SIZE, 1, seed=0, folder=folder)
    row = packed_row(random_sequences([9, 4, 9, 3]), [-1, -1, 0, 0])
    chunked = load_policy(folder, checkpointing="chunks", tokens_per_chunk=4)
    expected = values_and_gradients(load_policy(folder), row)
    assert_equal_passes(values_and_gradients(chunked, row), expected)


@given(layout=layouts(), tokens_per_chunk=st.integers(1, 60))
def test_every_query_of_a_chunk_sees_what_it_sees_in_the_row(layout, tokens_per_chunk):
    lengths, prefixes = layout
    whole = packed_row(random_sequences(lengths), prefixes).segments
    seen = visible(whole, sum(lengths))
    found = []
    for chunk in chunks_of(whole.segments, tokens_per_chunk, CPU):
        found += visible(chunk, len(found) + int(chunk.query_boundaries[-1]))
    assert found == seen


def visible(packed, stop):
    """For every query the places of the keys it sees, in order, ``stop`` being after the last."""
    places = packed.keys_among(torch.arange(stop)).tolist()
    queries, keys = packed.query_boundaries.tolist(), packed.key_boundaries.tolist()
    return [
        places[first : after - (end - query)]
        for start, end, first, after in zip(queries, queries[1:], keys, keys[1:], strict=False)
        for query in range(start + 1, end + 1)
    ]


def test_a_layer_keeps_nothing_but_its_input(model_folder):
    row = packed_row(random_sequences([40]))
    kept = {}
    for tokens_per_chunk in (None, 8):
        policy = load_policy(model_folder)
        if tokens_per_chunk is not None:
            chunk_layers(policy.causal_lm, tokens_per_chunk)
        sizes = kept[tokens_per_chunk] = []
        layer = policy.decoder_layers[0]
        hidden = torch.randn(1, 40, 32, requires_grad=True)
        rotary = policy.causal_lm.base_model.rotary_emb(hidden, row.positions)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            layer(
                hidden,
                attention_mask=None,
                position_ids=row.positions,
                position_embeddings=rotary,
                packed_segments=row.segments,
            )
    assert kept[8] == [hidden.numel()]
    assert sum(kept[None]) > 10 * hidden.numel()


def test_memory_of_a_longer_row_is_that_of_its_layers_inputs(model_folder):
    """Twice the row: twice the inputs of layers, and a few tensors of that size while one works."""

    def peak(num_tokens, **settings):
        policy = load_policy(model_folder, **settings)
        row = packed_row(random_sequences([num_tokens]))
        with LiveMemory() as memory:
            hidden = policy.hidden_states(row)
            hidden.sum().backward()
        return memory.peak

    def growth(**settings):
        """Tensors [1, T, H] in float32 that one more token adds to."""
        return (peak(512, **settings) - peak(256, **settings)) / (256 * 32 * 4)

    num_layers = 2
    chunked = growth(checkpointing="chunks", tokens_per_chunk=32)
    assert chunked < num_layers + 10
    assert growth(checkpointing="layers") > 2 * chunked
    assert growth() > 3 * chunked


def bfloat16_gradients(folder, row, **settings):
    policy = load_policy(folder, **settings).to(torch.bfloat16)
    return {name: g.float().numpy() for name, g in values_and_gradients(policy, row)[1].items()}


def test_many_chunks_round_no_more_than_the_whole_row(model_folder):
    """Gradients of chunks are summed in float32: in bfloat16 each sum would round again."""
    row = packed_row(random_sequences([200, 56]))
    exact = values_and_gradients(load_policy(model_folder), row)[1]
    whole = bfloat16_gradients(model_folder, row)
    chunked = bfloat16_gradients(model_folder, row, checkpointing="chunks", tokens_per_chunk=4)
    for name, gradient in exact.items():
        error = relative_error(chunked[name], gradient.numpy())
        assert error < 1.2 * relative_error(whole[name], gradient.numpy()) + 1e-3, name


@pytest.mark.slow
def test_chunks_on_two_ranks_change_no_gradient(on_ranks):
    batch = random_batch(num_samples=15)
    [(_, expected)] = on_ranks(1, ranks.gradients, batch)
    chunks = {"activation_checkpointing": "chunks", "tokens_per_chunk": 7}
    [(_, alone)] = on_ranks(1, ranks.gradients, batch, **chunks)
    [(_, found), _] = on_ranks(2, ranks.gradients, batch, **chunks)
    assert_same(alone, expected, 1e-5)
    assert_same(found, expected, 1e-5)


@pytest.mark.slow
def test_chunks_in_bfloat16_are_the_row_in_bfloat16(on_ranks):
    batch = random_batch(num_samples=15)
    [(_, expected)] = on_ranks(1, ranks.gradients, batch, precision="bfloat16")
    chunks = {"activation_checkpointing": "chunks", "tokens_per_chunk": 7}
    [(_, found), _] = on_ranks(2, ranks.gradients, batch, precision="bfloat16", **chunks)
    for name, gradient in expected.items():
        assert found[name].dtype == np.float32
        assert relative_error(found[name], gradient) < 0.03, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "divided",
    [
        {"parallel": {"pipeline": 2}},
        {"parallel": {"replicate": 2}},
        {"engine": "deepspeed", "deepspeed": {"stage": 2}},
    ],
    ids=str,
)
def test_a_step_in_chunks_is_that_of_one_process_whatever_divides_the_ranks(on_ranks, divided):
    batches = [random_batch(num_samples=15)]
    [(_, expected)] = on_ranks(1, ranks.train, batches)
    chunks = {"activation_checkpointing": "chunks", "tokens_per_chunk": 7}
    found = {}
    for _, of_rank in on_ranks(2, ranks.train, batches, **chunks, **divided):
        found |= of_rank
    assert_same(found, expected, 1e-3)


def test_layers_that_are_not_known_are_not_chunked(model_folder):
    policy = load_policy(model_folder)
    policy.causal_lm.config.model_type = "bloom"
    with pytest.raises(ModelError, match="knows the layers of llama, qwen2, qwen3, not of bloom"):
        chunk_layers(policy.causal_lm, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "deepspeed", "deepspeed": {"stage": 3}}, "ZeRO stage 3 gathers"),
        ({"num_ranks": 2, "parallel": {"sequence": 2}}, "divides them over ranks"),
    ],
)
def test_what_divides_rows_or_weights_otherwise_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        LearnerConfig(activation_checkpointing="chunks", **settings)


def test_yes_and_no_still_mean_layers_and_none():
    found = [LearnerConfig(activation_checkpointing=value) for value in (True, False)]
    assert [config.activation_checkpointing for config in found] == ["layers", "none"]
