"""The target `clip`: its image tower against one written by hand, and what weights it takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from stages import targets
from stages.kit.parts.weights import WeightsError
from stages.targets import clip
from tests import tiny

ROOT = Path(__file__).parents[1]
WIDTH, DEPTH, PATCH, GRID, OUT = 128, 3, 4, 4, 24


def openai(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with the keys and the shapes of OpenAI's, of a tiny ViT."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape, scale=0.3):
        return torch.randn(shape, generator=draw) * scale

    state = {
        "visual.class_embedding": some(WIDTH),
        "visual.positional_embedding": some(GRID**2 + 1, WIDTH),
        "visual.proj": some(WIDTH, OUT),
        "visual.conv1.weight": some(WIDTH, 3, PATCH, PATCH),
        "text_projection": some(8, OUT),
        "logit_scale": some(),
        "input_resolution": torch.tensor(16),
        "context_length": torch.tensor(77),
    }
    for norm in ("ln_pre", "ln_post"):
        state |= {f"visual.{norm}.weight": 1 + some(WIDTH), f"visual.{norm}.bias": some(WIDTH)}
    for number in range(DEPTH):
        block = f"visual.transformer.resblocks.{number}"
        for norm in ("ln_1", "ln_2"):
            state |= {f"{block}.{norm}.weight": 1 + some(WIDTH)}
            state |= {f"{block}.{norm}.bias": some(WIDTH)}
        shapes = {"attn.in_proj_": (3 * WIDTH, WIDTH), "attn.out_proj.": (WIDTH, WIDTH)}
        shapes |= {"mlp.c_fc.": (4 * WIDTH, WIDTH), "mlp.c_proj.": (WIDTH, 4 * WIDTH)}
        for name, shape in shapes.items():
            state |= {f"{block}.{name}weight": some(*shape, scale=0.1)}
            state |= {f"{block}.{name}bias": some(shape[0])}
    return state


def by_hand(state: dict, pixels: torch.Tensor, quick: bool = True, after: int = DEPTH):
    """CLIP's own formulas in float64: tokens after a block, the same normed, its attention."""
    w = {name.removeprefix("visual."): x.double() for name, x in state.items()}

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = F.conv2d(pixels.double(), w["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x, weights = norm(x + w["positional_embedding"], "ln_pre"), None
    for number in range(after):
        block = f"transformer.resblocks.{number}"
        seen = norm(x, f"{block}.ln_1")
        both = F.linear(
            seen, w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"]
        ).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (WIDTH // 64, 64)).transpose(1, 2) for part in both)
        weights = (q @ k.transpose(-1, -2) / 8).softmax(dim=-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        out = f"{block}.attn.out_proj"
        x = x + F.linear(mixed, w[f"{out}.weight"], w[f"{out}.bias"])
        hidden = norm(x, f"{block}.ln_2")
        hidden = F.linear(hidden, w[f"{block}.mlp.c_fc.weight"], w[f"{block}.mlp.c_fc.bias"])
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)
        x = x + F.linear(hidden, w[f"{block}.mlp.c_proj.weight"], w[f"{block}.mlp.c_proj.bias"])
    return x, norm(x, "ln_post"), weights


@pytest.fixture(scope="module")
def state():
    return openai()


@pytest.fixture
def make(state, tmp_path):
    def made(grid: int = GRID, **settings):
        path = tmp_path / "clip.safetensors"
        save_file({name: x.contiguous() for name, x in state.items()}, path)
        spec = tiny.spec(image_size=PATCH * grid, patch_size=PATCH)
        return clip.Target(clip.Config(weights=f"file:{path}", **settings), spec).prepare()

    return made


def images(size: int = PATCH * GRID, seed: int = 1) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def near(found, wanted) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_tower_is_clips(state, make):
    """Patches are ln_post(x)[1:] @ proj, the class token is CLIP's own image embedding."""
    target, pixels = make(), images()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in clip.STATISTICS["clip"])
    _, normed, weights = by_hand(state, (pixels - mean) / std)
    wanted = normed @ state["visual.proj"].double()
    found = target(pixels, "patch", "cls", "attention")
    near(found["patch"], wanted[:, 1:])
    near(found["cls"], wanted[:, 0])
    near(found["attention"], weights[:, :, 0, 1:])
    assert target.sizes == {"patch": OUT, "cls": OUT, "attention": WIDTH // 64}
    assert (found["attention"] >= 0).all() and (found["attention"].sum(-1) <= 1).all()
    assert found["patch"].dtype == torch.float32


def test_the_other_activation_is_another_function(state, make):
    pixels = images()
    quick, plain = make()(pixels, "patch")["patch"], make(activation="gelu")(pixels, "patch")
    assert (quick - plain["patch"]).abs().max() > 1e-3
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in clip.STATISTICS["clip"])
    _, normed, _ = by_hand(state, (pixels - mean) / std, quick=False)
    near(plain["patch"], (normed @ state["visual.proj"].double())[:, 1:])


@pytest.mark.parametrize("name", clip.STATISTICS)
def test_the_statistics_of_the_input_are_applied(make, name):
    grey = torch.full((1, 3, 16, 16), 0.5)
    mean, std = (torch.tensor(x) for x in clip.STATISTICS[name])
    seen = make(normalise=name).preprocess(grey)
    torch.testing.assert_close(seen[0, :, 3, 5], (0.5 - mean) / std)


def test_layer_norm_and_projection_as_asked(state, make):
    pixels = images()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in clip.STATISTICS["clip"])
    given, proj = (pixels - mean) / std, state["visual.proj"].double()
    raw, normed, _ = by_hand(state, given, after=2)
    near(make(layer=2)(pixels, "patch")["patch"], (normed @ proj)[:, 1:])
    assert torch.equal(
        make(layer=-2)(pixels, "patch")["patch"], make(layer=2)(pixels, "patch")["patch"]
    )
    near(make(layer=2, project=False)(pixels, "patch")["patch"], normed[:, 1:])
    plain = make(layer=2, post_norm=False)(pixels, "patch", "cls")
    near(plain["patch"], (raw @ proj)[:, 1:])
    near(plain["cls"], (normed @ proj)[:, 0])

    _, last, _ = by_hand(state, given)
    mixed = F.layer_norm(
        (normed + last) / 2, (WIDTH,), state["visual.ln_post.weight"].double(),
        state["visual.ln_post.bias"].double(), 1e-5,
    )  # fmt: skip
    near(make(average=2)(pixels, "patch")["patch"], (mixed @ proj)[:, 1:])
    with pytest.raises(ValueError, match="layer: found 2 and average 3, expected blocks among"):
        make(layer=2, average=3)


def test_another_grid_and_another_size(make):
    """A student of 2x2 patches gets means of 2x2; at its own size nothing is resized."""
    own, pixels = make(), images()
    coarse = make(grid=2)
    coarse.spec = dataclasses.replace(coarse.spec, image_size=8)
    found = coarse(images(8), "patch", "attention")
    assert found["patch"].shape == (2, 4, OUT) and coarse.size == 16
    shown = F.interpolate(images(8), size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    fine = own(shown, "attention")["attention"]
    torch.testing.assert_close(found["attention"].sum(-1), fine.sum(-1), rtol=0.05, atol=0.02)

    assert torch.equal(make(input_size=16)(pixels, "patch")["patch"], own(pixels, "patch")["patch"])
    large = make(input_size=32)
    assert large.encoder.pos_embed.shape[1] == 65
    assert torch.equal(large.encoder.pos_embed[:, 0], own.encoder.pos_embed[:, 0])
    assert large(pixels, "patch")["patch"].shape == (2, 16, OUT)
    with pytest.raises(ValueError, match="input_size: found 18, expected a multiple of the tower"):
        make(input_size=18)


def test_a_patch_of_the_student_is_the_same_place(make):
    """Without blocks that mix places only the target of the changed patch would change; with them
    it changes most.
    """
    target, pixels = make(layer=1), images()
    bright = pixels.clone()
    bright[:, :, 4:8, 8:12] = 1  # row 1, column 2
    change = (target(bright, "patch")["patch"] - target(pixels, "patch")["patch"]).norm(dim=-1)
    assert change.argmax(dim=1).tolist() == [6, 6]


def test_it_is_frozen_and_comes_back_from_its_folder(make, tmp_path):
    target, pixels = make(input_size=32, normalise="imagenet"), images()
    frozen = targets.Frozen(target)
    assert not any(p.requires_grad for p in target.parameters()) and not target.training
    first, again = (frozen(pixels, "patch", "cls", "attention") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    targets.save(target, tmp_path / "saved", "clip", target.config, target.spec)
    loaded = targets.load(tmp_path / "saved")(pixels, "patch", "cls", "attention")
    for name in first:  # which attends without the fused kernel
        torch.testing.assert_close(first[name], loaded[name], rtol=1e-4, atol=1e-5)


def test_what_is_no_clip_is_refused(make, state, tmp_path):
    spec = tiny.spec(image_size=16, patch_size=4)

    def refused(weights: str, why: str, error=WeightsError) -> None:
        with pytest.raises(error, match=why):
            clip.Target(clip.Config(weights=weights), spec).prepare()

    refused(f"file:{tmp_path / 'none.pt'}", "none.pt: cannot be read")
    (tmp_path / "words.pt").write_text("words")
    refused(f"file:{tmp_path / 'words.pt'}", "words.pt: found no plain state dict|cannot be read")
    part = {name: x for name, x in state.items() if "visual" not in name}
    torch.save(part, tmp_path / "text.pt")
    refused(f"file:{tmp_path / 'text.pt'}", "text.pt: found other tensors than those of a ViT of C")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    refused(f"file:{tmp_path / 'module.pt'}", "module.pt: found no plain state dict")
    refused("timm:vit_base_patch16_clop", "timm has no model", ValueError)
    refused(f"local:{tmp_path}", "not a folder with config.json")
    for bad, key in (({"weights": "openai"}, "weights"), ({"layer": 0}, "layer")):
        with pytest.raises(ValueError, match=f"{key}: found"):
            clip.Config(**bad)
    empty = clip.Target(clip.Config(), spec)
    with pytest.raises(RuntimeError, match="no weights yet"):
        empty(images(), "patch")


def test_half_precision_and_a_wrapped_module_are_read(make, state, tmp_path):
    """As OpenAI's archive and some of open_clip's files have them."""
    halves = {
        f"module.{name}": x.half() if x.is_floating_point() else x for name, x in state.items()
    }
    torch.save(halves, tmp_path / "half.pt")
    spec = tiny.spec(image_size=16, patch_size=4)
    target = clip.Target(clip.Config(weights=f"file:{tmp_path / 'half.pt'}"), spec).prepare()
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert (target(images(), "cls")["cls"] - make()(images(), "cls")["cls"]).abs().max() < 0.05


def test_a_folder_of_timms_and_whether_labels_made_it(make, tmp_path):
    import timm

    folder = tmp_path / "tower"
    args = dict(img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=1, num_classes=8)
    tower = timm.create_model("vit_base_patch16_clip_quickgelu_224", **args)
    with torch.no_grad():
        tower.head.bias.zero_()
    timm.models.save_for_hf(tower, str(folder), model_args=args, safe_serialization=True)
    spec = tiny.spec(image_size=16, patch_size=4)
    config = clip.Config(weights=f"local:{folder}")
    target = clip.Target(config, spec).prepare()
    pixels = images()
    wanted = tower.eval().head(tower.forward_features(target.preprocess(pixels)))
    near(target(pixels, "patch")["patch"], wanted[:, 1:].double())

    with torch.no_grad():
        tower.head.bias.fill_(1)
    timm.models.save_for_hf(tower, str(folder), model_args=args, safe_serialization=True)
    with pytest.raises(ValueError, match="has a bias, expected CLIP's projection"):
        clip.Target(config, spec).prepare()

    name = "timm:vit_base_patch16_clip_quickgelu_224"
    assert not clip.labels(config) and not clip.labels(clip.Config(weights=f"{name}.openai"))
    tuned = "timm:vit_base_patch16_clip_224.openai_ft_in1k"
    assert clip.labels(clip.Config(weights=tuned))
    assert not clip.labels(clip.Config(weights=tuned, labels=False))


BASE = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}


@pytest.fixture(scope="module")
def base():
    """CLIP's ViT-B/16, with random weights."""
    import timm

    target = clip.Target(clip.Config(), tiny.spec(224, **BASE))
    torch.manual_seed(0)
    network = timm.create_model("vit_base_patch16_clip_quickgelu_224")
    assert sum(p.numel() for p in network.parameters()) == 86_193_152
    args = {"img_size": 224, "patch_size": 16, "num_classes": 512}
    target._build({"architecture": "vit_base_patch16_clip_quickgelu_224", "args": args}, network)
    return targets.Frozen(target)


@pytest.mark.parametrize("run", ["milan", "milan-mae-style", "eva", "eva-l-style", "dbot"])
def test_two_steps_of_each_recipe_with_a_teacher_of_clips_size(base, run):
    """ViT-B/16 of presets/clip-imagenet.yaml, one image; the teacher is left as it is."""
    from stages.kit.spec import configure
    from stages.kit.train import optim
    from stages.kit.train.recipe import Recipe
    from workflow.params import read

    chosen = read(ROOT / "presets/clip-imagenet.yaml").runs[run]
    module = tiny.module(chosen.kind)
    config = configure(module.Config, chosen.settings.config)
    assert base.sizes == {"patch": 512, "cls": 512, "attention": 12}
    before = base.open.proj.weight.clone()
    torch.manual_seed(0)
    method = module.Method(config, tiny.spec(224, **BASE), base)
    optimiser = optim.build(
        Recipe(1, 2, 2, lr=1e-4), optim.groups(method, 0.05), torch.device("cpu")
    )
    for step in range(2):
        optimiser.zero_grad()
        loss = method({"view": tiny.images(1, 224, step)}, tiny.progress(1, step, 2))["loss"]
        loss.backward()
        optimiser.step()
        assert loss.isfinite()
    assert torch.equal(before, base.open.proj.weight) and base.open.proj.weight.grad is None
