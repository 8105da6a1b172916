"""A packed row computes what each sequence computes alone: values and every gradient."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from paceline.configs.errors import ModelError
from paceline.learner.model.attention import (
    PackedSegments,
    Run,
    Segment,
    flash_attention,
    packed_attention,
    run_by_run_attention,
)
from paceline.learner.model.model import PackedRow, load_policy, write_initial_model
from tests.learner.conftest import VOCAB_SIZE, model_config

CPU = torch.device("cpu")


def packed_row(sequences, prefixes=()):
    """``prefixes[i]``: which earlier sequence the i-th continues, -1 for none."""
    segments = []
    for sequence, prefix in zip_longest(sequences, prefixes, fillvalue=-1):
        end = segments[-1].start + segments[-1].length if segments else 0
        root = segments[prefix] if prefix >= 0 else Segment(0, 0)
        segments.append(Segment(end, len(sequence), root.start, root.length))
    packed = PackedSegments.from_segments(segments, CPU)
    tokens = torch.from_numpy(np.concatenate(sequences))[None]
    every = torch.arange(tokens.numel())
    return PackedRow(tokens, packed.positions()[None], packed, every, tokens[0])


def logits(hidden, weight, targets):
    return (hidden @ weight.T,)


def random_sequences(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB_SIZE, length) for length in lengths]


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("qwen2", {}),
        ("llama", {"num_key_value_heads": 4}),
    ],
)
def test_packed_logits_and_every_gradient_equal_those_of_single_sequences(
    model_type, settings, tmp_path
):
    config = model_config(model_type, **settings)
    write_initial_model(config, VOCAB_SIZE, 1, seed=3, folder=str(tmp_path))
    policy = load_policy(str(tmp_path))
    sequences = random_sequences([9, 9, 5, 1, 5, 30])
    (packed,) = policy(packed_row(sequences), logits)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    (packed * weights).sum().backward()

    alone = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    single = [alone(torch.from_numpy(s)[None]).logits[0] for s in sequences]
    (torch.cat(single) * weights).sum().backward()

    torch.testing.assert_close(packed, torch.cat(single), atol=1e-5, rtol=1e-5)
    expected = gradients(alone)
    for name, gradient in gradients(policy.causal_lm).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * scale, rtol=1e-5)


def test_what_a_sequence_computes_depends_neither_on_its_place_nor_on_its_neighbours(model_folder):
    policy = load_policy(model_folder)
    sequences = random_sequences([7, 4, 7, 12, 4])
    for order in ([0, 1, 2, 3, 4], [3, 0, 2, 1, 4], [4, 2], [1]):
        (together,) = policy(packed_row([sequences[i] for i in order]), logits)
        for index, values in zip(
            order, together.split([len(sequences[i]) for i in order]), strict=True
        ):
            (alone,) = policy(packed_row([sequences[index]]), logits)
            torch.testing.assert_close(values, alone, atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_recomputes_layers_and_changes_no_gradient(model_folder):
    found = []
    for checkpointing in ("none", "layers"):
        policy = load_policy(model_folder, checkpointing=checkpointing)
        calls = []
        mlp = policy.decoder_layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        (values,) = policy(packed_row(random_sequences([7, 4])), logits)
        values.square().sum().backward()
        found.append(gradients(policy))
        assert len(calls) == 1 + (checkpointing == "layers")
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-6)


def test_dropout_of_a_models_configuration_is_never_applied(tmp_path):
    config = model_config(attention_dropout=0.5)
    write_initial_model(config, VOCAB_SIZE, 1, seed=0, folder=str(tmp_path))
    policy = load_policy(str(tmp_path), checkpointing="layers")
    row = packed_row(random_sequences([9]))
    assert torch.equal(policy(row, logits)[0], policy(row, logits)[0])


def test_continuations_of_a_shared_prefix_compute_what_whole_sequences_do(model_folder):
    policy = load_policy(model_folder)
    sequences = random_sequences([6, 3, 5, 5, 1, 4])
    prefixes = [-1, -1, 0, 0, 0, 1]
    (shared,) = policy(packed_row(sequences, prefixes), logits)
    weights = torch.randn(shared.shape, generator=torch.Generator().manual_seed(0))
    (shared * weights).sum().backward()
    shared_gradients = gradients(policy)

    policy.zero_grad()
    whole = [
        sequence if prefix < 0 else np.concatenate([sequences[prefix], sequence])
        for sequence, prefix in zip(sequences, prefixes, strict=True)
    ]
    (values,) = policy(packed_row(whole), logits)
    of_whole = values.split([len(sequence) for sequence in whole])
    own = torch.cat([v[-len(s) :] for v, s in zip(of_whole, sequences, strict=True)])
    (own * weights).sum().backward()
    torch.testing.assert_close(shared, own, atol=1e-5, rtol=1e-5)
    for name, expected in gradients(policy).items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(shared_gradients[name], expected, atol=1e-5 * scale, rtol=1e-5)


def test_segments_of_equal_shape_side_by_side_form_one_run():
    segments = [Segment(0, 5), Segment(5, 5), Segment(10, 3, 5, 5), Segment(13, 3, 0, 5)]
    packed = PackedSegments.from_segments(segments, CPU)
    assert packed.runs == (Run(2, 0, 5), Run(2, 5, 3))
    assert packed.query_boundaries.tolist() == [0, 5, 10, 13, 16]
    assert packed.key_boundaries.tolist() == [0, 5, 10, 18, 26]
    assert (packed.max_queries, packed.max_keys) == (5, 8)
    assert packed.positions().tolist() == [*range(5), *range(5), 5, 6, 7, 5, 6, 7]
    keys = [*range(10), *range(5, 10), 10, 11, 12, *range(5), 13, 14, 15]
    assert packed.keys.tolist() == keys


def test_a_row_without_shared_prefixes_gathers_nothing():
    assert PackedSegments.from_segments([Segment(0, 2), Segment(2, 1)], CPU).keys is None


SHARED = [Segment(0, 50), Segment(50, 7), Segment(57, 30, 0, 50), Segment(87, 30, 50, 7)]


def heads(device):
    """Random query (4 heads), key and value (2 heads) for ``SHARED``, [117, heads, 64]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(117, number, 64) for number in (4, 2, 2)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("segments", [SHARED, SHARED[:2]])
def test_flash_attention_takes_packed_rows(segments):
    """Shapes only: without a GPU the kernel cannot run, but its signature can be kept to."""
    packed = PackedSegments.from_segments(segments, torch.device("meta"))
    query, key, value = (tensor.to("meta") for tensor in heads("cpu"))
    assert flash_attention(query, key, value, packed, 0.125).shape == query.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
def test_flash_attention_equals_dense_batches_with_gradients():
    cuda = torch.device("cuda")
    packed = PackedSegments.from_segments(SHARED, cuda)
    found = []
    for attend in (flash_attention, run_by_run_attention):
        tensors = heads(cuda)
        output = attend(*tensors, packed, 0.125)
        output.float().square().sum().backward()
        found.append([output.detach(), *(tensor.grad for tensor in tensors)])
    for flash, dense in zip(*found, strict=True):
        torch.testing.assert_close(flash, dense, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("extra", "words"),
    [({"sliding_window": 4}, "sliding window of 4"), ({"softcap": 30.0}, "caps attention scores")],
)
def test_attention_that_is_more_than_causal_softmax_is_refused(extra, words):
    packed = PackedSegments.from_segments([Segment(0, 5)], CPU)
    query = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ModelError, match=words):
        packed_attention(
            nn.Linear(1, 1), query, query, query, None, packed_segments=packed, **extra
        )
