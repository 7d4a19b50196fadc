"""What every method must do, swept over stages/methods and over all encoders that a method takes: a
new file there is tested as soon as it exists.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from stages.kit.nets import encoders
from stages.kit.train.loop import Progress
from tests import tiny
from workflow import checks, plugins

FOLDER = Path(__file__).parent.parent / "stages" / "methods"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
MODULES = {name: tiny.module(name) for name in NAMES}
TRAINED = [name for name in NAMES if MODULES[name].TRAINS]
SPEC = tiny.spec()
KINDS = plugins.names("encoder")
SPECS = {kind: tiny.spec(32 if kind == "convvit" else 16, kind) for kind in KINDS}
# "mae" with a ViT, "mae-convvit" with another encoder that it takes
CASES = {name: (name, SPEC) for name in NAMES}
for _name, _kind in itertools.product(NAMES, SPECS):
    if _kind != "vit" and MODULES[_name].NEEDS <= tiny.module(_kind, "encoder").CAN:
        CASES[f"{_name}-{_kind}"] = (_name, SPECS[_kind])
# with relative and absolute positions
for _name in NAMES:
    if issubclass(MODULES[_name].Config, checks.BeitStart):
        CASES[f"{_name}-positions"] = (_name, tiny.spec(absolute_positions=True))
# settings of which each makes another method of it
SETTINGS = {}
for _name in NAMES:
    if hasattr(MODULES[_name].Config, "centring"):
        CASES[f"{_name}-centre"] = (_name, SPEC)
        SETTINGS[f"{_name}-centre"] = {"centring": "centre"}
# few distinct patches hidden, and a target that is not nearly uniform: they can be learnt by heart
for _case in (case for case, (name, _) in CASES.items() if name == "mcbeit"):
    SETTINGS[_case] = {"temp": 0.1, "masks": "block", "mask_ratio": 0.39}
# at half the side its last stage has a single place, which squares of half of that divide
SETTINGS["fastmimp-swin"] = {"block": 4}
# features of the target are nearly alike: only at a low temperature are they told apart
for _case in (case for case, (name, _) in CASES.items() if name == "mimco"):
    SETTINGS[_case] = {"temperature": 0.005, "image_temperature": 0.005}
SWEPT = [case for case, (name, _) in CASES.items() if name in TRAINED]
progress = tiny.progress


def build(case, seed=0):
    """The method, and its target as a module whose parameters could learn."""
    name, spec = CASES[case]
    module = MODULES[name]
    needs = module.TARGET and tiny.needs(module.Config(**SETTINGS.get(case, {})), module)
    target = tiny.target(spec, *needs) if needs else None
    if target:
        target.open.requires_grad_(True)
    return tiny.method(name, spec, target, seed, **SETTINGS.get(case, {})), target and target.open


def batch(case, rows=8):
    name, spec = CASES[case]
    return tiny.batch(MODULES[name], spec, rows=rows)


def rows(batch, chosen):
    return {key: value[chosen] for key, value in batch.items()}


def train(name, steps, lr=3e-3, seed=0, still=False):
    """Steps on one batch, always with the same masks. -> (method, losses)

    still: a teacher that follows the student stands still, and what is given is the divergence from
    it.
    """
    method, _ = build(name, seed)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=lr)
    data, now, losses = batch(name), progress(), []
    for step in range(steps):
        torch.manual_seed(step)  # dropout and drop path
        optimiser.zero_grad()
        out = method(data, now)
        out["loss"].backward()
        optimiser.step()
        if hasattr(method, "after_step") and not still:
            method.after_step(now)
        losses.append(out.get("divergence", out["loss"]).item() if still else out["loss"].item())
    return method, losses


def test_the_folder_is_found():
    assert {"mae", "beitv2", "random", "supervised"} <= set(NAMES)
    assert {"mae-convvit", "dmjd-convvit", "simmim-swin", "random-swin"} <= set(CASES)
    assert {"supervised-swin", "supervised-convvit"} <= set(SWEPT)
    assert {"beitv2-positions", "simmim-positions", "dino-centre", "ibot-centre"} <= set(SWEPT)


@pytest.mark.parametrize("name", NAMES)
def test_declarations(name):
    """What the plan reads without importing is what the module has; its Config stands alone."""
    module, declared = MODULES[name], plugins.declared("method", name)
    for literal in ("TARGET", "NEEDS", "LABELS", "TRAINS", "PUBLISHED"):
        assert declared.literals[literal] == getattr(module, literal, declared.literals[literal])
    assert "arXiv" in module.__doc__ or "No paper" in module.__doc__
    alone = declared.config()
    assert dataclasses.asdict(alone) == dataclasses.asdict(module.Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        alone.nothing = 1.0
    if hasattr(alone, "check"):
        alone.check(SPEC.image_size, SPEC.model)
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 300


@pytest.mark.parametrize("name", TRAINED)
def test_the_published_recipe_is_one(name):
    """Its keys are settings of the method or of train; its values pass the Config's own checks."""
    module, published = MODULES[name], dict(MODULES[name].PUBLISHED)
    if "No paper" in module.__doc__ and not published:
        pytest.skip("nothing was published")
    assert published.pop("epochs") > 0
    assert published.pop("batch_size") > 0
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in published.items()}
    assert isinstance(module.Config(**given), checks.Optimiser)
    assert {"lr", "lr_per", "warmup", "weight_decay"} <= set(given)


@pytest.mark.parametrize("name", SWEPT)
def test_output_is_finite_scalars(name):
    method, _ = build(name)
    out = method(batch(name), progress())
    assert out["loss"].requires_grad
    for key, value in out.items():
        assert value.ndim == 0, key
        assert torch.isfinite(value), key
        assert value.dtype == torch.float32, key


@pytest.mark.parametrize("name", SWEPT)
def test_loss_stays_float32_under_autocast(name):
    method, _ = build(name)
    plain = method.eval()(batch(name), progress())["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch(name), progress())["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain, rel=0.05)
    loss.backward()


@pytest.mark.parametrize("name", SWEPT)
def test_learns_one_batch(name):
    _, losses = train(name, 60, lr=5e-3, still=True)
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0], losses


@pytest.mark.parametrize("name", SWEPT)
def test_gradients_reach_what_should_learn_and_nothing_else(name):
    method, target = build(name)
    before = copy.deepcopy(target.state_dict()) if target else {}
    buffers = {key: value.clone() for key, value in method.named_buffers()}
    asked = []
    if target:
        target.register_forward_hook(lambda *call: asked.append(call))
    method(batch(name), progress())["loss"].backward()
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
        else:
            assert parameter.grad is None, key
    if target:
        assert asked, "the target was asked"
        assert all(parameter.grad is None for parameter in target.parameters())
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
        ours = {id(tensor) for tensor in [*method.parameters(), *method.buffers()]}
        assert not ours & {id(tensor) for tensor in target.parameters()}, (
            "a target is not trained or saved"
        )
    assert all(torch.equal(value, buffers[key]) for key, value in method.named_buffers())


@pytest.mark.parametrize("name", SWEPT)
def test_the_same_seed_gives_the_same_bits(name):
    first, losses = train(name, 3)
    second, again = train(name, 3)
    assert losses == again
    first, second = first.state_dict(), second.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    assert train(name, 1, seed=1)[1] != losses[:1]


@pytest.mark.parametrize("name", SWEPT)
def test_a_sample_does_not_depend_on_who_is_beside_it(name, monkeypatch):
    """Masks are drawn per row, so a step's global batch can be cut anywhere: halves have the
    whole's loss. A method whose images are compared with each other says so, and is never cut.
    """
    draw, drawn = Progress.uniform, []
    monkeypatch.setattr(
        Progress, "uniform", lambda self, *args: drawn.append(args) or draw(self, *args)
    )
    method, _ = build(name)
    method.eval()
    with torch.no_grad():
        whole = method(batch(name), progress())["loss"].item()
        halves = [
            method(rows(batch(name), half), progress(half))["loss"].item()
            for half in (torch.tensor([0, 3, 4, 6]), torch.tensor([5, 7, 1, 2]))
        ]
        swapped = method(rows(batch(name), torch.arange(8).flip(0)), progress())["loss"].item()
    same = sum(halves) / 2 == pytest.approx(whole, rel=1e-5)
    assert same is not hasattr(method, "whole_batch")
    if drawn:
        assert swapped != pytest.approx(
            whole, rel=1e-5
        )  # other masks on the images do change the loss


@pytest.mark.parametrize("name", SWEPT)
def test_labels_are_not_needed(name):
    """A method that does not declare labels works, and works the same, when they are garbage or
    missing.
    """
    if MODULES[CASES[name][0]].LABELS:
        pytest.skip("trains on labels")
    method, _ = build(name)
    method.eval()
    with torch.no_grad():
        without = method(batch(name), progress())["loss"]
        garbage = method(batch(name) | {"label": torch.full((8,), 99)}, progress())["loss"]
    assert torch.equal(without, garbage)


@pytest.mark.parametrize("name", CASES)
def test_export_is_bit_equal(name, tmp_path):
    spec = CASES[name][1]
    method = (train(name, 2) if name in SWEPT else build(name))[0]
    encoder = method.encoder.eval()
    encoders.save(encoder, tmp_path, spec)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    side = spec.image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    features = loaded.forward_features(images)
    assert torch.isfinite(features).all()
    assert torch.equal(features, encoder.forward_features(images))
    assert tuple(loaded.pretrained_cfg["mean"]) == spec.mean
    assert encoders.classifier(tmp_path, 4)(images).shape == (2, 4)


@pytest.mark.parametrize("name", SWEPT)
def test_state_survives_saving(name):
    method, _ = train(name, 2)
    other, _ = build(name, seed=7)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    with torch.no_grad():
        losses = [m.eval()(batch(name), progress())["loss"] for m in (method, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", SWEPT)
def test_pictures_are_pictures(name):
    method, _ = build(name)
    if not hasattr(method, "pictures"):
        pytest.skip("has none")
    state, given = copy.deepcopy(method.state_dict()), batch(name, 9)
    # the stage gives whole images under this name, whatever the views
    given["view"] = next(iter(given.values()))
    for key, picture in method.eval().pictures(given).items():
        assert picture.dtype == np.uint8, key
        assert picture.ndim == 3, key
        assert picture.shape[2] == 3, key
        assert picture.std() > 0, key
    assert all(torch.equal(value, state[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", SWEPT)
def test_names_without_weight_decay_and_of_rates_exist(name):
    method, _ = build(name)
    if hasattr(method, "rates"):
        assert method.rates().keys() <= {key for key, _ in method.named_parameters()}
    if hasattr(method, "no_weight_decay"):
        optional = {"encoder.reg_token", "encoder.dist_token"}  # timm names them, there or not
        optional |= {"encoder.cls_token", "encoder.pos_embed"} if name != CASES[name][0] else set()
        names = {key for key, _ in method.named_parameters()}
        assert set(method.no_weight_decay()) <= names | optional


@pytest.mark.parametrize(
    ("style", "name"), [("sincos", "mae"), ("beit", "beitv2"), ("beit", "simmim")]
)
def test_the_untrained_encoder_is_that_of_the_methods(style, name):
    untrained = tiny.method("random", SPEC, seed=4, style=style).encoder.state_dict()
    trained = tiny.method(name, SPEC, seed=4).encoder.state_dict()
    assert all(torch.equal(untrained[key], trained[key]) for key in untrained | trained)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"style": "beit"}, "convvit", "style: found 'beit', expected timm or sincos"),
        ({"depth": 1}, "swin", "depth: found 1, expected 0 to model.depth"),
        ({"style": "beit", "depth": 1}, "vit", "depth: found 1, expected none with style 'beit'"),
    ],
)
def test_random_refuses_what_the_model_has_not(config, kind, message):
    with pytest.raises(ValueError, match=message):
        MODULES["random"].Config(**config).check(32, tiny.model(kind))


# --- supervised ---------------------------------------------------------------------------------


def supervised(**config):
    return tiny.method("supervised", SPEC, **config).eval()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_supervised_loss_is_smoothed_cross_entropy(pool):
    method, data = supervised(pool=pool, label_smoothing=0.1), batch("supervised")
    out = method(data, progress())
    features = encoders.features(method.encoder, SPEC.normalise(data["view"]))
    logits = method.head(features["cls"] if pool == "token" else features["patch"].mean(1))
    assert torch.allclose(out["loss"], F.cross_entropy(logits, data["label"], label_smoothing=0.1))
    assert torch.allclose(out["accuracy"], (logits.argmax(1) == data["label"]).float().mean())


def test_supervised_leaves_unlabelled_images_out():
    method, data = supervised(), batch("supervised")
    part = rows(data, torch.tensor([0, 2, 5]))
    data["label"][torch.tensor([1, 3, 4, 6, 7])] = -1
    out, expected = method(data, progress()), method(part, progress(torch.arange(3)))
    assert torch.allclose(out["loss"], expected["loss"])
    assert torch.allclose(out["accuracy"], expected["accuracy"])


@pytest.mark.parametrize("config", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixtures_keep_images_and_labels_in_step(config):
    """Images constant at 1 for class 0 and at 0 for class 1: the mean pixel must be the share of
    class 0.
    """
    method = supervised(**config)
    images = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    soft = F.one_hot(torch.tensor([0, 1, 0, 1]), 4).float()
    shares = []
    for step in range(20):
        mixed, labels = method.mix(images, soft, progress(torch.arange(4), step).generator("mix"))
        assert torch.allclose(mixed.mean((1, 2, 3)), labels[:, 0], atol=1e-5)
        assert torch.allclose(labels.sum(1), torch.ones(4))
        again, _ = method.mix(images, soft, progress(torch.arange(4), step).generator("mix"))
        assert torch.equal(mixed, again)
        shares.append(labels[0, 0].item())
        halves = [
            method.mix(images[half], soft[half], progress(torch.arange(2), step).generator("mix"))
            for half in (slice(2), slice(2, 4))
        ]  # partners stay together in micro batches
        assert torch.equal(mixed, torch.cat([half for half, _ in halves]))
    assert min(shares) < 0.5 < max(shares)
    assert images.unique().tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="even number"):
        method.mix(images[:3], soft[:3], progress(torch.arange(3)).generator("mix"))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mixup": -1.0}, "mixup"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"drop_path": -0.1}, "drop_path"),
        ({"crop_min": 0.0}, "crop_min"),
    ],
)
def test_supervised_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        MODULES["supervised"].Config(**values)


def test_supervised_needs_classes():
    with pytest.raises(ValueError, match="classes"):
        MODULES["supervised"].Method(
            MODULES["supervised"].Config(), dataclasses.replace(SPEC, num_classes=1)
        )
