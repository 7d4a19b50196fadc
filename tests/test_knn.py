"""k-NN: the vote against hand calculation, scikit-learn and the limits that the formula has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from stages.tasks._classify import accuracy
from stages.tasks.knn import Config, unit, vote


def bank(n=300, d=8, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    means = torch.randn(classes, d, generator=generator)
    return F.normalize(torch.randn(n, d, generator=generator) + means[labels], dim=1), labels


def test_vote_by_hand_on_four_points():
    angles = torch.tensor([0.0, 0.3, -0.5, 2.0])
    train = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([0, 1, 1, 0])
    query = torch.tensor([[1.0, 0.0]])
    scores = vote(query, [(train, labels)], [1, 3, 4], 0.07, 2)
    w = [
        math.exp((math.cos(a) - 1) / 0.07) for a in angles.tolist()
    ]  # relative to the nearest, whose similarity is 1
    torch.testing.assert_close(scores[1], torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(scores[3], torch.tensor([[w[0], w[1] + w[2]]]))
    torch.testing.assert_close(scores[4], torch.tensor([[w[0] + w[3], w[1] + w[2]]]))


def test_same_as_scikit_learn_with_the_same_weights():
    (train, labels), (queries, _) = bank(), bank(97, seed=1)

    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    reference.fit(train.numpy(), labels.numpy())
    mine = vote(queries, [(train, labels)], [20], 0.07, 5)[20]
    probability = torch.from_numpy(reference.predict_proba(queries.numpy())).float()
    torch.testing.assert_close(mine / mine.sum(1, keepdim=True), probability, rtol=1e-3, atol=1e-4)


def test_top_five_counts_only_classes_that_got_votes():
    """Seven classes, three neighbours: their classes are 4, 6 and 4, so 0 to 3 are no guesses."""
    train = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [-1.0, 0.0]]), dim=1)
    queries = torch.tensor([[1.0, 0.0]]).expand(7, 2)
    for temperature in (0.07, 1e-6):  # weights of 1e-6 would be 0 in float32
        blocks = [(train, torch.tensor([4, 6, 4, 0]))]
        scores = vote(queries, blocks, [3], temperature, 7)[3]
        assert ((scores > 0) == torch.tensor([0, 0, 0, 0, 1, 0, 1]).bool()).all()
        found = accuracy(scores, torch.arange(7), least=0.0)
        assert found["top5"] == pytest.approx(2 / 7) and found["top1"] == pytest.approx(1 / 7)
    ranked = torch.arange(7.0).expand(7, 7)  # without `least` the five best, whatever their score
    assert accuracy(ranked - 10, torch.arange(7))["top5"] == pytest.approx(5 / 7)


def test_one_hot_features_give_a_hundred_percent():
    labels = torch.arange(4).repeat(30)
    features = F.one_hot(labels, 4).float()
    scores = vote(features[:40], [(features, labels)], [5, 20], 0.07, 4)
    assert all((each.argmax(1) == labels[:40]).all() for each in scores.values())


def test_cold_vote_is_the_nearest_neighbour():
    (train, labels), (queries, _) = bank(), bank(60, seed=2)
    nearest = labels[(queries @ train.T).argmax(1)]
    cold = vote(queries, [(train, labels)], [100], 1e-6, 5)[100]
    assert cold.isfinite().all() and (cold.argmax(1) == nearest).all()
    warm = vote(queries, [(train, labels)], [100], 10.0, 5)[100]
    assert (warm.argmax(1) != nearest).any()  # so the temperature does matter


def test_order_chunks_and_blocks_change_nothing():
    (train, labels), (queries, _) = bank(), bank(61, seed=3)
    whole = vote(queries, [(train, labels)], [10, 50], 0.07, 5)
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    for other in (
        vote(queries, [(train[shuffled], labels[shuffled])], [10, 50], 0.07, 5),
        vote(queries, [(train, labels)], [10, 50], 0.07, 5, chunk=7),
        vote(queries, zip(train.split(13), labels.split(13), strict=True), [10, 50], 0.07, 5),
    ):
        for k in (10, 50):
            torch.testing.assert_close(other[k], whole[k], rtol=1e-4, atol=1e-6)


def test_unit_is_centred_and_of_length_one():
    values = torch.tensor([[3.0, 4.0], [6.0, 9.0]])
    torch.testing.assert_close(unit(values, torch.zeros(()), "cpu")[0], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(
        unit(values, torch.tensor([3.0, 5.0]), "cpu")[1], torch.tensor([0.6, 0.8])
    )


def test_score_by_hand():
    scores = torch.tensor(
        [[9.0, 1, 0, 0, 0, 0], [9, 1, 0, 0, 0, -1], [5, 4, 3, 2, 1, 0], [0, 9, 0, 0, 0, 0]]
    )
    result = accuracy(scores, torch.tensor([0, 0, 5, 1]))
    assert result["top1"] == 3 / 4 and result["top5"] == 3 / 4  # the third's label is in last place
    assert result["per_class_mean"] == pytest.approx((1 + 0 + 1) / 3)
    assert accuracy(scores[:, :4], torch.tensor([0, 0, 3, 1]))["top5"] is None


@pytest.mark.parametrize("bad", [{"k": ()}, {"k": (0, 5)}, {"temperature": 0.0}])
def test_bad_settings_name_their_key(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Config(**bad)
