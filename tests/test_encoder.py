"""Encoders of every family: abilities, forward passes, export, fine-tuning; positions and patches.

Families are swept: a new file in stages/encoders is tested as soon as it exists.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.interpolate import RectBivariateSpline
from scipy.stats import kstest, norm, truncnorm
from timm.models._hub import save_config_for_hf
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from stages import encoders as families
from stages.encoders import vit
from stages.kit.nets import encoders, patches, pictures, positions
from stages.kit.nets.masks import take
from stages.kit.nets.positions import sincos_2d
from stages.kit.spec import Spec
from stages.kit.train import optim
from tests import tiny
from tests.conftest import tiny_content
from workflow import plugins
from workflow.params import ParamsError, check

KINDS = plugins.names("encoder")
STYLES = [(kind, style) for kind in KINDS for style in tiny.model(kind).styles]
MODULES = {kind: tiny.module(kind, "encoder") for kind in KINDS}
SWINS = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def able(ability):
    return [pair for pair in STYLES if ability in MODULES[pair[0]].CAN]


def build(kind="vit", style="timm", size=32, changes=None, **kw):
    """An encoder in which nothing is zero or one that could hide a mistake, and its spec."""
    torch.manual_seed(0)
    spec = tiny.spec(size, kind, **(changes or {}))
    encoder = encoders.create(spec, style, **kw).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder, spec


def small(style, **kw):
    """A ViT of 16 patches."""
    return build("vit", style, 16, **kw)[0]


def some(encoder, rows, keep=5, seed=2):
    """Patches of each row, in random order: ids (rows,keep)."""
    count = encoder.patch_embed.num_patches
    noise = torch.rand(rows, count, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1)[:, :keep]


def drawn_mask(encoder, rows=3, seed=3):
    count = encoder.patch_embed.num_patches
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.fixture(params=["sincos", "beit"])
def encoder(request):
    return small(request.param)


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# --- every family -------------------------------------------------------------------------------


def test_there_are_families():
    assert {"vit", "swin", "convvit", "pvt"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_plan_reads_is_what_the_module_has(kind):
    declared, module = plugins.declared("encoder", kind), MODULES[kind]
    assert declared.literals["CAN"] == module.CAN
    assert declared.literals["NAMES"] == module.NAMES
    assert dataclasses.asdict(declared.config()) == dataclasses.asdict(module.Config())
    assert set(re.findall(r'^    "(\w+)"  ', families.__doc__, re.M)) >= module.CAN


@pytest.mark.parametrize("kind", KINDS)
def test_its_timm_names_are_its_own(kind):
    """The name in a tiny model, and that of what it builds, belong to this family alone."""
    for style in tiny.model(kind).styles:
        encoder, spec = build(kind, style)
        built = encoder.pretrained_cfg["architecture"]
        assert type(encoder).__name__ in MODULES[kind].CLASSES or style == "beit"
        for name in (spec.model.name, built):
            assert [k for k in KINDS if re.match(MODULES[k].NAMES, name)] == [kind], name


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_survives_json(kind):
    spec = tiny.spec(32, kind)
    again = Spec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert type(again.model) is MODULES[kind].Config
    assert (again.grid, again.stride, again.patch) == (spec.grid, spec.stride, spec.patch)
    info = {"mean": list(spec.mean), "std": list(spec.std), "classes": ["a"] * spec.num_classes}
    info["splits"] = {"train": {"count": spec.images}}
    entry = {"kind": kind, "config": json.loads(json.dumps(spec.to_json()))["model"]}
    assert Spec.of(info, 32, entry) == dataclasses.replace(spec, classes=("a",) * spec.num_classes)


@pytest.mark.parametrize(("kind", "style"), STYLES)
def test_the_grid_is_that_of_the_spec(kind, style):
    encoder, spec = build(kind, style)
    found = encoders.features(encoder, IMAGES)
    assert found["patch"].shape == (3, spec.grid**2, encoder.num_features)
    assert found["cls"].shape == (3, encoder.num_features)
    assert spec.grid == 32 // spec.stride
    assert not [m for m in encoder.modules() if getattr(m, "drop_prob", 0)]  # timm's Swin has 0.1


@pytest.mark.parametrize(("kind", "style"), STYLES)
def test_both_forward_passes_give_the_same_dict(kind, style):
    """All keys, whatever the family, with a class token or the patches' mean in its place."""
    encoder, spec = build(kind, style)
    found = {}
    if "drop" in MODULES[kind].CAN:
        found["visible"] = encoders.visible(encoder, IMAGES, some(encoder, 6))
        assert found["visible"]["patch"].shape == (6, 5, encoder.num_features)
    if "mask" in MODULES[kind].CAN:
        token = torch.randn(1, 1, spec.model.embed_dim)
        found["masked"] = encoders.masked(encoder, IMAGES, drawn_mask(encoder), token)
        assert found["masked"]["patch"].shape == (3, spec.grid**2, encoder.num_features)
    assert found, "a family that methods can use"
    for seen in found.values():
        assert set(seen) == {"tokens", "cls", "patch", "taps", "bias"}
        assert seen["taps"] == {}
        prefix = getattr(encoder, "num_prefix_tokens", 0)
        assert torch.equal(seen["tokens"][:, prefix:], seen["patch"])
        cls = seen["tokens"][:, 0] if encoders.has_cls(encoder) else seen["patch"].mean(1)
        assert torch.equal(seen["cls"], cls)
        assert encoders.has_cls(encoder) == ("cls" in MODULES[kind].CAN)
        assert (seen["bias"] is not None) == (kind == "vit" and style == "beit")


@pytest.mark.parametrize(("kind", "style"), STYLES)
@torch.no_grad()
def test_nothing_hidden_is_timms_forward(kind, style):
    encoder, _ = build(kind, style)
    expected = encoders.features(encoder, IMAGES)
    found = []
    if "mask" in MODULES[kind].CAN:
        none = torch.zeros(3, encoder.patch_embed.num_patches, dtype=torch.bool)
        found.append(encoders.masked(encoder, IMAGES, None, None))
        found.append(encoders.masked(encoder, IMAGES, none, torch.full((1, 1, 32), 1e3)))
    if "drop" in MODULES[kind].CAN:
        every = torch.arange(encoder.patch_embed.num_patches).expand(3, -1)
        found.append(encoders.visible(encoder, IMAGES, every))
    for seen in found:
        for key in ("cls", "patch"):
            torch.testing.assert_close(seen[key], expected[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "style"), STYLES)
@torch.no_grad()
def test_without_the_last_norm(kind, style):
    encoder, _ = build(kind, style)
    passes = {"drop": lambda **kw: encoders.visible(encoder, IMAGES, some(encoder, 3), **kw)}
    passes["mask"] = lambda **kw: encoders.masked(encoder, IMAGES, None, None, **kw)
    for ability in {"drop", "mask"} & MODULES[kind].CAN:
        before, after = passes[ability](norm=False), passes[ability]()
        assert torch.equal(encoder.norm(before["tokens"]), after["tokens"])
        assert not torch.allclose(before["tokens"], after["tokens"], atol=0.1)
        prefix = getattr(encoder, "num_prefix_tokens", 0)
        assert torch.equal(before["patch"], before["tokens"][:, prefix:])


@pytest.mark.parametrize(("kind", "style"), able("taps"))
@torch.no_grad()
def test_taps_are_the_blocks_outputs(kind, style):
    encoder, _ = build(kind, style)
    stages = [encoder] if hasattr(encoder, "blocks") else encoder.layers
    blocks = [block for stage in stages for block in stage.blocks]
    count, seen = len(blocks), {}
    assert sum(encoders.depths(encoder)) == count == 2
    for number, block in enumerate(blocks, start=1):
        block.register_forward_hook(lambda m, args, out, n=number: seen.update({n: out}))
    passes = {"drop": lambda **kw: encoders.visible(encoder, IMAGES, some(encoder, 6), **kw)}
    passes["mask"] = lambda **kw: encoders.masked(encoder, IMAGES, None, None, **kw)
    for ability in {"drop", "mask"} & MODULES[kind].CAN:
        found = passes[ability](taps=(1, count), norm=False)
        assert set(found["taps"]) == {1, count}
        for number, tokens in found["taps"].items():
            states = seen[number]
            states = states.flatten(1, 2) if states.ndim == 4 else states
            assert torch.equal(tokens, states), number
        assert torch.equal(found["taps"][count], found["tokens"])
        assert set(passes[ability](taps=(2,))["taps"]) == {2}
        for wrong in (0, count + 1, -1):
            with pytest.raises(ValueError, match=rf"taps: found \({wrong},\), .* 1\.\.{count}"):
                passes[ability](taps=(wrong,))


@pytest.mark.parametrize(("kind", "style"), able("drop"))
def test_only_visible_patches_count(kind, style):
    """Views of one batch: each row is as if alone, and no gradient reaches a pixel it hides."""
    encoder, spec = build(kind, style)
    ids = some(encoder, 6)
    together = encoders.visible(encoder, IMAGES, ids)["tokens"]
    for row in range(6):
        alone = encoders.visible(encoder, IMAGES[row % 3][None], ids[row][None])["tokens"][0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)
    one = IMAGES.clone().requires_grad_()
    encoders.visible(encoder, one, ids)["tokens"][4].square().sum().backward()
    reached = patches.patchify(one.grad, spec.patch).abs().sum(-1) > 0  # (3, N)
    expected = torch.zeros_like(reached)
    expected[1, ids[4]] = True
    assert torch.equal(reached, expected)
    with pytest.raises(ValueError, match="ids: found 4 rows, expected a multiple of the 3 images"):
        encoders.visible(encoder, IMAGES, ids[:4])


@pytest.mark.parametrize(("kind", "style"), able("mask"))
@torch.no_grad()
def test_hidden_patches_are_the_token(kind, style):
    encoder, spec = build(kind, style)
    mask, token = drawn_mask(encoder), torch.randn(1, 1, 32)
    before = encoders.masked(encoder, IMAGES, mask, token)["tokens"]
    other = pictures.paint(IMAGES, mask, torch.randn_like(IMAGES) * 5)
    assert torch.equal(encoders.masked(encoder, other, mask, token)["tokens"], before)
    other = pictures.paint(IMAGES, ~mask, torch.randn_like(IMAGES) * 5)
    assert not torch.allclose(encoders.masked(encoder, other, mask, token)["tokens"], before)
    assert not torch.allclose(encoders.masked(encoder, IMAGES, mask, -token)["tokens"], before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_family_claims_works_and_the_rest_is_refused(kind, tmp_path):
    encoder, spec = build(kind)
    every = torch.ones(3, 65, 65, dtype=torch.bool)

    def visible(**kw):
        return encoders.visible(encoder, IMAGES, some(encoder, 3, keep=64), **kw)

    def masked(**kw):
        return encoders.masked(encoder, IMAGES, None, None, **kw)

    asked = [("drop", visible), ("mask", masked)]
    asked += [("attention", lambda: encoders.attention(encoder, IMAGES))]
    for ability, run in asked[:2]:
        if encoders.can(encoder, ability):
            asked += [("taps", functools.partial(run, taps=(1,)))]
            asked += [("attention", functools.partial(run, attend=every))]
    for ability, run in asked:
        if encoders.can(encoder, ability):
            run()
            continue
        with pytest.raises(ValueError, match=f"found a {kind} .* expected one with {ability}"):
            run()
    encoders.save(encoder, tmp_path, spec)
    if encoders.can(encoder, "cls"):
        assert encoders.classifier(tmp_path, 3, pool="token")(IMAGES).shape == (3, 3)
    else:
        with pytest.raises(ValueError, match="no class token"):
            encoders.classifier(tmp_path, 3, pool="token")
    if encoders.can(encoder, "sizes"):
        several = encoders.create(spec, dynamic_img_size=True).eval()
        for size in (16, 32):
            patch = encoders.features(several, torch.randn(2, 3, size, size))["patch"]
            assert patch.shape[1] == (size // spec.stride) ** 2
    if encoders.can(encoder, "plain"):
        plain = encoders.create(tiny.spec(4, kind, patch_size=1), in_chans=7, depth=1)
        assert encoders.features(plain, torch.randn(2, 7, 4, 4))["patch"].shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("kind", "style"), [("vit", "beit"), ("swin", "timm"), ("convvit", "timm"), ("pvt", "timm")]
)
def test_a_compiler_sees_one_graph(kind, style):
    """Finding the family must not interrupt it."""
    encoder, _ = build(kind, style)
    ids = some(encoder, 3)
    calls = {"drop": lambda x: encoders.visible(encoder, x, ids)["tokens"]}
    calls["mask"] = lambda x: encoders.masked(encoder, x, None, None)["tokens"]
    for ability in {"drop", "mask"} & MODULES[kind].CAN:
        torch._dynamo.reset()
        compiled = torch.compile(calls[ability], backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IMAGES), calls[ability](IMAGES))
    torch._dynamo.reset()


def test_networks_know_nothing_of_data_training_and_jobs():
    folder = Path(encoders.__file__).parent
    for path in [*folder.glob("*.py"), *Path(families.__file__).parent.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "module", None) or ""
            assert not re.match(r"stages\.kit\.(data|parts|train|job)\b", name), (path, name)


def test_an_encoder_of_somebody_else_is_refused():
    with pytest.raises(ValueError, match="encoder: found another module, expected one made by"):
        encoders.masked(timm.create_model("vit_tiny_patch16_224"), IMAGES, None, None)


def test_a_style_that_a_family_has_not_is_named():
    with pytest.raises(ValueError, match="style: found 'beit', expected 'timm' or 'sincos' of a"):
        encoders.create(tiny.spec(32, "convvit"), "beit")
    with pytest.raises(ValueError, match="style: found 'vit', expected 'timm' or 'sincos' or"):
        encoders.create(tiny.spec(), "vit")


@pytest.mark.parametrize(("kind", "style"), STYLES)
def test_export_is_bit_equal_and_its_family_is_found(kind, style, tmp_path):
    encoder, spec = build(kind, style)
    for name in ("a", "b"):
        encoders.save(encoder, tmp_path / name, spec)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    expected = encoder.forward_features(IMAGES)
    assert torch.equal(loaded.forward_features(IMAGES), expected)
    described = loaded.pretrained_cfg
    assert (tuple(described["mean"]), tuple(described["std"])) == (spec.mean, spec.std)
    assert tuple(described["input_size"]) == (3, 32, 32)
    assert described["tag"] == "mimlab"  # not the provenance of timm's own weights
    assert loaded.num_classes == 0
    ours, same = encoders.load(tmp_path / "a"), encoders.load(tmp_path / "a", img_size=32)
    assert ours.family == same.family == kind
    for found in (ours, same):
        assert torch.equal(found.eval().forward_features(IMAGES), expected)
    assert encoders.classifier(tmp_path / "a", 3).family == kind
    ability = min({"drop", "mask"} & MODULES[kind].CAN)
    assert encoders.can(ours, ability)


@pytest.mark.parametrize(("kind", "style"), STYLES)
def test_an_encoder_of_another_size_of_image_can_be_used_at_the_datas(kind, style, tmp_path):
    """A method's input_size: trained at 48 pixels, exported, then loaded for images of 32."""
    data = tiny.spec(32, kind)
    spec = data.at(48)
    assert (spec.image_size, data.at(None)) == (48, data)
    assert spec.grid == 48 // spec.stride
    torch.manual_seed(0)
    encoder = encoders.create(spec, style).eval()
    encoders.save(encoder, tmp_path, spec)
    large = torch.randn(2, 3, 48, 48)
    found = encoders.load(tmp_path).eval().forward_features(large)
    assert torch.equal(found, encoder.forward_features(large))
    loaded = encoders.load(tmp_path, img_size=data.image_size).eval()
    assert encoders.features(loaded, IMAGES)["patch"].shape == (
        3,
        data.grid**2,
        loaded.num_features,
    )
    assert encoders.classifier(tmp_path, 3, img_size=32)(IMAGES).shape == (3, 3)
    for name, value in encoder.state_dict().items():  # positions alone are resized
        fits = "pos_embed" in name or "relative_position" in name or "cpb" in name
        assert fits or torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_settings_are_not_exported(kind, tmp_path):
    spec = tiny.spec(32, kind)
    encoders.save(encoders.create(spec, drop_path=0.3), tmp_path, spec)
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert "drop_path_rate" not in arguments


def test_an_architecture_of_no_family_is_refused(tmp_path):
    encoder, spec = build()
    encoders.save(encoder, tmp_path, spec)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "resnet18"}))
    for use in (encoders.load, lambda folder: encoders.classifier(folder, 3)):
        with pytest.raises(ValueError, match="'resnet18' is of no family in stages/encoders"):
            use(tmp_path)


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("mae", {"vit", "convvit"}),
        ("simmim", {"vit", "swin", "pvt"}),
        ("beitv2", {"vit"}),
        ("random", {"vit", "swin", "convvit", "pvt"}),
        ("supervised", {"vit", "swin", "convvit", "pvt"}),
    ],
)
def test_which_methods_take_which_families(method, kinds):
    needs = tiny.module(method).NEEDS
    found = {kind for kind in ("vit", "swin", "convvit", "pvt") if needs <= MODULES[kind].CAN}
    assert found == kinds


# --- which tokens see which ---------------------------------------------------------------------


def by_hand(encoder, images, mask, token, attend):
    """The forward pass of a ViT, written out: dense matrices, one head after the other."""
    tokens = encoder.patch_embed(images)
    tokens = torch.where(mask[..., None], token, tokens)
    prefix = encoder.cls_token.expand(len(images), -1, -1)
    x = torch.cat([prefix, tokens], 1)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    shared = getattr(encoder, "rel_pos_bias", None)
    bias = torch.zeros(()) if shared is None else shared()
    for block in encoder.blocks:
        attn, y = block.attn, block.norm1(x)
        qkv = attn.qkv.bias
        if qkv is None:
            qkv = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        q, k, v = (y @ attn.qkv.weight.T + qkv).chunk(3, -1)
        outs, size = [], q.shape[-1] // attn.num_heads
        for head in range(attn.num_heads):
            at = slice(head * size, head * size + size)
            scores = q[..., at] @ k[..., at].mT / math.sqrt(size)
            scores = scores + (bias[head] if bias.ndim else 0)
            weights = scores.exp() * attend
            outs.append(weights / weights.sum(-1, keepdim=True) @ v[..., at])
        y, scale = attn.proj(torch.cat(outs, -1)), getattr(block, "gamma_1", 1)
        x = x + scale * y
        x = x + getattr(block, "gamma_2", 1) * block.mlp(block.norm2(x))
    return encoder.norm(x)


def openings(rows, tokens, seed=4):
    """Which keys each query of each sample may see, at least itself."""
    noise = torch.rand(rows, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return (noise < 0.4) | torch.eye(tokens, dtype=torch.bool)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_masks_of_each_sample(encoder, images, fused):
    encoder, images = encoder.double(), images.double()
    for block in encoder.blocks:
        block.attn.fused_attn = fused
    mask, token = drawn_mask(encoder), torch.randn(1, 1, 32, dtype=torch.float64)
    attend = openings(3, 17)
    found = encoders.masked(encoder, images, mask, token, attend=attend)
    expected = by_hand(encoder, images, mask, token, attend)
    torch.testing.assert_close(found["tokens"], expected, atol=1e-11, rtol=1e-11)
    seen = encoders.masked(encoder, images, mask, token, attend=attend, attention=True)
    assert torch.equal(seen["tokens"], found["tokens"])
    assert torch.equal(seen["attention"] > 0, attend[:, None].expand(-1, 2, -1, -1))
    assert torch.allclose(seen["attention"].sum(-1).float(), torch.ones(3, 2, 17))
    free = encoders.masked(encoder, images, mask, token)["tokens"]
    assert not torch.allclose(found["tokens"], free, atol=1e-3)
    torch.testing.assert_close(
        free, by_hand(encoder, images, mask, token, torch.ones(17, 17)), atol=1e-11, rtol=1e-11
    )


def test_attention_masks_of_visible_patches(encoder, images):
    """In the order of the ids, the class token first; as the same mask on the whole sequence."""
    encoder, images, ids = encoder.double(), images.double(), some(encoder, 3)
    attend = openings(3, 6)
    found = encoders.visible(encoder, images, ids, attend=attend)["tokens"]
    places = F.pad(ids + 1, (1, 0))
    whole = torch.eye(17, dtype=torch.bool).repeat(3, 1, 1)
    for row in range(3):
        whole[row, places[row][:, None], places[row]] = attend[row]
    none = torch.zeros(3, 16, dtype=torch.bool)
    expected = by_hand(encoder, images, none, torch.zeros(1, 1, 32), whole)
    torch.testing.assert_close(found, take(expected, places), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("low", [False, True])
def test_an_open_mask_changes_nothing(encoder, images, low):
    ids, token = some(encoder, 3), torch.randn(1, 1, 32)
    passes = (
        lambda **kw: encoders.visible(encoder, images, ids, **kw)["tokens"],
        lambda **kw: encoders.masked(encoder, images, drawn_mask(encoder), token, **kw)["tokens"],
    )
    for call, count in zip(passes, (6, 17), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            open_ = call(attend=torch.ones(3, count, count, dtype=torch.bool))
            torch.testing.assert_close(open_, call(), atol=0.1 if low else 1e-5, rtol=0)
            some_ = call(attend=openings(3, count))
        assert torch.isfinite(some_).all()


def test_a_closed_key_has_no_influence(encoder, images):
    """Nobody but patch 5 itself may see patch 5 of sample 1: no gradient leads to its pixels."""
    attend = torch.ones(3, 17, 17, dtype=torch.bool)
    attend[1, :, 6] = False
    attend[1, 6, 6] = True
    given = images.clone().requires_grad_()
    tokens = encoders.masked(encoder, given, None, None, attend=attend)["tokens"]
    others = tokens[:, [n for n in range(17) if n != 6]]
    (others * torch.randn(others.shape)).sum().backward()
    reached = patches.patchify(given.grad, 4).abs().sum(-1) > 0
    expected = torch.ones(3, 16, dtype=torch.bool)
    expected[1, 5] = False
    assert torch.equal(reached, expected)
    assert torch.isfinite(given.grad).all()
    changed = images.clone()
    changed[1, :, 4:8, 4:8] += 3  # patch 5 of a grid of four
    after = encoders.masked(encoder, changed, None, None, attend=attend)["tokens"]
    assert torch.equal(after[:, 7:], tokens[:, 7:])
    assert torch.equal(after[:, :6], tokens[:, :6])
    assert not torch.equal(after[1, 6], tokens[1, 6])


# --- a ViT's parts ------------------------------------------------------------------------------


def test_running_a_permutation_of_all_patches_permutes_the_result(encoder, images):
    """Positions, absolute or relative, travel with the patches."""
    ids = some(encoder, 3, keep=16)
    full = encoders.masked(encoder, images, None, None)
    part = encoders.visible(encoder, images, ids)
    torch.testing.assert_close(part["patch"], take(full["patch"], ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part["cls"], full["cls"], atol=1e-5, rtol=1e-5)


def test_subset_has_its_rows_of_the_bias():
    encoder = small("beit")
    full = vit.shared_bias(encoder)[0]
    ids = torch.tensor([[3, 0, 9], [5, 14, 1]])
    part = vit.shared_bias(encoder, ids)
    for b in range(2):
        places = [0, *(ids[b] + 1).tolist()]
        assert torch.equal(part[b], full[:, places][:, :, places])


def test_relative_position_index():
    """(2H-1)(2W-1)+3 rows: patch i to j at (yi-yj+H-1)(2W-1) + xi-xj+W-1, three for the class
    token.
    """
    encoder = small("beit")
    side, table = 4, encoder.rel_pos_bias.relative_position_bias_table
    assert table.shape == (7 * 7 + 3, 2)
    bias = vit.shared_bias(encoder)[0]
    for i in range(16):
        for j in range(16):
            rows, columns = i // side - j // side, i % side - j % side
            row = (rows + side - 1) * (2 * side - 1) + columns + side - 1
            assert torch.equal(bias[:, 1 + i, 1 + j], table[row])
    assert torch.equal(bias[:, 0, 5], table[-3])  # query cls
    assert torch.equal(bias[:, 5, 0], table[-2])  # key cls
    assert torch.equal(bias[:, 0, 0], table[-1])


def test_tables_of_each_block_cannot_run_on_some_patches(images, tmp_path):
    encoders.save(small("beit"), tmp_path, tiny.spec())
    own = encoders.classifier(tmp_path, 3)
    with pytest.raises(ValueError, match="tables of relative positions"):
        encoders.visible(own, images, torch.zeros(3, 2, dtype=torch.long))


def test_attention_maps_are_those_of_the_last_block(encoder, images):
    seen = {}
    block = encoder.blocks[-1]
    block.norm1.register_forward_hook(lambda module, args, out: seen.update(x=out))
    block.attn.register_forward_hook(lambda module, args, out: seen.update(out=out))
    encoder.forward_features(images)
    x, expected = seen["x"], seen["out"]
    maps = encoders.attention(encoder, images)
    assert maps.shape == (3, 2, 17, 17)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 2, 17))
    bias = block.attn.qkv.bias
    if bias is None:
        bias = torch.cat([block.attn.q_bias, block.attn.k_bias, block.attn.v_bias])
    value = (x @ block.attn.qkv.weight.T + bias)[..., 64:].view(3, 17, 2, 16).transpose(1, 2)
    out = block.attn.proj((maps @ value).transpose(1, 2).reshape(3, 17, 32))
    assert torch.allclose(out, expected, atol=1e-5)


def test_one_pass_gives_features_taps_and_attention(encoder, images):
    found = encoders.features(encoder, images, taps=(1,), attention=True)
    for name, expected in encoders.features(encoder, images).items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found["attention"], encoders.attention(encoder, images)[:, :, 0, 1:])
    taps = encoders.masked(encoder, images, None, None, taps=(1,))["taps"]
    assert torch.equal(found["taps"][1], taps[1])


def test_registers_and_missing_class_token(images):
    spec = tiny.spec()
    registers = encoders.create(spec, "sincos", reg_tokens=2).eval()
    assert registers.pos_embed[0, :3].abs().max() == 0
    assert torch.equal(registers.pos_embed[0, 3:], sincos_2d(32, 4))
    seen = encoders.masked(registers, images, None, None)
    assert seen["tokens"].shape == (3, 19, 32)
    assert seen["patch"].shape == (3, 16, 32)
    assert torch.allclose(seen["tokens"], registers.forward_features(images), atol=1e-6)
    few = encoders.visible(registers, images, some(registers, 3))
    assert few["tokens"].shape == (3, 3 + 5, 32)
    without = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    bare = encoders.create(spec, "sincos", **without).eval()
    features = encoders.features(bare, images)
    assert torch.equal(features["cls"], features["patch"].mean(1))


@torch.no_grad()
def test_the_mask_token_gets_the_position_of_its_place(images):
    for args in ({}, {"args": {"use_abs_pos_emb": True}}):
        encoder = small("beit" if args else "sincos", changes=args)
        token = torch.randn(1, 1, 32)
        tokens = vit.patch_tokens(encoder, images, torch.ones(3, 16, dtype=torch.bool), token)
        assert torch.allclose(tokens, (token + encoder.pos_embed[:, 1:]).expand(3, -1, -1))


@pytest.mark.parametrize(
    ("size", "changes", "match"),
    [
        (18, {}, "^patch_size: found 4, .* expected a divisor of image_size 18"),
        (16, {"name": "resnet18"}, "^model: timm cannot build 'resnet18'"),
        (16, {"name": "deit3_small_patch16_224", "args": {"bogus": 1}}, "^model: .*bogus"),
        (16, {"name": "beit_base_patch16_224"}, "^model.name: 'beit.*' is a Beit, expected a Visi"),
        (16, {"name": "vit_tiny_patch16_223"}, "^model.name: .*vit_tiny_patch16_224"),
        (16, {"name": "swin_tiny_patch4_window7_224"}, "^model"),
        (16, {"args": {"bogus": 1}}, "^model: .*bogus"),
        (16, {"num_heads": 3}, "^embed_dim: found 32, expected a multiple of num_heads 3"),
        (16, {"embed_dim": 18}, "multiple of 4"),
        (16, {"args": {"pos_embed": "none"}}, "pos_embed"),
        (16, {"depth": 0}, "^depth: found 0, expected 1 or more"),
        (16, {"patch_size": 0}, "^patch_size: found 0, expected 1 or more"),
        (16, {"mlp_ratio": 0.0}, "^mlp_ratio: found 0.0, expected a number above 0"),
    ],
)
def test_errors_name_the_key(size, changes, match):
    with pytest.raises(ValueError, match=match):
        encoders.create(tiny.spec(size, **changes), "sincos")


# --- fine-tuning --------------------------------------------------------------------------------


def test_classifier_of_a_vit(images, tmp_path):
    torch.manual_seed(0)
    encoder = encoders.create(tiny.spec(), "sincos").eval()
    encoders.save(encoder, tmp_path, tiny.spec())
    torch.manual_seed(0)
    model = encoders.classifier(tmp_path, 7, drop_path=0.1).eval()
    state, new = encoder.state_dict(), model.state_dict()
    assert set(new) - set(state) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert set(state) - set(new) == {"norm.weight", "norm.bias"}
    assert all(torch.equal(state[key], new[key]) for key in set(state) & set(new))
    assert not encoder.pos_embed.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.pos_embed[0, 1:], sincos_2d(32, 4))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1])
    assert 0 < model.head.weight.abs().max() < 5 * 2e-5
    assert model.head.bias.abs().max() == 0
    # mean of the patches -> new norm -> head, without the old norm and without cls
    tokens = encoders.masked(encoder, images, None, None, norm=False)["patch"]
    pooled = F.layer_norm(tokens.mean(1), (32,), eps=1e-6)
    assert torch.allclose(model(images), pooled @ model.head.weight.T, atol=1e-7)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_head_of_a_classifier_starts_with_the_deviation_asked_for(kind, tmp_path):
    """dBOT's fine-tuning starts it at 0.01, cut at 2 in absolute terms: a normal distribution."""
    given = tiny.spec(kind=kind)
    encoders.save(encoders.create(given), tmp_path, given)
    torch.manual_seed(0)
    head = encoders.classifier(tmp_path, 200, head_std=0.01).get_classifier()
    assert kstest(head.weight.detach().flatten().numpy(), norm(scale=0.01).cdf).pvalue > 1e-3
    assert head.bias.abs().max() == 0


def cubic_weights(distance):
    """Keys' kernel with a = -0.75, which torch takes without antialiasing."""
    x, a = np.abs(distance), -0.75
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def sampling(old: int, new: int, step: float) -> np.ndarray:
    """(new, old): what each new place takes of the old ones, which go on beyond the edge."""
    matrix = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * step - 0.5
        for place in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(place, 0), old - 1)] += cubic_weights(centre - place)
    return matrix


@pytest.mark.parametrize(("old", "new"), [(14, 6), (14, 24), (7, 14), (4, 3)])
@pytest.mark.parametrize("excess", [None, 0.0, 0.1])
def test_absolute_positions_are_resized_as_by_mae_and_dino(old, new, excess):
    table = torch.randn(1, old * old, 5, generator=torch.Generator().manual_seed(0))
    matrix = sampling(old, new, old / (new + (excess or 0.0)))
    grid = table[0].view(old, old, 5).double().numpy()
    expected = np.einsum("ra,cb,abd->rcd", matrix, matrix, grid).reshape(1, new * new, 5)
    found = positions.absolute(table, old, new, excess)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert positions.absolute(table, old, old, excess) is table


@pytest.mark.parametrize(("old", "new", "extra"), [(14, 24, 3), (8, 16, 3), (14, 7, 3), (7, 12, 0)])
def test_relative_positions_are_resized_as_in_beits_code(old, new, extra):
    """FITPACK's regrid, which is what scipy's interp2d was for a regular grid, is the judge."""
    source, target = 2 * old - 1, 2 * new - 1
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(source**2 + extra, 2, generator=generator)
    low, high = 1.01, 1.5  # as microsoft/unilm describes it, written anew

    def reach(q):
        return sum(q**i for i in range(source // 2))

    while high - low > 1e-6:
        middle = (low + high) / 2
        if reach(middle) > target // 2:
            high = middle
        else:
            low = middle
    x = np.array([sum(middle**i for i in range(n)) for n in range(source // 2 + 1)])
    x = np.concatenate([-x[:0:-1], x])
    new_x = np.arange(-(target // 2), target // 2 + 1.0)
    expected = np.stack(
        [
            RectBivariateSpline(x, x, head.view(source, source).double().numpy(), s=0)(new_x, new_x)
            for head in table[: source**2].T
        ],
        axis=-1,
    ).reshape(-1, 2)
    found = positions.relative(table, target**2 + extra)
    np.testing.assert_allclose(found[: target**2].numpy(), expected, atol=1e-5)
    assert torch.equal(found[target**2 :], table[source**2 :])
    assert found[target**2 // 2].tolist() == pytest.approx(table[source**2 // 2].tolist())
    if new > old:
        assert x[-1] == pytest.approx(target // 2, abs=1e-3)


def test_relative_tables_of_tiny_grids_are_resized_along_lines():
    table = torch.arange(9.0)[:, None]  # of 2 x 2 places
    rows = torch.tensor([0, 0, 1, 2, 2])  # the nearest offset for those that the table lacks
    assert torch.equal(positions.relative(table, 25)[:, 0].view(5, 5), 3 * rows[:, None] + rows)
    assert torch.equal(positions.relative(table, 1), table[4:5])
    assert torch.equal(positions.relative(table[:1] + 7, 9), torch.full((9, 1), 7.0))


@pytest.mark.parametrize(("entries", "others"), [(12, 25), (16, 49), (28, 9)])
def test_tables_that_are_not_of_grids_are_refused(entries, others):
    with pytest.raises(ValueError, match=f"found tables of {entries} and {others} entries"):
        positions.relative(torch.zeros(entries, 2), others)


@pytest.mark.parametrize("how", ["bicubic", "dino"])
@pytest.mark.parametrize(("kind", "style"), STYLES)
def test_every_encoder_can_be_fitted_to_other_images(how, kind, style, tmp_path):
    given = tiny.spec(32, kind)
    encoders.save(encoders.create(given, style), tmp_path, given)
    encoder = encoders.load(tmp_path, positions=how, img_size=64).eval()
    with torch.no_grad():
        assert encoders.features(encoder, tiny.images(2, 64))["cls"].isfinite().all()


@pytest.mark.parametrize("how", ["bicubic", "dino"])
@pytest.mark.parametrize("style", ["timm", "beit"])
def test_an_encoder_is_fitted_to_other_images_as_officially(how, style, tmp_path):
    encoder, size = encoders.create(tiny.spec(), style), 32
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "pos" in name:
                parameter.normal_()
    encoders.save(encoder, tmp_path, tiny.spec())
    state = encoder.state_dict()
    fits = encoders.load(tmp_path, positions=how, img_size=16).state_dict()
    assert all(torch.equal(fits[name], value) for name, value in state.items())
    loaded = encoders.load(tmp_path, positions=how, img_size=size).state_dict()
    tuned = encoders.classifier(tmp_path, 3, positions=how, img_size=size).state_dict()
    if style == "timm":
        excess = 0.1 if how == "dino" else None
        patches = positions.absolute(state["pos_embed"][:, 1:], 4, 8, excess)
        expected = torch.cat([state["pos_embed"][:, :1], patches], dim=1)
        assert torch.equal(loaded["pos_embed"], expected)
        assert torch.equal(tuned["pos_embed"], expected)
    else:
        name = "relative_position_bias_table"
        expected = positions.relative(state[f"rel_pos_bias.{name}"], 15**2 + 3)
        assert torch.equal(loaded[f"rel_pos_bias.{name}"], expected)
        assert torch.equal(tuned[f"blocks.1.attn.{name}"], expected)


def test_classifier_on_the_class_token_keeps_the_norm(encoder, images, tmp_path):
    encoders.save(encoder, tmp_path, tiny.spec())
    model = encoders.classifier(tmp_path, 7, pool="token").eval()
    expected = model.head(encoders.features(encoder, images)["cls"])
    assert torch.allclose(model(images), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["beitv2", "simmim"])
def test_absolute_positions_of_a_beit_start_as_published_and_are_not_decayed(name):
    """Cut at one deviation of 0.02, as all of BEiT's weights; timm cuts at 2."""
    torch.manual_seed(0)
    given = tiny.spec(image_size=64, embed_dim=64, args={"use_abs_pos_emb": True})
    plain, beit = (encoders.create(each, "beit") for each in (tiny.spec(), given))
    assert plain.pos_embed is None
    assert encoders.embeddings(plain) == {"cls_token"}
    expected = truncnorm(-1, 1, scale=0.02)
    for token in (beit.pos_embed, encoders.create(given, "beit").pos_embed):
        values = token.detach().flatten().numpy()
        assert len(values) == 257 * 64 and abs(values).max() <= 0.02
        assert kstest(values, expected.cdf).pvalue > 1e-3
        assert values.std() == pytest.approx(expected.std(), rel=0.05)
    method = tiny.method(name, given, rel_pos_rate=1.0, rel_pos_decay=True)
    decayed, undecayed = optim.groups(method, 0.05)
    of = {id(p): key for key, p in method.named_parameters()}
    undecayed = {of[id(p)] for p in undecayed["params"]}
    assert {"encoder.pos_embed", "encoder.cls_token"} <= undecayed
    decayed = {of[id(p)] for p in decayed["params"]}
    assert {"mask_token", "encoder.rel_pos_bias.relative_position_bias_table"} <= decayed


def test_classifier_of_a_beit_unshares_the_table(images, tmp_path):
    encoder = small("beit")
    encoders.save(encoder, tmp_path, tiny.spec())
    model = encoders.classifier(tmp_path, 7).eval()
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    shared = encoder.rel_pos_bias.relative_position_bias_table
    assert model.rel_pos_bias is None
    assert all(torch.equal(table, shared) for table in tables)
    with torch.no_grad():
        tables[0].add_(1)
    assert not torch.equal(tables[0], tables[1])
    with torch.no_grad():
        tables[0].sub_(1)
    tokens = encoders.masked(encoder, images, None, None, norm=False)["patch"]
    pooled = F.layer_norm(tokens.mean(1), (32,), eps=1e-6)
    assert torch.allclose(model(images), pooled @ model.head.weight.T, atol=1e-6)
    assert model(images).abs().max() < 1e-3
    assert not [key for key in model.state_dict() if "mask_token" in key or "aggregation" in key]


def test_unsharing_the_table_changes_no_bit(images, tmp_path):
    encoder = small("beit")
    encoders.save(encoder, tmp_path, tiny.spec())
    model = encoders.classifier(tmp_path, 3).eval()
    seen = encoders.masked(encoder, images, None, None, norm=False)
    # its last norm stands behind the pooling
    assert torch.equal(model.forward_features(images), seen["tokens"])
    assert encoder.rel_pos_bias.relative_position_bias_table.abs().max() > 0


def test_fine_tuning_model_of_beit_base_has_86_530_984_parameters(tmp_path, monkeypatch):
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    with torch.device("meta"):
        encoder = encoders.create(tiny.spec(224, **sizes), "beit")
        save_config_for_hf(encoder, tmp_path / "config.json")
        (tmp_path / "model.safetensors").touch()
        monkeypatch.setattr(encoders, "load_file", lambda path: dict(encoder.state_dict()))
        model = encoders.classifier(tmp_path, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_530_984


def test_what_is_no_encoder_is_refused(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrain"):
        encoders.load(tmp_path / "nothing")
    encoders.save(encoder, tmp_path, tiny.spec())
    state = load_file(tmp_path / "model.safetensors")
    del state["blocks.1.norm2.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="blocks.1.norm2.weight"):
        encoders.classifier(tmp_path, 3)
    with pytest.raises(ValueError, match="pool"):
        encoders.classifier(tmp_path, 3, pool="max")


# --- Swin ---------------------------------------------------------------------------------------


def swin_spec(version=1, size=32, **changes):
    """Grids of 16, 8 and 4: windows of 4, the last of which is the whole grid."""
    sizes = {"name": SWINS[version], "patch_size": 2, "embed_dim": 12, "window_size": 4}
    sizes |= {"depth": (1, 2, 1), "num_heads": (1, 2, 4)}
    return tiny.spec(size, "swin", **{**sizes, **changes})


def swin(version=1):
    torch.manual_seed(0)
    encoder = encoders.create(swin_spec(version)).eval()
    for parameter in encoder.parameters():  # V2 starts as the identity
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


@pytest.mark.parametrize(("size", "patch"), [(32, 2), (64, 4), (64, 2)])
def test_swin_gives_the_grid_of_the_spec(size, patch):
    spec = swin_spec(size=size, patch_size=patch)
    assert (spec.stride, spec.grid) == (4 * patch, size // (4 * patch))
    encoder = encoders.create(spec)
    found = encoders.features(encoder.eval(), torch.randn(2, 3, size, size))
    assert found["patch"].shape == (2, spec.grid**2, 48)
    assert encoder.num_features == 48
    assert torch.equal(found["cls"], found["patch"].mean(1))


def test_a_vit_has_one_stage():
    assert (tiny.spec().stride, tiny.spec().grid) == (4, 4)
    assert encoders.depths(small("timm")) == (2,)
    assert encoders.depths(swin()) == (1, 2, 1)


@pytest.mark.parametrize("version", [1, 2])
def test_a_swin_is_a_swin_whatever_the_method_would_choose(version):
    expected = (SwinTransformer, SwinTransformerV2)[version - 1]
    made = []
    for style in ("timm", "sincos", "beit"):
        torch.manual_seed(0)
        made.append(encoders.create(swin_spec(version), style, layer_scale=0.1).state_dict())
        assert isinstance(encoders.create(swin_spec(version), style, drop_path=0.1), expected)
    for other in made[1:]:
        assert all(torch.equal(made[0][key], value) for key, value in other.items())


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_swins_pieces_make_the_whole(version, tmp_path):
    encoder = swin(version)
    seen = encoders.masked(encoder, IMAGES, None, None, taps=(1, 2, 3, 4))
    assert torch.equal(seen["tokens"], encoder.forward_features(IMAGES).flatten(1, 2))
    tapped = seen["taps"]
    assert [tapped[n].shape[1:] for n in (1, 2, 3, 4)] == [(256, 12), (64, 24), (64, 24), (16, 48)]
    _, stages = encoder.forward_intermediates(IMAGES)
    for tap, stage in ((1, 0), (3, 1), (4, 2)):
        assert torch.equal(tapped[tap], stages[stage].flatten(2).transpose(1, 2))
    encoders.save(encoder, tmp_path, swin_spec(version))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded.forward_features(IMAGES), encoder.forward_features(IMAGES))
    mask = torch.zeros(3, 16, 16, dtype=torch.bool)
    mask[:, :4, 4:8] = True  # one window of the first stage
    hidden = encoders.masked(encoder, IMAGES, mask.flatten(1), torch.zeros(1, 1, 12), taps=(1,))
    changed = (hidden["taps"][1] != tapped[1]).any(-1).view(3, 16, 16)
    assert torch.equal(changed, mask)  # on the grid of the first stage


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_classifier_of_a_swin(version, tmp_path):
    encoder = swin(version)
    encoders.save(encoder, tmp_path, swin_spec(version))
    model = encoders.classifier(tmp_path, 50, drop_path=0.3).eval()
    state, new = encoder.state_dict(), model.state_dict()
    assert set(new) - set(state) == {"head.fc.weight", "head.fc.bias"}
    assert all(torch.equal(value, new[key]) for key, value in state.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.fc.bias.abs().max() == 0
    pooled = encoders.features(encoder, IMAGES)["patch"].mean(1)  # after the pretrained norm
    assert torch.allclose(model(IMAGES), pooled @ model.head.fc.weight.T, atol=1e-6)
    blocks = [block for stage in model.layers for block in stage.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    larger = encoders.classifier(tmp_path, 50, img_size=48, window_size=6)
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 50)


@pytest.mark.parametrize(
    ("window", "old", "new", "expected"),
    [(6, 192, 224, 7), (7, 224, 128, 4), (7, 224, 384, 12), (4, 32, 36, 4), (4, 32, 4, 4)],
)
def test_windows_of_a_swin_follow_the_images(window, old, new, expected):
    """As published, SimMIM's 192 to 224 and FastMIM's 128 and 224; else they stay."""
    spec = swin_spec(size=old, window_size=window)
    assert spec.at(new).model.window_size == expected
    assert spec.at(None) == spec
    assert tiny.spec(64).at(32).model == tiny.spec(64).model  # a ViT has none


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("how", ["timm", "bicubic"])
@torch.no_grad()
def test_a_swin_is_loaded_with_windows_that_fit(version, how, tmp_path):
    encoder = swin(version)
    encoders.save(encoder, tmp_path, swin_spec(version))
    larger = encoders.load(tmp_path, how, img_size=48).eval()
    found = [block.window_size for stage in larger.layers for block in stage.blocks]
    assert found == [(6, 6)] * 4  # grids of 24, 12 and 6
    seen = encoders.masked(larger, torch.randn(2, 3, 48, 48), None, None)["patch"]
    assert seen.shape == (2, 36, 48) and seen.isfinite().all()
    old, new = encoder.layers[0].blocks[0].attn, larger.layers[0].blocks[0].attn
    if version == 1:
        table = old.relative_position_bias_table
        resized = new.relative_position_bias_table
        assert table.shape == (49, 1) and resized.shape == (121, 1)
        assert torch.equal(resized[60], table[24]), "a patch and itself"
        if how == "bicubic":
            assert torch.equal(resized, positions.relative(table, 121))
    else:  # two patches at the same distance mean the same to the network
        inner = new.relative_coords_table[0, 2:-2, 2:-2]
        assert torch.allclose(inner, old.relative_coords_table[0])
        weights = (encoders.load(tmp_path, img_size=32).state_dict(), encoder.state_dict())
        assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())


def test_a_swin_with_a_missing_part_is_refused(tmp_path):
    encoders.save(swin(), tmp_path, swin_spec())
    state = load_file(tmp_path / "model.safetensors")
    for name in ("norm.weight", "layers.1.downsample.reduction.weight"):
        left = {key: value for key, value in state.items() if key != name}
        save_file(left, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=name):
            encoders.classifier(tmp_path, 3)


def two_stages(**changes):
    sizes = {"patch_size": 2, "embed_dim": 8, "depth": (1, 1), "num_heads": (1, 2)}
    return swin_spec(**({"size": 16, "window_size": 4} | sizes | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": SWINS[2]},
        {"window_size": 9},
        {"depth": (1, 1, 1), "num_heads": (1, 1, 1)},
    ],
)
def test_a_swin_whose_config_is_accepted_can_be_built(changes):
    spec = two_stages(**changes)
    spec.model.check(16)
    found = encoders.features(encoders.create(spec), torch.randn(1, 3, 16, 16))
    assert found["patch"].shape[1] == spec.grid**2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"window_size": 3},
            "^window_size: found 3, expected a divisor of the 8 tokens per side in stage 1",
        ),
        ({"window_size": 0}, "^window_size: found 0, expected 1 or more"),
        ({"depth": (1, 0)}, r"^depth: found \(1, 0\), expected 1 or more"),
        ({"depth": (), "num_heads": ()}, "^depth: found no stages, expected one or more"),
        ({"depth": (1, 1, 1)}, "^num_heads: found 2 stages, expected 3 as in depth"),
        ({"num_heads": (1, 3)}, "^embed_dim: found 8, .*stage 2 16 wide, expected .* 3 heads"),
        ({"patch_size": 16}, "^patch_size: found 16, .* tokens of 32 pixels, .* image_size 16"),
        ({"name": "vit_tiny_patch16_224"}, "^model"),
        ({"name": "swin_tiny_patch4_window7_223"}, f"^model.name: .*{SWINS[1]}"),
        ({"args": {"bogus": 1}}, "^model: .*bogus"),
        ({"size": 18}, "^patch_size"),
    ],
)
def test_a_swin_that_cannot_be_is_named_before_anything_runs(changes, match):
    with pytest.raises(ValueError, match=match):
        encoders.create(two_stages(**changes))


SWIN_PARAMS = {
    "name": SWINS[1],
    "patch_size": 2,
    "embed_dim": 8,
    "depth": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}


def swin_params(**changes):
    """Params for images of 16 pixels and the methods that take a Swin."""
    content = tiny_content(methods={"simmim": {}})
    content |= {"model": SWIN_PARAMS | changes, "targets": {}}
    content["grid"]["runs"] = {
        name: {"method": name} for name in ("simmim", "random", "supervised")
    }
    return content


def test_a_swin_of_params_is_one():
    model = check(swin_params()).models["main"]
    assert (model.kind, model.settings.config["depth"]) == ("swin", (1, 1))


@pytest.mark.parametrize(("size", "fits"), [(8, True), (12, True), (10, False)])
def test_windows_are_checked_at_the_size_of_the_crops(size, fits):
    """In images of 16 pixels windows of 4 of 8 tokens: of 8 pixels 2 of 4, of 12 pixels 3 of 6."""
    content = swin_params()
    content["methods"] = {"fastmim": {"input_size": size, "predict": "pixels"}}
    content["grid"]["runs"] = {"fastmim": {"method": "fastmim"}}
    if fits:
        check(content)
    else:
        with pytest.raises(ParamsError, match="input_size: found 10"):
            check(content)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_size": 3}, ["model.window_size: found 3, expected a divisor of the 8 tokens"]),
        ({"depth": 2}, ["model.depth", "a list", "found 2"]),
        ({"num_heads": 2}, ["model.num_heads", "a list"]),
        ({"depth": [1, 0]}, ["model.depth", "1 or more", "(1, 0)"]),
        ({"depth": []}, ["model.depth: found no stages"]),
        ({"depth": [1, 1, 1]}, ["model.num_heads", "2 stages", "3"]),
        ({"num_heads": [1, 3]}, ["model.embed_dim", "stage 2 16 wide", "3 heads"]),
        ({"patch_size": 16}, ["model.patch_size", "16", "32 pixels"]),
        (
            {"name": "vit_tiny_patch16_224"},
            ["model.depth", "integer", "model.window_size: unknown"],
        ),
        ({"name": "swin_tiny_patch4_window7_223"}, ["model.name", SWINS[1]]),
    ],
)
def test_params_name_a_swin_that_cannot_be(changes, words):
    with pytest.raises(ParamsError) as caught:
        check(swin_params(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_plug_ins_that_take_no_swin_say_so():
    content = tiny_content()
    content["model"] = SWIN_PARAMS
    with pytest.raises(ParamsError) as caught:
        check(content)
    for word in ("method mae needs", "method beitv2 needs", "target dino needs", "target vqkd"):
        assert word in str(caught.value)
    assert "kind swin can 'mask', 'sizes' and 'taps'; expected kind convvit or vit" in str(
        caught.value
    )
    assert "random" not in str(caught.value)


# --- positions and patches ----------------------------------------------------------------------


def test_sincos_golden_rows():
    table = sincos_2d(32, (3, 5))
    assert table.shape == (15, 32)
    assert table.dtype == torch.float32
    assert table[0].tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 8 + [1.0] * 8
    assert torch.equal(table[1, 16:], table[0, 16:])  # patch (0,1): only the first half differs
    assert not torch.equal(table[1, :16], table[0, :16])
    assert torch.equal(table[5, :16], table[0, :16])  # patch (1,0): only the last half
    assert not torch.equal(table[5, 16:], table[0, 16:])
    for place, row, column in ((7, 1, 2), (14, 2, 4)):
        for k in range(8):
            w = 10000 ** (-k / 8)
            expected = [
                math.sin(column * w),
                math.cos(column * w),
                math.sin(row * w),
                math.cos(row * w),
            ]
            found = table[place, [k, 8 + k, 16 + k, 24 + k]]
            assert torch.allclose(found, torch.tensor(expected), atol=1e-7)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(30, 4)


def test_patchify_order_and_inverse():
    x = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).view(2, 3, 8, 12)
    p = patches.patchify(x, 4)
    assert p.shape == (2, 6, 48)
    for b, row, column, y, xx, channel in (
        (0, 0, 0, 0, 1, 2),
        (1, 1, 2, 3, 0, 1),
        (0, 1, 0, 2, 3, 0),
    ):
        value = x[b, channel, row * 4 + y, column * 4 + xx]
        assert p[b, row * 3 + column, (y * 4 + xx) * 3 + channel] == value
    assert torch.equal(patches.unpatchify(p, 4, (2, 3)), x)
    square = torch.randn(2, 3, 8, 8)
    assert torch.equal(patches.unpatchify(patches.patchify(square, 2), 2), square)
    with pytest.raises(ValueError, match="divide"):
        patches.patchify(x, 5)
    with pytest.raises(ValueError, match="grid"):
        patches.unpatchify(p, 4)


def test_normalised_patches():
    p = torch.randn(2, 5, 48, dtype=torch.float64) * 3 + 7
    n = patches.normalise_patches(p)
    assert n.mean(-1).abs().max() < 1e-12
    assert (n.std(-1, unbiased=True) - 1).abs().max() < 1e-6
    flat = torch.full((1, 1, 48), 0.25)
    assert (patches.normalise_patches(flat) == 0).all()  # eps inside the root keeps it finite
    for scale in (1.0, 3e-4):  # the second makes eps count
        value = np.asarray(p[1, 3]) * scale
        expected = (value - value.mean()) / math.sqrt(value.var(ddof=1) + 1e-6)
        assert np.allclose(patches.normalise_patches(p * scale)[1, 3], expected, atol=1e-10)


def test_paint_and_contact_sheet():
    x = torch.zeros(2, 3, 8, 8)
    mask = torch.zeros(2, 4)
    mask[0, 1] = 1
    painted = pictures.paint(x, mask, 1.0)
    assert painted[0, :, :4, 4:].min() == 1
    assert painted.sum() == 3 * 16
    sheet = pictures.contact_sheet([x, painted], side=16, gap=2)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * 18 - 2, 2 * 18 - 2, 3)
    assert sheet[0, 18 + 8].tolist() == [255] * 3
    assert sheet[0, 0].tolist() == [0] * 3
