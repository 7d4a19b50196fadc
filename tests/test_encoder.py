"""Encoders: the forward pass in pieces, export as a timm folder, fine-tuning; positions and
patches.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import timm
import torch
from timm.models._hub import save_config_for_hf

from stages.kit.nets import encoders, patches
from stages.kit.nets.positions import sincos_2d
from stages.kit.spec import Spec
from tests.conftest import tiny_content
from workflow.params import ParamsError, check

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def spec(size=16, patch=4, width=16, depth=2, heads=2, name="vit_tiny_patch16_224", **args):
    model = {
        "name": name,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": 4.0,
        "args": args,
    }
    return Spec(image_size=size, model=model, mean=MEAN, std=STD, num_classes=5, images=100)


def build(family):
    torch.manual_seed(0)
    if family == "vit":
        return encoders.sincos_vit(spec()).eval()
    encoder = encoders.create(spec(), "beit").eval()
    torch.nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
    return encoder


@pytest.fixture(params=["vit", "beit"])
def encoder(request):
    return build(request.param)


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_export_is_bit_equal_without_extra_arguments(encoder, images, tmp_path):
    encoders.save(encoder, tmp_path, spec())
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded.forward_features(images), encoder.forward_features(images))
    assert tuple(loaded.pretrained_cfg["mean"]) == MEAN
    assert tuple(loaded.pretrained_cfg["std"]) == STD
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 16, 16)
    assert loaded.pretrained_cfg["tag"] == "mimlab"  # not the provenance of timm's own weights
    assert loaded.num_classes == 0
    ours = encoders.load(tmp_path).eval()
    assert torch.equal(
        encoders.features(ours, images)["patch"], encoders.features(encoder, images)["patch"]
    )


def test_export_has_reproducible_bytes(encoder, tmp_path):
    for name in ("a", "b"):
        encoders.save(encoder, tmp_path / name, spec())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_training_settings_are_not_exported(tmp_path):
    encoders.save(encoders.create(spec(), "vit", drop_path_rate=0.3), tmp_path, spec())
    assert "drop_path_rate" not in json.loads((tmp_path / "config.json").read_text())["model_args"]


def test_pieces_make_the_whole(encoder, images):
    tokens = encoders.with_prefix(encoder, encoders.patch_tokens(encoder, images))
    out, tapped = encoders.run_blocks(encoder, tokens, taps=(1, 2))
    features = encoders.features(encoder, images)
    whole = torch.cat([features["cls"][:, None], features["patch"]], dim=1)
    assert torch.allclose(encoder.norm(out), whole, atol=1e-5)
    assert torch.allclose(whole, encoder.forward_features(images))
    assert torch.equal(tapped[2], out)
    assert set(tapped) == {1, 2}
    with pytest.raises(ValueError, match="taps"):
        encoders.run_blocks(encoder, tokens, taps=(3,))


def test_running_a_permutation_of_all_patches_permutes_the_result(encoder, images):
    """Positions, absolute or relative, travel with the patches."""
    ids = torch.stack(
        [torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    )
    tokens = encoders.patch_tokens(encoder, images)
    full, _ = encoders.run_blocks(encoder, encoders.with_prefix(encoder, tokens))
    shuffled = tokens.gather(1, ids[..., None].expand(-1, -1, 16))
    part, _ = encoders.run_blocks(encoder, encoders.with_prefix(encoder, shuffled), ids=ids)
    assert torch.allclose(
        part[:, 1:], full[:, 1:].gather(1, ids[..., None].expand(-1, -1, 16)), atol=1e-5
    )
    assert torch.allclose(part[:, 0], full[:, 0], atol=1e-5)


def test_subset_has_its_rows_of_the_bias():
    encoder = build("beit")
    full = encoders.shared_bias(encoder)[0]
    ids = torch.tensor([[3, 0, 9], [5, 14, 1]])
    part = encoders.shared_bias(encoder, ids)
    for b in range(2):
        places = [0, *(ids[b] + 1).tolist()]
        assert torch.equal(part[b], full[:, places][:, :, places])


def test_relative_position_index():
    """(2H-1)(2W-1)+3 rows: patch i to j at (yi-yj+H-1)(2W-1) + xi-xj+W-1, three for the class
    token.
    """
    encoder = build("beit")
    side, table = 4, encoder.rel_pos_bias.relative_position_bias_table
    assert table.shape == (7 * 7 + 3, 2)
    bias = encoders.shared_bias(encoder)[0]
    for i in range(16):
        for j in range(16):
            row = (
                (i // side - j // side + side - 1) * (2 * side - 1) + i % side - j % side + side - 1
            )
            assert torch.equal(bias[:, 1 + i, 1 + j], table[row])
    assert torch.equal(bias[:, 0, 5], table[-3])  # query cls
    assert torch.equal(bias[:, 5, 0], table[-2])  # key cls
    assert torch.equal(bias[:, 0, 0], table[-1])


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
    bias = (
        block.attn.qkv.bias
        if block.attn.qkv.bias is not None
        else torch.cat([block.attn.q_bias, block.attn.k_bias, block.attn.v_bias])
    )
    value = (x @ block.attn.qkv.weight.T + bias)[..., 32:].view(3, 17, 2, 8).transpose(1, 2)
    out = block.attn.proj((maps @ value).transpose(1, 2).reshape(3, 17, 16))
    assert torch.allclose(out, expected, atol=1e-5)


def test_registers_and_missing_class_token(images):
    registers = encoders.sincos_vit(spec(reg_tokens=2)).eval()
    assert registers.pos_embed[0, :3].abs().max() == 0
    assert torch.equal(registers.pos_embed[0, 3:], sincos_2d(16, 4))
    tokens = encoders.with_prefix(registers, encoders.patch_tokens(registers, images))
    assert tokens.shape == (3, 19, 16)
    out, _ = encoders.run_blocks(registers, tokens)
    assert torch.allclose(registers.norm(out), registers.forward_features(images), atol=1e-6)
    bare = encoders.sincos_vit(spec(class_token=False, global_pool="avg", fc_norm=False)).eval()
    features = encoders.features(bare, images)
    assert torch.equal(features["cls"], features["patch"].mean(1))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"size": 18}, "model.patch_size"),
        ({"name": "resnet18"}, "model"),
        ({"name": "vit_tiny_patch16_223"}, "vit_tiny_patch16_224"),
        ({"bogus": 1}, "bogus"),
        ({"heads": 3}, "model"),
        ({"width": 18}, "multiple of 4"),
        ({"pos_embed": "none"}, "pos_embed"),
    ],
)
def test_errors_name_the_key(changes, match):
    with pytest.raises(ValueError, match=match):
        encoders.sincos_vit(spec(**changes))


# --- fine-tuning
# ------------------------------------------------------------------------------------------


def test_classifier_of_a_vit(images, tmp_path):
    encoder = build("vit")
    encoders.save(encoder, tmp_path, spec())
    torch.manual_seed(0)
    model = encoders.classifier(tmp_path, 7, drop_path=0.1).eval()
    state, new = encoder.state_dict(), model.state_dict()
    assert set(new) - set(state) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert set(state) - set(new) == {"norm.weight", "norm.bias"}
    assert all(torch.equal(state[key], new[key]) for key in set(state) & set(new))
    assert not encoder.pos_embed.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.pos_embed[0, 1:], sincos_2d(16, 4))
    assert [round(getattr(block.drop_path1, "drop_prob", 0.0), 6) for block in model.blocks] == [
        0.0,
        0.1,
    ]
    assert 0 < model.head.weight.abs().max() < 5 * 2e-5
    assert model.head.bias.abs().max() == 0
    # mean of the patches -> new norm -> head, without the old norm and without cls
    tokens, _ = encoders.run_blocks(
        encoder, encoders.with_prefix(encoder, encoders.patch_tokens(encoder, images))
    )
    pooled = torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), (16,), eps=1e-6)
    assert torch.allclose(model(images), pooled @ model.head.weight.T, atol=1e-7)


def test_classifier_on_the_class_token_keeps_the_norm(encoder, images, tmp_path):
    encoders.save(encoder, tmp_path, spec())
    model = encoders.classifier(tmp_path, 7, pool="token").eval()
    expected = model.head(encoders.features(encoder, images)["cls"])
    assert torch.allclose(model(images), expected, atol=1e-6)


def test_classifier_of_a_beit_unshares_the_table(images, tmp_path):
    encoder = build("beit")
    encoders.save(encoder, tmp_path, spec())
    model = encoders.classifier(tmp_path, 7).eval()
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    assert model.rel_pos_bias is None
    assert all(
        torch.equal(table, encoder.rel_pos_bias.relative_position_bias_table) for table in tables
    )
    with torch.no_grad():
        tables[0].add_(1)
    assert not torch.equal(tables[0], tables[1])
    with torch.no_grad():
        tables[0].sub_(1)
    tokens, _ = encoders.run_blocks(
        encoder, encoders.with_prefix(encoder, encoders.patch_tokens(encoder, images))
    )
    pooled = torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), (16,), eps=1e-6)
    assert torch.allclose(model(images), pooled @ model.head.weight.T, atol=1e-6)
    assert model(images).abs().max() < 1e-3
    assert not [key for key in model.state_dict() if "mask_token" in key or "aggregation" in key]


def test_classifier_at_another_size(encoder, tmp_path):
    encoders.save(encoder, tmp_path, spec())
    assert encoders.classifier(tmp_path, 7, img_size=24)(torch.randn(2, 3, 24, 24)).shape == (2, 7)


def test_fine_tuning_model_of_beit_base_has_86_530_984_parameters(tmp_path, monkeypatch):
    with torch.device("meta"):
        encoder = encoders.create(spec(224, 16, 768, 12, 12, name="vit_base_patch16_224"), "beit")
        save_config_for_hf(encoder, tmp_path / "config.json")
        (tmp_path / "model.safetensors").touch()
        monkeypatch.setattr(encoders, "load_file", lambda path: dict(encoder.state_dict()))
        model = encoders.classifier(tmp_path, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_530_984


def test_what_is_no_encoder_is_refused(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrain"):
        encoders.load(tmp_path / "nothing")
    encoders.save(encoder, tmp_path, spec())
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    del state["blocks.1.norm2.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="blocks.1.norm2.weight"):
        encoders.classifier(tmp_path, 3)
    with pytest.raises(ValueError, match="pool"):
        encoders.classifier(tmp_path, 3, pool="max")


# --- Swin
# -------------------------------------------------------------------------------------------------

SWINS = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}


def swin_spec(
    version=1, size=32, patch=2, width=12, depth=(1, 2, 1), heads=(1, 2, 4), window=4, **args
):
    """Grids of 16, 8 and 4: windows of 4, the last of which is the whole grid."""
    model = {
        "name": SWINS[version],
        "patch_size": patch,
        "embed_dim": width,
        "depth": list(depth),
        "num_heads": list(heads),
        "window_size": window,
        "mlp_ratio": 2.0,
        "args": args,
    }
    return Spec(image_size=size, model=model, mean=MEAN, std=STD, num_classes=5, images=100)


def swin(version=1, **kw):
    torch.manual_seed(0)
    encoder = encoders.create(swin_spec(version, **kw)).eval()
    for parameter in encoder.parameters():  # V2 starts as the identity
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


@pytest.fixture
def pictures():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "patch"), [(32, 2), (64, 4), (64, 2)])
def test_swin_gives_the_grid_of_the_spec(size, patch):
    spec = swin_spec(size=size, patch=patch)
    assert spec.hierarchical and spec.stride == 4 * patch and spec.grid == size // (4 * patch)
    encoder = encoders.create(spec)
    found = encoders.features(encoder.eval(), torch.randn(2, 3, size, size))
    assert found["patch"].shape == (2, spec.grid**2, 48)
    assert encoder.num_features == 48
    assert torch.equal(found["cls"], found["patch"].mean(1))
    assert not [
        module for module in encoder.modules() if getattr(module, "drop_prob", 0)
    ]  # timm's own is 0.1


def test_a_vit_has_one_stage():
    assert not spec().hierarchical and (spec().stride, spec().grid) == (4, 4)
    assert encoders.depths(build("vit")) == (2,)
    assert encoders.depths(swin()) == (1, 2, 1)


@pytest.mark.parametrize("version", [1, 2])
def test_a_swin_is_a_swin_whatever_the_method_would_choose(version):
    assert isinstance(
        encoders.create(swin_spec(version), "beit", drop_path_rate=0.1), encoders.SWIN[version - 1]
    )
    with pytest.raises(ValueError, match="expected a ViT"):
        encoders.sincos_vit(swin_spec(version))


@pytest.mark.parametrize("version", [1, 2])
def test_swins_export_is_bit_equal(version, pictures, tmp_path):
    encoder = swin(version)
    encoders.save(encoder, tmp_path, swin_spec(version))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded.forward_features(pictures), encoder.forward_features(pictures))
    assert loaded.num_classes == 0
    assert tuple(loaded.pretrained_cfg["mean"]) == MEAN
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 32, 32)
    ours = encoders.load(tmp_path).eval()
    assert torch.equal(
        encoders.features(ours, pictures)["patch"], encoders.features(encoder, pictures)["patch"]
    )


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_swins_pieces_make_the_whole(version, pictures):
    encoder = swin(version)
    tokens = encoders.patch_tokens(encoder, pictures)
    assert tokens.shape == (3, 256, 12)
    assert encoders.with_prefix(encoder, tokens) is tokens
    out, tapped = encoders.run_blocks(encoder, tokens, taps=(1, 2, 3, 4))
    assert torch.equal(encoder.norm(out), encoder.forward_features(pictures).flatten(1, 2))
    assert [tapped[n].shape[1:] for n in (1, 2, 3, 4)] == [(256, 12), (64, 24), (64, 24), (16, 48)]
    _, stages = encoder.forward_intermediates(pictures)
    for tap, stage in ((1, 0), (3, 1), (4, 2)):
        assert torch.equal(tapped[tap], stages[stage].flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match=r"1\.\.4"):
        encoders.run_blocks(encoder, tokens, taps=(5,))
    with pytest.raises(ValueError, match="some of the patches"):
        encoders.run_blocks(encoder, tokens, ids=torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="attention"):
        encoders.attention(encoder, pictures)


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_classifier_of_a_swin(version, pictures, tmp_path):
    encoder = swin(version)
    encoders.save(encoder, tmp_path, swin_spec(version))
    model = encoders.classifier(tmp_path, 50, drop_path=0.3).eval()
    state, new = encoder.state_dict(), model.state_dict()
    assert set(new) - set(state) == {"head.fc.weight", "head.fc.bias"}
    assert all(torch.equal(value, new[key]) for key, value in state.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.fc.bias.abs().max() == 0
    pooled = encoders.features(encoder, pictures)["patch"].mean(1)  # after the pretrained norm
    assert torch.allclose(model(pictures), pooled @ model.head.fc.weight.T, atol=1e-6)
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert [round(getattr(block.drop_path1, "drop_prob", 0.0), 6) for block in blocks] == [
        0.0,
        0.1,
        0.2,
        0.3,
    ]
    larger = encoders.classifier(tmp_path, 50, img_size=48, window_size=6)
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 50)
    with pytest.raises(ValueError, match="class token"):
        encoders.classifier(tmp_path, 50, pool="token")


def test_a_swin_with_a_missing_part_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    encoders.save(swin(), tmp_path, swin_spec())
    state = load_file(tmp_path / "model.safetensors")
    for name in ("norm.weight", "layers.1.downsample.reduction.weight"):
        save_file(
            {key: value for key, value in state.items() if key != name},
            tmp_path / "model.safetensors",
        )
        with pytest.raises(RuntimeError, match=name):
            encoders.classifier(tmp_path, 3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"size": 36}, "model.patch_size"),
        ({"heads": (1, 2)}, "model"),
        ({"bogus": 1}, "bogus"),
    ],
)
def test_errors_about_a_swin_name_the_key(changes, match):
    with pytest.raises(ValueError, match=match):
        encoders.create(swin_spec(**changes))


def test_a_list_of_depths_needs_a_swin():
    with pytest.raises(ValueError, match=r"model\.(name|:)|model: timm cannot build"):
        encoders.create(spec(depth=[1, 1]))


PARAMS = {
    "name": SWINS[1],
    "patch_size": 2,
    "embed_dim": 8,
    "depth": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}


def swin_params(**changes):
    """Params for images of 16 pixels and the methods that take a Swin; a change to None leaves a
    key of model out.
    """
    content = tiny_content(methods={"simmim": {}})
    content["model"] = {
        key: value for key, value in (PARAMS | changes).items() if value is not None
    }
    content["targets"] = {}
    content["grid"]["runs"] = {
        name: {"method": name} for name in ("simmim", "random", "supervised")
    }
    return content


@pytest.mark.parametrize(
    "changes",
    [{}, {"name": SWINS[2]}, {"window_size": 9}, {"depth": [1, 1, 1], "num_heads": [1] * 3}],
)
def test_a_swin_that_params_accepts_can_be_built(changes):
    model = check(swin_params(**changes)).params.model.model_dump()
    spec = Spec(image_size=16, model=model, mean=MEAN, std=STD, num_classes=5, images=100)
    assert (
        encoders.features(encoders.create(spec), torch.randn(1, 3, 16, 16))["patch"].shape[1]
        == spec.grid**2
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"window_size": 3},
            ["model.window_size", "3 does not divide the 8 tokens per side in stage 1"],
        ),
        ({"window_size": None}, ["model.window_size", "required"]),
        ({"depth": 2}, ["model.depth", "a list", "found 2"]),
        ({"num_heads": 2}, ["model.num_heads", "a list"]),
        ({"depth": [1, 0]}, ["model.depth", "greater than or equal to 1", "[1, 0]"]),
        ({"depth": []}, ["model.depth", "greater than or equal to 1"]),
        ({"depth": [1, 1, 1]}, ["model.num_heads", "2 stages", "3"]),
        ({"num_heads": [1, 3]}, ["model.embed_dim", "16", "num_heads 3 in stage 2"]),
        ({"patch_size": 16}, ["data.image_size", "16", "32"]),
        (
            {"name": "vit_tiny_patch16_224"},
            ["model.depth", "one number", "model.window_size", "no windows"],
        ),
        ({"name": "swin_tiny_patch4_window7_223"}, ["model.name", SWINS[1]]),
    ],
)
def test_a_swin_that_cannot_be_is_named_before_anything_runs(changes, words):
    with pytest.raises(ParamsError) as caught:
        check(swin_params(**changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_plug_ins_that_take_no_swin_say_so():
    content = tiny_content()
    content["model"] = PARAMS
    with pytest.raises(ParamsError) as caught:
        check(content)
    for word in (
        "method mae takes no swin, only vit",
        "method beitv2",
        "target dino",
        "target vqkd",
    ):
        assert word in str(caught.value)
    assert "random" not in str(caught.value)


# --- positions and patches
# --------------------------------------------------------------------------------


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
    painted = patches.paint(x, mask, 1.0)
    assert painted[0, :, :4, 4:].min() == 1
    assert painted.sum() == 3 * 16
    sheet = patches.contact_sheet([x, painted], side=16, gap=2)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * 18 - 2, 2 * 18 - 2, 3)
    assert sheet[0, 18 + 8].tolist() == [255] * 3
    assert sheet[0, 0].tolist() == [0] * 3
