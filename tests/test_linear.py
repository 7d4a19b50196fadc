"""Linear probe: LARS's closed form, the head's algebra, and scikit-learn and torch as independent
references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from stages.kit import keyed
from stages.kit.train.lars import LARS, adapted
from stages.tasks.linear import EPS, Config, Head, keep, scores, statistics, train


def problem(n=400, d=12, classes=4, spread=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = torch.randn(classes, d, generator=generator)
    return torch.randn(n, d, generator=generator) * spread + means[labels] * 2, labels


def accuracy(stacks, head, x, labels):
    return (
        (scores(stacks, {head.feature: x}, torch.arange(len(x)))[head].argmax(1) == labels)
        .float()
        .mean()
        .item()
    )


def test_lars_equals_its_closed_form():
    matrix, vector = (
        nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -1.0]])),
        nn.Parameter(torch.tensor([0.5, -0.5])),
    )
    optimiser = LARS([matrix, vector], lr=0.1, momentum=0.9, weight_decay=0.01, trust=0.001)
    p, q, m, v = matrix.detach().double(), vector.detach().double(), 0.0, 0.0
    for gradients in (
        ([[0.1, 0.2], [0.3, 0.4]], [1.0, 2.0]),
        ([[-1.0, 0.0], [0.5, 0.2]], [0.0, -3.0]),
    ):
        g, b = torch.tensor(gradients[0]).double(), torch.tensor(gradients[1]).double()
        matrix.grad, vector.grad = g.float(), b.float()
        optimiser.step()
        g = g + 0.01 * p
        g = 0.001 * p.square().sum().sqrt() / g.square().sum().sqrt() * g
        m = 0.9 * m + g
        v = 0.9 * v + b  # one dimension: neither decay nor scaling
        p, q = p - 0.1 * m, q - 0.1 * v
        torch.testing.assert_close(matrix.detach().double(), p, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(vector.detach().double(), q, rtol=1e-6, atol=1e-7)


def test_lars_keeps_the_gradient_where_a_norm_is_zero():
    zero, g = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(adapted(zero, g), g)
    assert torch.equal(adapted(g, zero), zero)
    stack, slopes = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    each = torch.stack([adapted(p, g) for p, g in zip(stack, slopes, strict=True)])
    torch.testing.assert_close(adapted(stack, slopes), each)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("norm", ["batchnorm", "none"])
def test_a_head_of_many_is_torchs_own_training(optimizer, norm):
    """The batched hand-written gradient against autograd, nn.BatchNorm1d, torch's SGD and a cosine
    written out.
    """
    x, labels = problem(256)
    config = Config(epochs=3, batch_size=64, optimizer=optimizer, warmup=0.25)
    heads = [Head("cls", norm, lr) for lr in (0.01, 0.1, 1.0)] + [Head("patch", norm, 0.1)]
    stacks = train({"cls": x[None], "patch": x[None] * 2}, labels, heads, 4, config, seed=5)
    mine = scores(stacks, {"cls": x, "patch": x}, torch.arange(len(x)))[heads[1]]

    bn, linear = nn.BatchNorm1d(12, affine=False, eps=EPS), nn.Linear(12, 4)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=keyed.generator(5, "head"))
    nn.init.zeros_(linear.bias)
    model = nn.Sequential(bn, linear) if norm == "batchnorm" else linear
    assert (
        sum(p.numel() for p in model.parameters())
        == 12 * 4 + 4
        == stacks[0].weight[1].numel() + stacks[0].bias[1].numel()
    )
    optimiser = (LARS if optimizer == "lars" else torch.optim.SGD)(
        model.parameters(), lr=0.1, momentum=0.9
    )
    step = 0
    for epoch in range(3):
        for rows in keyed.permutation(256, 5, "order", epoch).split(64):
            cosine = 0.5 * (1 + torch.tensor(torch.pi * (step - 3) / (12 - 3)).cos().item())
            optimiser.param_groups[0]["lr"] = 0.1 * (step / 3 if step < 3 else cosine)
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimiser.step()
            step += 1
    bn.running_mean, bn.running_var = x.mean(0), x.var(0, correction=0)
    with torch.no_grad():
        torch.testing.assert_close(mine, model.eval()(x), rtol=1e-3, atol=1e-4)


def test_as_good_as_logistic_regression():
    x, labels = problem()
    other, answers = (
        problem(spread=1.5, seed=0)[0]
        + 0.3 * torch.randn(400, 12, generator=torch.Generator().manual_seed(9)),
        labels,
    )
    head = Head("cls", "batchnorm", 0.1)
    stacks = train({"cls": x[None]}, labels, [head], 4, Config(epochs=40, batch_size=100), seed=0)
    reference = LogisticRegression(max_iter=1000).fit(x.numpy(), labels.numpy())
    expected = reference.score(other.numpy(), answers.numpy())
    assert expected > 0.7
    assert accuracy(stacks, head, other, answers) == pytest.approx(expected, abs=0.03)


def test_batchnorm_head_is_invariant_to_channel_scales_and_the_plain_one_is_not():
    x, labels = problem(256)
    scale = torch.logspace(-2, 2, 12)
    config = Config(epochs=4, batch_size=64)
    for norm, same in (("batchnorm", True), ("none", False)):
        head = Head("cls", norm, 0.1)
        plain = scores(
            train({"cls": x[None]}, labels, [head], 4, config, 1), {"cls": x}, torch.arange(256)
        )[head]
        scaled = train({"cls": x[None] * scale}, labels, [head], 4, config, 1)
        scaled = scores(scaled, {"cls": x * scale}, torch.arange(256))[head]
        assert torch.allclose(plain, scaled, rtol=1e-2, atol=1e-2) == same


def test_statistics_are_exact_far_from_zero():
    x = (
        torch.randn(2, 500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * 1e-2
        + 100
    )
    mean, var = statistics(x.float(), chunk=77)
    x = x.float().double().flatten(0, 1)
    torch.testing.assert_close(mean, x.mean(0).float())
    torch.testing.assert_close(var, x.var(0, correction=0).float())


def test_seed_decides_everything_and_passes_take_turns():
    x, labels = problem(128)
    head = Head("cls", "batchnorm", 0.1)

    def logits(seed, table):
        return scores(
            train(table, labels, [head], 4, Config(epochs=2, batch_size=64), seed),
            {"cls": x},
            torch.arange(128),
        )[head]

    once = logits(3, {"cls": x[None]})
    assert torch.equal(once, logits(3, {"cls": x[None]}))
    assert not torch.equal(once, logits(4, {"cls": x[None]}))
    assert not torch.equal(once, logits(3, {"cls": torch.stack([x, x.flip(1)])}))


def test_small_batches_normalise_by_the_whole_training_set():
    x, labels = problem(40)
    head = Head("cls", "batchnorm", 0.3)
    stacks = train({"cls": x[None]}, labels, [head], 4, Config(epochs=1, batch_size=8), 0)
    rows = torch.arange(
        5
    )  # below 64: an image's score does not depend on its company in training either
    torch.testing.assert_close(stacks[0].whiten(x)[rows], stacks[0].whiten(x[rows]))
    assert (
        accuracy(
            train({"cls": x[None]}, labels, [head], 4, Config(epochs=60, batch_size=8), 0),
            head,
            x,
            labels,
        )
        > 0.9
    )


def test_keep_takes_the_right_heads():
    x, labels = problem(128)
    heads = [
        Head(f, n, lr)
        for f in ("cls", "patch")
        for n in ("batchnorm", "none")
        for lr in (0.01, 0.1)
    ]
    tables = {"cls": x[None], "patch": x[None]}
    stacks = train(tables, labels, heads, 4, Config(epochs=1, batch_size=64), 0)
    everything = scores(stacks, {"cls": x, "patch": x}, torch.arange(20))
    some = scores(keep(stacks, [heads[1], heads[6]]), {"cls": x, "patch": x}, torch.arange(20))
    assert set(some) == {heads[1], heads[6]}
    for head, values in some.items():
        torch.testing.assert_close(values, everything[head])


@pytest.mark.parametrize(
    "bad",
    [
        {"lrs": ()},
        {"lrs": (0.0,)},
        {"epochs": 0},
        {"passes": 0},
        {"warmup": 1.0},
        {"crop_min": 0.0},
    ],
)
def test_bad_settings_name_their_key(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Config(**bad)
