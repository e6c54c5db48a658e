import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.tensors import (
    logits_without,
    logprobs_and_entropy,
    masked_mean,
    masked_moments,
    masked_sum,
    position_ids,
    response_length,
    response_mask,
    whiten,
)

PAD, EOS = 0, 9
NAN, INF = math.nan, math.inf


def close(actual: Tensor, expected: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    return logprobs_and_entropy(logits, torch.zeros(logits.shape[:-1], dtype=torch.long), temperature)[1]


def on_processes(function: Callable, shards: list[tuple]) -> list:
    """Runs function(*shard, reduce) for all shards at once, where reduce really sums over them."""
    barrier, sent = Barrier(len(shards), timeout=20), [torch.empty(0)] * len(shards)

    def run(rank: int) -> object:
        def reduce(x: Tensor) -> Tensor:
            sent[rank] = x
            barrier.wait()
            total = torch.stack(sent).sum(dim=0)
            barrier.wait()
            return total

        return function(*shards[rank], reduce)

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(run, range(len(shards))))


# positions and masks


def test_position_ids_are_the_exclusive_count():
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [1] * 7]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 1, 2, 3, 4, 4], list(range(7))]
    assert position_ids(mask).dtype == torch.long


@pytest.mark.parametrize("pads", [0, 1, 5, 17])
def test_left_padding_moves_no_real_token(pads):
    mask = torch.tensor([[False] * pads + [True] * 4 + [False] * 3])
    assert position_ids(mask)[mask].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_the_eos_counts_even_when_it_is_also_the_padding(pad):
    length, has_eos = response_length(torch.tensor([[7, 8, EOS, pad, pad]]), EOS)
    assert (length.tolist(), has_eos.tolist()) == ([3], [True])
    assert response_mask(length, 5).tolist() == [[True, True, True, False, False]]


def test_the_first_eos_decides():
    response = torch.tensor([[7, EOS, 3, EOS], [7, 8, 7, 8], [EOS, 1, 2, 3], [1, 2, 3, EOS], [EOS] * 4])
    length, has_eos = response_length(response, EOS)
    assert length.tolist() == [2, 4, 1, 4, 1]
    assert has_eos.tolist() == [True, False, True, True, True]
    assert length.dtype == torch.long
    assert has_eos.dtype == torch.bool


def test_response_length_is_what_list_index_says():
    responses = torch.randint(0, 5, (200, 7), generator=torch.Generator().manual_seed(0))
    length, has_eos = response_length(responses, 3)
    rows = responses.tolist()
    assert length.tolist() == [row.index(3) + 1 if 3 in row else 7 for row in rows]
    assert has_eos.tolist() == [3 in row for row in rows]
    assert 0 < sum(has_eos.tolist()) < 200


# sums and means


def test_masked_mean_of_numbers_and_of_booleans():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF]])
    assert masked_sum(x, mask).item() == 9
    assert masked_mean(x, mask).item() == 3
    assert masked_mean(x, mask, torch.tensor(18)).item() == 0.5
    assert masked_mean(torch.tensor([[True, False, True], [False, True, True]]), mask).item() == pytest.approx(1 / 3)


def test_one_global_denominator_makes_micro_batches_one_batch():
    long, short = torch.full((1, 6), 1.0), torch.tensor([[4.0, 4.0, NAN, NAN, NAN, NAN]])
    masks = torch.ones(1, 6).bool(), response_mask(torch.tensor([2]), 6)
    count = masks[0].sum() + masks[1].sum()
    assert sum(masked_mean(x, m, count).item() for x, m in zip((long, short), masks, strict=True)) == 1.75
    assert masked_mean(torch.cat([long, short]), torch.cat(masks)).item() == 1.75


def test_a_mask_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"\(2,\).*\(2, 2\)"):
        masked_sum(torch.ones(2), torch.ones(2, 2).bool())


def test_masked_mean_of_nan_has_a_clean_gradient():
    x = torch.tensor([[1.0, NAN], [3.0, INF]], requires_grad=True)
    masked_mean(x, torch.tensor([[True, False], [True, False]])).backward()
    assert x.grad.tolist() == [[0.5, 0], [0.5, 0]]


# log-probabilities and entropy

THREE = torch.tensor([[2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("temperature", "p", "h"),
    [(1.0, [0.665241, 0.244728, 0.090031], 0.832396), (0.7, [0.770960, 0.184761, 0.044278], 0.650573)],
)
def test_the_temperature_divides_the_logits(temperature, p, h):
    logits, tokens = THREE.expand(1, 3, 3), torch.tensor([[0, 1, 2]])
    logprobs = logprobs_and_entropy(logits, tokens, temperature)[0]
    close(logprobs.exp()[0], p)
    close(entropy(logits, temperature)[0], [h] * 3)
    if temperature == 0.7:
        close(logprobs[0, [0, 2]], [-0.260118, -3.117261])
        close((logprobs_and_entropy(logits, tokens, 1.0)[0] - logprobs).exp()[0], [0.8629, 1.3246, 2.0333], atol=5e-5)


@pytest.mark.parametrize(
    ("temperature", "gradient"),
    [(1.0, [-0.28259, 0.14077, 0.14182]), (0.7, [-0.43004, 0.27401, 0.15603])],
)
def test_the_gradient_of_the_entropy(temperature, gradient):
    z = THREE[None].clone().requires_grad_()
    entropy(z, temperature).sum().backward()
    close(z.grad[0, 0], gradient, atol=1e-5)


def crooked_logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return (8 * torch.randn(2, 5, 11, generator=g)).to(dtype), torch.randint(0, 11, (2, 5), generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_and_entropy_equal_a_categorical_in_float64_whatever_the_logits_type(dtype):
    logits, tokens = crooked_logits(dtype)
    oracle = torch.distributions.Categorical(logits=logits.double() / 0.7)
    logprobs, h = logprobs_and_entropy(logits, tokens, 0.7)
    assert logprobs.dtype == h.dtype == torch.float32
    close(logprobs, oracle.log_prob(tokens), atol=1e-5)
    close(h, oracle.entropy(), atol=1e-5)


def test_logprobs_are_never_rounded_after_the_gather():
    logits = torch.tensor([[[2510.26788, 0.0]]])
    close(logprobs_and_entropy(logits, torch.tensor([[1]]), 1.0)[0], [[-2510.26788]], atol=5e-4)


def test_a_forbidden_token_leaves_the_distribution_of_the_others():
    logits, tokens = crooked_logits()
    tokens = tokens.clamp(max=8)
    kept = [v for v in range(11) if v not in (9, 10)]
    full, part = logits.clone().requires_grad_(), logits[..., kept].clone().requires_grad_()
    banned = logits_without(full, [9, 10])
    assert banned[..., 9:].eq(-INF).all()
    assert full[..., 9:].isfinite().all()
    for a, b in (
        (logprobs_and_entropy(banned, tokens, 0.7)[0], logprobs_and_entropy(part, tokens, 0.7)[0]),
        (entropy(banned, 0.7), entropy(part, 0.7)),
        (torch.stack(logprobs_and_entropy(banned, tokens, 0.7)), torch.stack(logprobs_and_entropy(part, tokens, 0.7))),
    ):
        close(a, b)
        full.grad = part.grad = None
        weights = torch.linspace(-1, 2, a.numel()).view(a.shape)
        (a * weights).sum().backward(retain_graph=True)
        (b * weights).sum().backward()
        close(full.grad[..., kept], part.grad)
        assert full.grad[..., 9:].eq(0).all()


def test_the_logprob_of_a_forbidden_token_is_minus_infinity_and_harmless_under_a_mask():
    logits, _ = crooked_logits()
    logits.requires_grad_()
    logprobs, h = logprobs_and_entropy(logits_without(logits, [PAD]), torch.full((2, 5), PAD), 0.7)
    assert logprobs.eq(-INF).all()
    assert h.isfinite().all()
    (masked_sum(logprobs, torch.zeros(2, 5).bool()) + h.sum()).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[..., PAD].eq(0).all()


def test_the_gradient_of_a_logprob_is_one_hot_minus_p():
    logits, tokens = crooked_logits()
    logits.requires_grad_()
    logprobs_and_entropy(logits, tokens, 0.7)[0].sum().backward()
    p = (logits.detach().double() / 0.7).softmax(-1)
    close(logits.grad, (F.one_hot(tokens, 11) - p) / 0.7, atol=1e-5)


# whitening

X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])
X_MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_whitening_is_masked_and_biased():
    close(whiten(X, X_MASK), [[-1.414214, -0.707107, 0], [0.707107, 1.414214, 0]])
    mean, variance = masked_moments(X, X_MASK)
    assert (mean.item(), variance.item()) == (3, 2)
    assert mean.dtype == torch.float64


def test_whitening_without_the_shift_is_whitening_plus_the_mean():
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    unshifted = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
    close(whiten(x, torch.ones(3, 3).bool()) + 1.6, unshifted, atol=6e-5)


def test_whitening_gives_mean_zero_and_variance_one():
    g = torch.Generator().manual_seed(2)
    mask = response_mask(torch.tensor([1, 7, 4, 6]), 7)
    white = whiten(3 + 5 * torch.randn(4, 7, generator=g), mask)
    assert white.dtype == torch.float32
    assert white[~mask].eq(0).all()
    real = white[mask].double().numpy()
    assert abs(real.mean()) < 1e-6
    assert abs(real.var() - 1) < 1e-6


def test_whitening_takes_two_passes():
    x = torch.tensor([[1.0, 2.0, 3.0]]).double() + 1e9
    close(whiten(x, torch.ones(1, 3).bool()), [[-1.224745, 0, 1.224745]])


def test_the_moments_of_float32_numbers_are_summed_in_float64():
    x = 1e4 + torch.randn(8, 513, generator=torch.Generator().manual_seed(4))
    real = x.double().numpy()
    close(whiten(x, torch.ones(8, 513).bool()), (real - real.mean()) / np.sqrt(real.var() + 1e-8))


def test_one_token_whitens_to_zero():
    white = whiten(torch.tensor([[5.0, NAN]]), torch.tensor([[True, False]]))
    assert white.tolist() == [[0, 0]]


def test_whitening_on_two_processes_is_whitening_on_one():
    shards = [
        (torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3).bool()),
        (torch.tensor([[10.0, 12.0, NAN]]), torch.tensor([[True, True, False]])),
        (torch.full((1, 3), NAN), torch.zeros(1, 3).bool()),
    ]
    white = torch.cat(on_processes(whiten, shards))
    close(white, [[-1.022475, -0.800198, -0.57792], [0.978019, 1.422574, 0], [0, 0, 0]])
    assert torch.equal(white, whiten(torch.cat([x for x, _ in shards]), torch.cat([m for _, m in shards])))
    for mean, variance in on_processes(masked_moments, shards):
        assert mean.item() == pytest.approx(5.6)
        assert variance.item() == pytest.approx(20.24)


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
def test_whitening_ignores_what_stands_at_masked_positions(poison):
    bad, good = X.clone(), X.clone()
    bad[~X_MASK], good[~X_MASK] = poison, 0
    weights = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, 7.0]])
    gradients = []
    for x in (bad.requires_grad_(), good.requires_grad_()):
        (whiten(x, X_MASK) * weights).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(whiten(bad, X_MASK), whiten(good, X_MASK))
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].isfinite().all()
    assert gradients[0][~X_MASK].eq(0).all()
    assert gradients[0][X_MASK].ne(0).any()
    assert np.isfinite(whiten(bad, X_MASK).detach().numpy()).all()
