"""Facts of Sinkhorn-Knopp as a teacher's centring (SwAV, arXiv 2006.09882; DINOv2, 2304.07193)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from warm import Workers

from stages.kit import dist
from stages.kit.parts.prototypes import Centre
from stages.kit.parts.sinkhorn import Sinkhorn, centring
from stages.kit.train.loop import refuse_cuts
from stages.methods import dino, ibot
from tests import tiny

TEMPERATURE = 0.04
SMALL = dict(
    prototypes=24, hidden=16, bottleneck=8, n_local=2, drop_path=0.0, teacher_temp=TEMPERATURE
)


def logits(rows: int = 12, prototypes: int = 7, seed: int = 0) -> torch.Tensor:
    """Cosines, as the head gives them."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(rows, prototypes, generator=generator) - 1


def published(z: np.ndarray, temperature: float, rounds: int = 3) -> np.ndarray:
    """The algorithm as DINOv2 has it, with exponentials: (B,K) -> (B,K)."""
    q = np.exp(z.astype(np.float64) / temperature).T
    prototypes, images = q.shape
    q /= q.sum()
    for _ in range(rounds):
        q /= q.sum(1, keepdims=True)
        q /= prototypes
        q /= q.sum(0, keepdims=True)
        q /= images
    return (q * images).T


def spec():
    return tiny.spec(16, embed_dim=16)


def batch(module, config, size: int = 4) -> dict:
    views = module.views(config, spec())
    return {
        name: tiny.images(size, view.size, seed=i) for i, (name, view) in enumerate(views.items())
    }


# --- the algorithm --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, prototypes", [(12, 7), (5, 40), (1, 3)])
def test_assignments_are_those_of_the_published_algorithm(rows, prototypes):
    z = logits(rows, prototypes)
    found = Sinkhorn(prototypes).assign(z, TEMPERATURE)
    expected = published(z.numpy(), TEMPERATURE)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=1e-6)
    views = Sinkhorn(prototypes).assign(z[:, None].expand(rows, 2, prototypes), TEMPERATURE)
    torch.testing.assert_close(views[:, 0], found)  # any shape; each image twice


def test_rows_are_distributions_and_prototypes_share_the_images():
    z, uneven = logits(60, 6), []
    for rounds in (1, 3, 10, 100):
        found = Sinkhorn(6, rounds=rounds).assign(z, 0.2).double()
        torch.testing.assert_close(found.sum(1), torch.ones(60).double(), atol=1e-6, rtol=0)
        uneven.append(float((found.sum(0) - 10).abs().max()))
    assert uneven == sorted(uneven, reverse=True) and uneven[-1] < 1e-4
    alone = (z / 0.2).softmax(1).sum(0)  # what it is without
    assert float((alone - 10).abs().max()) > 5 * uneven[1]


def test_one_prototype_cannot_win_everywhere():
    z = logits(40, 4)
    z[:, 2] += 3.0
    assert set((z / TEMPERATURE).softmax(1).argmax(1).tolist()) == {2}
    found = Sinkhorn(4).assign(z, TEMPERATURE)
    np.testing.assert_allclose(found.sum(0).numpy(), 10.0, atol=2.5)
    torch.testing.assert_close(
        found, Sinkhorn(4).assign(z - 3.0 * torch.eye(4)[2], TEMPERATURE), atol=1e-3, rtol=0
    )


def test_equal_images_get_the_uniform_distribution():
    found = Sinkhorn(5).assign(logits(1, 5).expand(8, 5), TEMPERATURE)
    torch.testing.assert_close(found, torch.full((8, 5), 0.2))


def test_large_logits_do_not_overflow():
    z = 1e4 * logits(9, 5)
    found = Sinkhorn(5).assign(z, TEMPERATURE)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(9))


def test_rows_without_weight_are_assigned_but_do_not_count():
    z, weight = logits(12, 7), torch.tensor([1.0] * 8 + [0.0] * 4)
    found = Sinkhorn(7).assign(z, TEMPERATURE, weight)
    torch.testing.assert_close(found[:8], Sinkhorn(7).assign(z[:8], TEMPERATURE))
    torch.testing.assert_close(found[8:].sum(1), torch.ones(4))
    assert not torch.allclose(found[:8], Sinkhorn(7).assign(z, TEMPERATURE)[:8], atol=1e-3)


def test_a_batch_of_which_nothing_counts_is_plain_softmax():
    z = logits()
    found = Sinkhorn(7).assign(z, TEMPERATURE, torch.zeros(12))
    torch.testing.assert_close(found, (z / TEMPERATURE).softmax(1))


def test_the_centre_that_is_kept_is_that_of_the_batches():
    z, kept = logits(), Sinkhorn(7, momentum=0.0)
    assigned = kept.assign(z, TEMPERATURE)
    kept.count(z)
    assert not kept.value.any()
    kept.step()
    torch.testing.assert_close(kept.sharpen(z, TEMPERATURE), assigned, rtol=1e-4, atol=1e-6)
    assert float(kept.value.mean()) == pytest.approx(0, abs=1e-6)
    slow = Sinkhorn(7, momentum=0.9)
    slow.assign(z, TEMPERATURE)
    slow.step()
    torch.testing.assert_close(slow.value, 0.1 * kept.value)
    slow.step()  # nothing since
    torch.testing.assert_close(slow.value, 0.1 * kept.value)


def shared(z: torch.Tensor, weight: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """The assignments of this rank's rows, and the centre below them."""
    dist.start()
    mine, weights = (values.split(sizes)[dist.rank()] for values in (z, weight))
    sinkhorn = Sinkhorn(z.shape[1])
    found = sinkhorn.assign(mine, TEMPERATURE, weights)
    sinkhorn.step()
    return torch.cat([found, sinkhorn.value[None]])


def test_two_processes_share_the_images_of_both():
    z, weight = logits(7, 5), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    whole = Sinkhorn(5)
    expected = whole.assign(z, TEMPERATURE, weight)
    whole.step()
    pair = Workers(2, double=False)
    try:
        for sizes in ((4, 3), (7, 0)):
            first, second = pair.call(shared, z, weight, sizes)
            found = torch.cat([first[:-1], second[:-1]])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            assert torch.equal(first[-1], second[-1])
            torch.testing.assert_close(first[-1], whole.value, atol=1e-6, rtol=1e-4)
    finally:
        pair.close()


# --- in DINO and iBOT -----------------------------------------------------------------------------


def test_the_setting_chooses_it():
    made = {c: centring(dino.Config(centring=c, prototypes=9)) for c in ("centre", "sinkhorn")}
    assert type(made["centre"]) is Centre and type(made["sinkhorn"]) is Sinkhorn
    assert made["sinkhorn"].value.shape == (9,)
    assert dino.PUBLISHED["centring"] == ibot.PUBLISHED["centring"] == "centre"


@pytest.mark.parametrize("module", [dino, ibot])
def test_a_batch_that_is_cut_is_refused(module):
    model = module.Method(module.Config(**SMALL, centring="sinkhorn"), spec())
    with pytest.raises(ValueError, match=r"train.micro_batch: .* centring: sinkhorn"):
        refuse_cuts(model, accumulate=2, world=1)
    refuse_cuts(model, accumulate=1, world=2)
    refuse_cuts(module.Method(module.Config(**SMALL, centring="centre"), spec()), 2, 1)


def test_dino_learns_from_the_balanced_assignments_of_both_views():
    config = dino.Config(**SMALL, centring="sinkhorn", momentum=0.5)
    torch.manual_seed(0)
    model = dino.Method(config, spec())
    seen = batch(dino, config)
    both = torch.cat([seen["global1"], seen["global2"]])
    with torch.no_grad():
        z = model.teacher.head(model.teacher.features(both)["cls"])
    expected = published(z.numpy(), 0.04)
    out = model(seen, tiny.progress(4, 0, 10))
    entropy = -(expected * np.log(np.maximum(expected, 1e-300))).sum(1).mean()
    assert float(out["teacher_entropy"]) == pytest.approx(entropy, rel=1e-4)
    out["loss"].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert model.student.head.mlp[0].weight.grad.abs().sum() > 0
    model.after_step(tiny.progress(4, 0, 10))
    assert model.teacher.centre.value.abs().sum() > 0


def test_ibot_balances_hidden_patches_only():
    config = ibot.Config(**SMALL, centring="sinkhorn", mask_ratio=(0.3, 0.5), mask_share=1.0)
    torch.manual_seed(0)
    model = ibot.Method(config, spec())
    seen, now = batch(ibot, config), tiny.progress(4, 0, 10)
    large = torch.cat([seen["global1"], seen["global2"]])
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, :3] = mask[2, 3:5] = True
    mask[5] = False
    teacher, tokens = model.look(large), model.tokens(large, mask)["patch"]
    loss, _, entropy = model.patch_loss(teacher["patch"], tokens, mask, now)
    expected = published(teacher["patch"][mask].numpy(), 0.04)
    found = -(expected * np.log(np.maximum(expected, 1e-300))).sum(1).mean()
    assert float(entropy) == pytest.approx(found, rel=1e-4)
    changed = teacher["patch"] + (~mask)[..., None] * torch.randn(8, 16, config.prototypes)
    again, _, _ = model.patch_loss(changed, tokens, mask, now)
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    none, _, _ = model.patch_loss(teacher["patch"], tokens, torch.zeros_like(mask), now)
    assert none.item() == 0.0
