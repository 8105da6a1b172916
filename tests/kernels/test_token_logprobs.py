"""The chunked op, the Triton kernel and the plain reference agree."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from paceline.kernels import token_logprobs as op


def inputs(num_rows, vocab_size, hidden_size=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    return hidden, weight, targets


def outputs_and_gradients(function, hidden, weight, targets, temperature):
    logprobs, entropy = function(hidden, weight, targets, temperature)
    upstream = torch.linspace(-1, 2, len(targets))
    return logprobs, entropy, *torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 2), (37, 128), (600, 50)])
def test_chunked_op_equals_the_reference_with_gradients(
    num_rows, vocab_size, temperature, monkeypatch
):
    monkeypatch.setattr(op, "MIN_ROWS_PER_CHUNK", 7)
    monkeypatch.setattr(op, "LOGITS_PER_CHUNK", 64)
    tensors = inputs(num_rows, vocab_size)
    got = outputs_and_gradients(op.token_logprobs, *tensors, temperature)
    expected = outputs_and_gradients(op.token_logprobs_reference, *tensors, temperature)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_log_probability_and_entropy_of_a_hand_computed_distribution():
    hidden = torch.tensor([[1.0]])
    weight = torch.log(torch.tensor([[0.5], [0.25], [0.25]]))
    logprobs, entropy = op.token_logprobs(hidden, weight, torch.tensor([1]))
    assert logprobs.exp().item() == pytest.approx(0.25)
    assert (entropy / torch.log(torch.tensor(2.0))).item() == pytest.approx(1.5)


def test_bfloat16_inputs_keep_float32_statistics_and_bfloat16_gradients():
    hidden, weight, targets = inputs(300, 1000, dtype=torch.bfloat16)
    got = outputs_and_gradients(op.token_logprobs, hidden, weight, targets, 1.0)
    expected = outputs_and_gradients(op.token_logprobs_reference, hidden, weight, targets, 1.0)
    assert [t.dtype for t in got] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=0.05, rtol=0.02)


def test_no_positions_give_no_values_and_zero_gradients():
    logprobs, _, *gradients = outputs_and_gradients(op.token_logprobs, *inputs(0, 10), 1.0)
    assert logprobs.shape == (0,)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("of_logprobs", "of_entropy"), [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_both_outputs_are_differentiable_alone_and_together(
    of_logprobs, of_entropy, temperature, monkeypatch
):
    """Against autograd through all logits in float64."""
    monkeypatch.setattr(op, "MIN_ROWS_PER_CHUNK", 7)
    monkeypatch.setattr(op, "LOGITS_PER_CHUNK", 64)
    hidden, weight, targets = inputs(37, 20)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    upstream = torch.linspace(-1, 2, len(targets))

    def gradients(function, leaves):
        logprobs, entropy = function(*leaves, targets, temperature)
        terms = []
        if of_logprobs:
            terms.append(of_logprobs * (logprobs * upstream).sum())
        if of_entropy:
            terms.append(of_entropy * (entropy * upstream.flip(0)).sum())
        return torch.autograd.grad(sum(terms), leaves)

    def in_float64(hidden, weight, targets, temperature):
        all_logprobs = ((hidden @ weight.T) / temperature).log_softmax(-1)
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        return all_logprobs.gather(1, targets[:, None])[:, 0], entropy

    found = gradients(op.token_logprobs, (hidden, weight))
    for ours, exact in zip(found, gradients(in_float64, wide), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=2e-5, rtol=1e-5)


def test_the_gradient_of_entropy_survives_bfloat16_and_no_positions():
    hidden, weight, targets = inputs(300, 1000, dtype=torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    found = torch.autograd.grad(
        op.token_logprobs(hidden, weight, targets)[1].sum(), (hidden, weight)
    )
    exact = torch.autograd.grad(op.token_logprobs_reference(*wide, targets)[1].sum(), wide)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()
    hidden, weight, targets = inputs(0, 10)
    nothing = torch.autograd.grad(op.token_logprobs(hidden, weight, targets)[1].sum(), weight)
    assert not nothing[0].any()


def test_a_loss_without_entropy_does_not_pay_for_its_gradient(monkeypatch):
    asked = []
    plain = op.logits_gradient

    def watched(logprobs, targets, entropy, scale, entropy_scale, is_own):
        asked.append(entropy_scale is not None)
        return plain(logprobs, targets, entropy, scale, entropy_scale, is_own)

    monkeypatch.setattr(op, "logits_gradient", watched)
    logprobs, _ = op.token_logprobs(*inputs(5, 10))
    logprobs.sum().backward()
    assert asked == [False]


def test_chunks_cover_every_row_once_and_stay_bounded():
    chunks = list(op.row_chunks(1_000_000, 1024))
    assert (chunks[0].start, chunks[-1].stop) == (0, 1_000_000)
    assert all(a.stop == b.start for a, b in pairwise(chunks))
    assert all((c.stop - c.start) * 1024 <= op.LOGITS_PER_CHUNK for c in chunks)


INTERPRETED = """
import torch
from paceline.kernels.token_logprobs import row_statistics_eager, row_statistics_triton
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
    for rows, vocab in ((1, 2), (3, 100), (5, 8192), (2, 9000)):
        logits = (4 * torch.randn(rows, vocab)).to(dtype)
        targets = torch.randint(vocab, (rows,))
        for ours, theirs in zip(row_statistics_triton(logits, targets, 0.8),
                                row_statistics_eager(logits, targets, 0.8)):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from paceline.kernels.token_logprobs import row_statistics_kernel
pointers = dict.fromkeys(["targets_ptr"], "*i64") | dict.fromkeys(
    ["logprobs_ptr", "entropy_ptr", "logsumexp_ptr"], "*fp32")
scalars = {"row_stride": "i32", "vocab_size": "i32", "inverse_temperature": "fp32",
           "BLOCK": "constexpr"}
for logits in ("*fp32", "*bf16"):
    for capability in (80, 90):
        source = ASTSource(row_statistics_kernel, {"logits_ptr": logits} | pointers | scalars,
                           {"BLOCK": 8192})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                                  options={"num_warps": 8})
        assert compiled.asm["cubin"]
"""


@pytest.mark.skipif(not op.HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("script", "interpret"), [(INTERPRETED, "1"), (COMPILED, "0")])
def test_triton_kernel_equals_eager_when_interpreted_and_compiles_for_sm80_and_sm90(
    script, interpret
):
    """In processes of their own: the interpreter is chosen when triton is first imported."""
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiled kernel needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_kernel_equals_eager_on_a_gpu(dtype):
    logits = (4 * torch.randn(300, 50_000, device="cuda")).to(dtype)
    targets = torch.randint(50_000, (300,), device="cuda")
    for ours, theirs in zip(
        op.row_statistics_triton(logits, targets, 0.8),
        op.row_statistics_eager(logits, targets, 0.8),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
