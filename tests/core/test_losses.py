import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.losses import next_token_loss, policy_loss, value_loss
from pipeline.core.tensors import logprobs_and_entropy, masked_mean, response_mask

NAN, INF = math.nan, math.inf


def close(actual: Tensor, expected: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


# next token


def sentences(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits (3, 6, 7) and labels (3, 6) with an uncounted prompt, uncounted padding and a hole."""
    g = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(3, 6, 7, generator=g), torch.randint(0, 7, (3, 6), generator=g)
    labels[0, :2] = labels[1, 4:] = labels[2, 3] = -100
    return logits.to(dtype).requires_grad_(), labels


def test_smoothing_by_hand():
    # -log p = [.407606, 1.407606, 2.407606]; .9 * .407606 + .05 * (1.407606 + 2.407606)
    loss, mask = next_token_loss(torch.tensor([[[2.0, 1.0, 0.0], [NAN] * 3]]), torch.tensor([[2, 0]]), 0.1)
    close(loss, [[0.557606]])
    assert mask.tolist() == [[True]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_is_the_definition_token_by_token(smoothing):
    logits, labels = sentences()
    loss, mask = next_token_loss(logits.detach(), labels, smoothing)
    log_p = logits.detach().double().log_softmax(-1)
    for b in range(3):
        for s in range(5):
            y = int(labels[b, s + 1])
            assert bool(mask[b, s]) == (y != -100)
            wrong = [float(-log_p[b, s, v]) for v in range(7) if v != y]
            expected = 0.0 if y == -100 else (1 - smoothing) * float(-log_p[b, s, y]) + smoothing * sum(wrong) / 6
            assert float(loss[b, s]) == pytest.approx(expected, abs=1e-5)
    assert mask.sum().item() == 15 - 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_is_pytorchs_with_its_share_of_the_right_token_taken_back(smoothing):
    logits, labels = sentences()
    masked_mean(*next_token_loss(logits, labels, smoothing)).backward()
    ours, logits.grad = logits.grad, None
    oracle = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=smoothing * 7 / 6
    )
    oracle.backward()
    close(masked_mean(*next_token_loss(logits, labels, smoothing)), oracle.detach())
    close(ours, logits.grad)
    assert ours[:, -1].eq(0).all()
    assert ours.ne(0).any()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_uncounted_positions_reach_neither_loss_nor_gradient(poison, smoothing):
    (good, labels), (bad, _) = sentences(), sentences()
    counted = torch.cat([labels[:, 1:] != -100, torch.zeros(3, 1).bool()], dim=1)
    with torch.no_grad():
        bad[~counted] = poison
    losses = [next_token_loss(logits, labels, smoothing)[0] for logits in (good, bad)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.sum().backward()
    assert torch.equal(good.grad, bad.grad)
    assert good.grad[~counted].eq(0).all()


def test_logits_at_s_move_the_loss_at_s_alone():
    logits, labels = sentences()
    before = next_token_loss(logits, labels, 0.1)[0]
    with torch.no_grad():
        logits[1, 2, 4] += 1
    moved = (next_token_loss(logits, labels, 0.1)[0] - before).ne(0)
    assert moved.nonzero().tolist() == [[1, 2]]


def test_a_forbidden_token_costs_nothing_without_smoothing():
    logits, labels = sentences()
    labels[labels == 6] = 5
    with torch.no_grad():
        logits[..., 6] = -INF
    loss, _ = next_token_loss(logits, labels, 0.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_bfloat16_logits_give_a_float32_loss():
    logits, labels = sentences(torch.bfloat16)
    loss, _ = next_token_loss(logits, labels, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, next_token_loss(logits.float(), labels, 0.1)[0])


def test_no_label_no_loss_and_a_zero_gradient():
    logits, labels = sentences()
    loss, mask = next_token_loss(logits, torch.full_like(labels, -100), 0.1)
    loss.sum().backward()
    assert not mask.any()
    assert loss.eq(0).all()
    assert logits.grad.eq(0).all()


def test_the_backward_pass_keeps_one_array_of_counted_rows_by_vocabulary():
    logits, labels = sentences(torch.bfloat16)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, mask = next_token_loss(logits, labels, 0.1)
    rows = int(mask.sum())
    assert [size for size in kept.values() if size > 2 * rows] == [rows * 7]
    assert loss.requires_grad


# clipped policy


def policy(ratios: list[float], advantages: list[float]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    logprobs = (torch.tensor([ratios]).log() - 1.7).requires_grad_()
    old = torch.full_like(logprobs, -1.7)
    mask = torch.ones_like(logprobs).bool()
    loss, statistics = policy_loss(logprobs, old, torch.tensor([advantages]), mask, 0.2)
    loss.sum().backward()
    return loss.detach(), statistics, logprobs.grad


def test_policy_loss_values_and_gradients():
    loss, statistics, gradient = policy([1.3, 1.3, 0.7, 0.7, 1.0], [1.0, -2.0, 1.0, -2.0, -2.0])
    close(loss, [[-1.2, 2.6, -0.7, 1.6, 2.0]])
    assert statistics["clipped"].tolist() == [[True, False, False, True, False]]
    close(statistics["ratio"], [[1.3, 1.3, 0.7, 0.7, 1.0]])
    close(gradient, [[0, 2.6, -0.7, 0, 2.0]])  # -A r where it is not clipped
    assert gradient[0, [0, 3]].eq(0).all()


def test_a_token_is_clipped_where_the_clipped_branch_is_larger():
    loss, statistics, _ = policy([1.3, 0.7, 1.1, 0.9], [1.0, 1.0, -1.0, -1.0])
    close(loss, [[-1.2, -0.7, 1.1, 0.9]])
    close(loss.mean(), 0.025)
    assert statistics["clipped"].float().mean().item() == 0.25
    close(statistics["approx_kl"].mean(), 0.02703, atol=5e-6)
    assert not any(x.requires_grad for x in statistics.values())


def test_equal_policies_have_ratio_one_exactly():
    logprobs = -torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) * 9
    _, statistics = policy_loss(logprobs, logprobs, torch.randn(3, 5), torch.ones(3, 5).bool(), 0.2)
    assert statistics["ratio"].eq(1).all()
    assert statistics["approx_kl"].eq(0).all()
    assert not statistics["clipped"].any()


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logits = torch.tensor([[[1.0, 2.0, 1.0, 1.0]]], requires_grad=True)
    logprobs = logprobs_and_entropy(logits, torch.tensor([[1]]), 1.0)[0]
    loss, _ = policy_loss(logprobs, logprobs.detach(), torch.ones(1, 1), torch.ones(1, 1).bool(), 0.2)
    loss.sum().backward()
    close(logits.grad[0, 0], [0.174878, -0.524633, 0.174878, 0.174878])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("difference", [200.0, -200.0])
def test_an_exploding_log_ratio_stays_finite(difference, advantage):
    logprobs = torch.tensor([[difference]], requires_grad=True)
    loss, statistics = policy_loss(
        logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1).bool(), 0.2
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad.isfinite().all()
    assert statistics["approx_kl"].item() == 20_000
    assert statistics["ratio"].item() == pytest.approx(math.exp(math.copysign(20, difference)))


# clipped value


def test_value_loss_values_and_gradients():
    values = torch.tensor([[0.9, 0.2, 0.65, 1.5]], requires_grad=True)
    old, returns = torch.full((1, 4), 0.5), torch.ones(1, 4)
    loss, statistics = value_loss(values, old, returns, torch.ones(1, 4).bool(), 0.2)
    close(loss, [[0.045, 0.32, 0.06125, 0.125]])
    assert statistics["clipped"].tolist() == [[True, False, False, False]]
    loss.sum().backward()
    close(values.grad, [[0, -0.8, -0.35, 0.5]])  # V - R where it is not clipped
    assert values.grad[0, 0].item() == 0
    assert not statistics["clipped"].requires_grad


# what both have in common

MASK = response_mask(torch.tensor([2, 5, 1]), 5)


def rows(seed: int) -> list[Tensor]:
    return [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]


@pytest.mark.parametrize("loss_function", [policy_loss, value_loss])
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
def test_masked_positions_reach_no_loss_statistic_or_gradient(loss_function: Callable, poison: float):
    outputs, gradients = [], []
    for fill in (0.0, poison):
        inputs = [x.masked_fill(~MASK, fill).requires_grad_() for x in rows(3)]
        loss, statistics = loss_function(*inputs, MASK, 0.2)
        loss.sum().backward()  # without a second mask: the loss itself is clean
        outputs.append([loss.detach(), *statistics.values()])
        gradients.append([x.grad for x in inputs])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
        assert a[~MASK].eq(0).all()
    assert outputs[0][0][~MASK].eq(0).all()
    assert outputs[0][0][MASK].ne(0).all()
    assert not outputs[0][-1][~MASK].any()
    assert gradients[0][0][MASK].ne(0).any()


@pytest.mark.parametrize("loss_function", [policy_loss, value_loss])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_gradient_does_not_depend_on_the_micro_batch(loss_function: Callable, micro: int):
    whole = [x.requires_grad_() for x in rows(7)]
    masked_mean(loss_function(*whole, MASK, 0.2)[0], MASK).backward()
    parts = [x.requires_grad_() for x in rows(7)]
    for s in range(0, 3, micro):
        loss, _ = loss_function(*(x[s : s + micro] for x in parts), MASK[s : s + micro], 0.2)
        masked_mean(loss, MASK[s : s + micro], MASK.sum()).backward()
    close(parts[0].grad, whole[0].grad)
    assert whole[0].grad.ne(0).any()
