"""AttMask: the facts of the paper (arXiv 2203.12719) and its official code.

What it shares with iBOT is tested in test_ibot.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.kit import keyed
from stages.kit.nets import encoders
from stages.kit.parts.ibot import MaskedSelfDistillation
from stages.kit.train.recipe import Recipe
from stages.methods import attmask, ibot
from stages.methods.attmask import PUBLISHED, Config, Method
from tests import tiny

SMALL = {"prototypes": 24, "hidden": 16, "bottleneck": 8, "n_local": 1}


def spec(size=16, **model):
    return tiny.spec(size, **{"embed_dim": 16, **model})


def build(size=16, module=attmask, **settings):
    torch.manual_seed(0)
    found = module.Method(module.Config(**{**SMALL, **settings}), spec(size))
    with torch.no_grad():  # as after some training
        found.mask_token.normal_()
        for parameter in found.teacher.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return found


def batch(method, rows=4) -> dict:
    sides = {name: view.size for name, view in attmask.views(method.config, method.spec).items()}
    return {name: tiny.images(rows, side, seed=i) for i, (name, side) in enumerate(sides.items())}


def attention(rows=50, patches=196) -> torch.Tensor:
    """Of which no two entries of a row are alike."""
    order = keyed.uniform(7, torch.arange(rows), patches).argsort(1).float() + 1
    return order / order.sum(1, keepdim=True)


def masks(method, weights, kind, ratios=(0.3, 0.4), share=1.0, step=0):
    now = tiny.progress(len(weights), step)
    return method.mask("global1", weights, now.uniform, torch.as_tensor(ratios), share, kind)


@pytest.fixture(scope="module")
def wide():
    """Grids of 14 x 14, as published."""
    return build(56, mask="hint", show_max=0.1)


# --- which patches ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, sign", [("high", 1), ("low", -1)])
@pytest.mark.parametrize("ratio", [0.1, 0.273, 0.4999])
def test_high_hides_what_is_attended_most_and_low_least(wide, kind, sign, ratio):
    weights = attention()
    hidden = masks(wide, weights, kind, (ratio, 0.2))
    assert hidden.dtype == torch.bool and not hidden.requires_grad
    assert (hidden.sum(1) == int(196 * ratio)).all()
    least = torch.where(hidden, sign * weights, torch.inf).amin(1)
    most = torch.where(hidden, -torch.inf, sign * weights).amax(1)
    assert (least >= most).all()


@pytest.mark.parametrize("ratios", [(0.3, 0.4), (0.1, 0.499), (0.499, 0.1)])
def test_hints_are_some_of_the_first_tenth(wide, ratios):
    weights = attention()
    high, hint = (masks(wide, weights, kind, ratios) for kind in ("high", "hint"))
    shown = high & ~hint
    assert not (hint & ~high).any()
    pool, count = int(0.1 * 196), int(196 * 0.1 * ratios[1])
    assert (shown.sum(1) == count).all() and 1 <= count <= 9
    rank = (-weights).argsort(1).argsort(1)
    assert int(rank[shown].max()) < pool == 19
    assert ((rank < pool) & hint).sum(1).eq(pool - count).all()
    assert hint.sum(1).eq(int(196 * ratios[0]) - count).all()


def test_hints_are_drawn_uniformly_and_for_each_image():
    method, rows = build(56, mask="hint", show_max=0.1), 4000
    weights = attention(1).expand(rows, -1)
    shown = masks(method, weights, "high") & ~masks(method, weights, "hint")
    first = (-weights[0]).argsort()[:19]
    share = shown[:, first].float().mean(0)
    count = int(196 * 0.1 * 0.4)
    assert (share - count / 19).abs().max() < 0.04
    assert len({tuple(row.tolist()) for row in shown}) > rows // 2


def test_counts_of_all_steps_lie_where_the_card_of_the_method_has_them(wide):
    """19 to 97 patches before the hints, of which there are 1 to 9."""
    seen = set()
    for step in range(400):
        first, second = wide.ratios(tiny.progress(2, step)).tolist()
        seen.add((int(196 * first), int(19.6 * second)))
    assert {n for n, _ in seen} <= set(range(19, 98)) and {q for _, q in seen} == set(range(1, 10))
    assert min(n for n, _ in seen) < 22 and max(n for n, _ in seen) > 94


def test_a_small_grid_may_have_no_hint_and_never_more_than_it_hides():
    """64 patches, published share: no hint in about one step in seven. A large pool is capped."""
    none = 0
    for share, rows in ((0.1, 1000), (1.0, 200)):
        method, weights = build(32, mask="hint", show_max=share), attention(3, 64)
        for step in range(rows):
            ratios = method.ratios(tiny.progress(3, step))
            high, hint = (
                masks(method, weights, kind, ratios, step=step) for kind in ("high", "hint")
            )
            shown = (high & ~hint).sum(1)
            assert (shown == shown[0]).all() and not (hint & ~high).any()
            wanted = int(64 * share * float(ratios[1]))
            assert int(shown[0]) == min(wanted, int(64 * float(ratios[0])))
            none += share == 0.1 and wanted == 0
    assert none / 1000 == pytest.approx(0.14, abs=0.04)


def test_half_of_the_views_are_masked_and_the_share_is_of_the_masked_ones():
    method = build(16)
    weights = attention(10_000, 16)
    for share in (0.5, 0.9, 0.0, 1.0):
        some = masks(method, weights, "high", share=share).any(1).float().mean().item()
        assert some == pytest.approx(share, abs=0.02)
    chosen = masks(method, weights, "high", share=0.5).any(1)
    for kind in ("low", "hint", "random"):  # the same views, whatever the mask
        assert torch.equal(masks(method, weights, kind, share=0.5).any(1), chosen)
    other = method.mask(
        "global2", weights, tiny.progress(10_000, 0).uniform, torch.tensor([0.3, 0.4]), 0.5, "high"
    ).any(1)
    assert (other & chosen).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_one_ratio_for_a_step_two_draws_and_another_ratio_in_the_next():
    method = build()
    drawn = torch.stack([method.ratios(tiny.progress(2, step)) for step in range(2000)])
    again = method.ratios(tiny.progress(torch.tensor([5, 9]), 1, seed=0))
    assert torch.equal(again, drawn[1])  # whatever the rows: the same on all processes
    assert drawn.min() >= 0.1 and drawn.max() < 0.5
    assert drawn.mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.01)
    assert abs(np.corrcoef(drawn.T.numpy())[0, 1]) < 0.06
    assert len(drawn[:, 0].unique()) > 1990


def test_masks_follow_the_attention_and_ties_go_to_the_first():
    method, weights = build(), attention(5, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for kind in ("high", "low"):
        plain = masks(method, weights, kind)
        assert torch.equal(masks(method, weights[:, order], kind), plain[:, order])
        same = masks(method, torch.full((5, 16), 1 / 16), kind)
        assert torch.equal(same, (torch.arange(16) < 4).expand(5, -1))


# --- the step -----------------------------------------------------------------------------------


def watched(method, monkeypatch) -> dict:
    """What the losses are given."""
    seen, losses = {}, method.losses

    def spy(large, mask, found, *rest):
        seen.update(large=large, mask=mask, **found)
        return losses(large, mask, found, *rest)

    monkeypatch.setattr(method, "losses", spy)
    return seen


def test_the_attention_is_the_teachers_of_the_whole_view(monkeypatch):
    method = build(mask_share=1.0)
    seen, x, passes = watched(method, monkeypatch), batch(method), []
    method.teacher.encoder.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    method(x, tiny.progress(4))
    assert len(passes) == 1  # it is the pass that gives the targets
    large = torch.cat([x["global1"], x["global2"]])
    whole = encoders.attention(method.teacher.encoder, method.spec.normalise(large))
    torch.testing.assert_close(whole.sum(-1), torch.ones(8, 2, 17))
    weights = whole[:, :, 0, 1:]  # of the class token's query, not scaled up
    torch.testing.assert_close(seen["attention"], weights, atol=1e-5, rtol=0)
    mean = weights.mean(1)
    hidden = torch.where(seen["mask"], mean, torch.inf).amin(1)
    assert (hidden >= torch.where(seen["mask"], -torch.inf, mean).amax(1)).all()
    assert (seen["mask"].sum(1) == seen["mask"][0].sum()).all()


def test_each_view_has_the_mask_of_its_own_attention(monkeypatch):
    """Attention lies on a bright patch, which is in another place in each view."""
    method = build(mask="high", mask_share=1.0, mask_ratio=(0.0626, 0.0626))  # one patch
    seen, x = watched(method, monkeypatch), batch(method)
    places = torch.tensor([[0, 5, 10, 15], [3, 6, 9, 12]])
    for view, where in zip(("global1", "global2"), places, strict=True):
        cells = torch.zeros(4, 16).scatter(1, where[:, None], 1.0).view(4, 1, 4, 4)
        x[view] = cells.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    look = method.look

    def bright(images, *more):
        light = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1)
        return look(images, *more) | {"attention": light[:, None].expand(-1, 2, -1)}

    monkeypatch.setattr(method, "look", bright)
    out = method(x, tiny.progress(4))
    assert torch.equal(seen["mask"].int().argmax(1), places.flatten())
    assert (seen["mask"].sum(1) == 1).all()
    assert out["hidden"].item() == pytest.approx(1 / 16)
    assert out["hidden_attention"].item() == pytest.approx(1.0)


def test_what_the_curves_say(monkeypatch):
    """High hides more of the attention than of the patches, low less; of masked views only."""
    found = {}
    for kind in ("high", "low"):
        method = build(mask=kind, mask_share=0.5)
        seen = watched(method, monkeypatch)
        out = method(batch(method, 16), tiny.progress(16))
        mask, weights = seen["mask"], seen["attention"].mean(1).double()
        some = mask.any(1)
        assert 4 < some.sum() < 28
        share = ((weights * mask).sum(1) / weights.sum(1))[some].mean()
        assert out["hidden_attention"].item() == pytest.approx(share.item(), rel=1e-5)
        assert out["hidden"].item() == pytest.approx(mask[some].double().mean().item(), rel=1e-5)
        found[kind] = (out["hidden_attention"] - out["hidden"]).item()
    assert found["high"] > 0.01 and found["low"] < -0.01
    method = build(mask_share=0.0)
    out = method(batch(method), tiny.progress(4))
    assert out["hidden"].item() == out["hidden_attention"].item() == out["patch_loss"].item() == 0


@pytest.mark.parametrize("kind", ["high", "hint", "low", "random", "block"])
def test_no_gradient_through_the_choice_or_to_the_teacher(kind, monkeypatch):
    method = build(mask=kind, mask_share=1.0, mask_ratio=(0.4, 0.5))
    seen = watched(method, monkeypatch)
    method(batch(method), tiny.progress(4))["loss"].backward()
    assert seen["mask"].dtype == torch.bool and not seen["attention"].requires_grad
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert method.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["random", "block"])
def test_with_ibots_masks_it_is_ibot(kind):
    """The same losses, gradients and teacher, bit by bit."""
    states = []
    for module in (attmask, ibot):
        method = build(module=module, mask=kind)
        for step in range(3):
            method.zero_grad()
            out = method(batch(method), tiny.progress(4, step))
            out["loss"].backward()
            with torch.no_grad():
                for parameter in method.student.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)
            method.after_step(tiny.progress(4, step))
        states.append((out, method.state_dict()))
    (ours, mine), (theirs, its) = states
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)


def test_it_adds_no_weights_and_shares_ibots_code():
    assert Method.losses is ibot.Method.losses is MaskedSelfDistillation.losses
    assert Method.drawn is ibot.Method.drawn
    assert build().state_dict().keys() == build(module=ibot).state_dict().keys()


def test_the_other_host_is_the_class_token_loss_alone():
    method = build(patch_weight=0.0)
    out = method(batch(method), tiny.progress(4))
    assert torch.equal(out["loss"], out["cls_loss"]) and out["hidden"] > 0


# --- recipe, pictures, settings -----------------------------------------------------------------


def test_the_published_recipe():
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in PUBLISHED.items()}
    train = {key: settings.pop(key) for key in ("epochs", "batch_size")}
    config, per = Config(**settings), 5
    recipe = Recipe.of(config, train, per)
    assert recipe.lr == pytest.approx(4.69e-4, rel=1e-3) and recipe.warmup == 10 * per
    assert config.teacher_temp_warmup * train["epochs"] == pytest.approx(30)
    assert recipe.clip == 3.0 and recipe.clip_mode == "tensor"
    assert recipe.lr_at(recipe.steps - 1) == pytest.approx(1e-6, rel=0.2)
    host = {**ibot.PUBLISHED, **{key: PUBLISHED[key] for key in ("epochs", "batch_size", "mask")}}
    host |= {"show_max": 0.1, "warmup": 0.1, "teacher_temp_warmup": 0.3}
    assert host == PUBLISHED


def test_pictures_show_every_kind_of_mask(monkeypatch):
    sheets = []
    monkeypatch.setattr(attmask, "contact_sheet", lambda x: sheets.append(x) or np.zeros(1))
    method, x = build(show_max=0.5), {"view": tiny.images(9)}
    found = method.pictures(x)
    assert found.keys() == {"masks", "tokens", "prototypes"}
    [columns] = sheets
    assert len(columns) == 2 + 5 and all(column.shape == (8, 3, 16, 16) for column in columns)
    hidden = [(column == 0.5).all(1).float().mean().item() * 16 for column in columns[2:]]
    assert hidden[0] == hidden[2] == hidden[3] == 4  # high, low, random: int(16 * 0.3)
    assert hidden[1] == 2 and 0 < hidden[4] <= 4  # int(16 * 0.5 * 0.3) hints


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mask": "hint", "show_max": 1.5}, "show_max"),
        ({"mask_ratio": (0.5, 0.1)}, "mask_ratio"),
        ({"mask_share": -0.1}, "mask_share"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}: found"):
        Config(**values)


def test_config_must_fit_the_model():
    for kind in ("high", "random"):
        Config(mask=kind, show_max=0.0).check(16, spec().model)
    with pytest.raises(ValueError, match="^show_max: 0.1 of 16 patches never gives a hint"):
        Config(mask="hint", show_max=0.1).check(16, spec().model)
    with pytest.raises(ValueError, match="^mask_ratio: .* never hides"):
        Config(mask_ratio=(0.01, 0.05)).check(16, spec().model)
