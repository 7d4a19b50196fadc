"""Encoders: the forward pass in pieces, export as a timm folder, fine-tuning; positions and patches."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import timm
import torch
from timm.models._hub import save_config_for_hf

from stages.kit import encoder as kit
from stages.kit import patches
from stages.kit.positions import sincos_2d
from stages.kit.spec import Spec

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def spec(size=16, patch=4, width=16, depth=2, heads=2, name="vit_tiny_patch16_224", **args):
    model = {"name": name, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads,
             "mlp_ratio": 4.0, "args": args}
    return Spec(image_size=size, model=model, mean=MEAN, std=STD, num_classes=5, images=100)


def build(family):
    torch.manual_seed(0)
    if family == "vit":
        return kit.sincos_vit(spec()).eval()
    encoder = kit.create(spec(), "beit").eval()
    torch.nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
    return encoder


@pytest.fixture(params=["vit", "beit"])
def encoder(request):
    return build(request.param)


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_export_is_bit_equal_without_extra_arguments(encoder, images, tmp_path):
    kit.save(encoder, tmp_path, spec())
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded.forward_features(images), encoder.forward_features(images))
    assert tuple(loaded.pretrained_cfg["mean"]) == MEAN
    assert tuple(loaded.pretrained_cfg["std"]) == STD
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 16, 16)
    assert loaded.pretrained_cfg["tag"] == "mimlab"  # not the provenance of timm's own weights
    assert loaded.num_classes == 0
    ours = kit.load(tmp_path).eval()
    assert torch.equal(kit.features(ours, images)["patch"], kit.features(encoder, images)["patch"])


def test_export_has_reproducible_bytes(encoder, tmp_path):
    for name in ("a", "b"):
        kit.save(encoder, tmp_path / name, spec())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_training_settings_are_not_exported(tmp_path):
    kit.save(kit.create(spec(), "vit", drop_path_rate=0.3), tmp_path, spec())
    assert "drop_path_rate" not in json.loads((tmp_path / "config.json").read_text())["model_args"]


def test_pieces_make_the_whole(encoder, images):
    tokens = kit.with_prefix(encoder, kit.patch_tokens(encoder, images))
    out, tapped = kit.run_blocks(encoder, tokens, taps=(1, 2))
    features = kit.features(encoder, images)
    whole = torch.cat([features["cls"][:, None], features["patch"]], dim=1)
    assert torch.allclose(encoder.norm(out), whole, atol=1e-5)
    assert torch.allclose(whole, encoder.forward_features(images))
    assert torch.equal(tapped[2], out)
    assert set(tapped) == {1, 2}
    with pytest.raises(ValueError, match="taps"):
        kit.run_blocks(encoder, tokens, taps=(3,))


def test_running_a_permutation_of_all_patches_permutes_the_result(encoder, images):
    """Positions, absolute or relative, travel with the patches."""
    ids = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    tokens = kit.patch_tokens(encoder, images)
    full, _ = kit.run_blocks(encoder, kit.with_prefix(encoder, tokens))
    shuffled = tokens.gather(1, ids[..., None].expand(-1, -1, 16))
    part, _ = kit.run_blocks(encoder, kit.with_prefix(encoder, shuffled), ids=ids)
    assert torch.allclose(part[:, 1:], full[:, 1:].gather(1, ids[..., None].expand(-1, -1, 16)), atol=1e-5)
    assert torch.allclose(part[:, 0], full[:, 0], atol=1e-5)


def test_subset_has_its_rows_of_the_bias():
    encoder = build("beit")
    full = kit.shared_bias(encoder)[0]
    ids = torch.tensor([[3, 0, 9], [5, 14, 1]])
    part = kit.shared_bias(encoder, ids)
    for b in range(2):
        places = [0, *(ids[b] + 1).tolist()]
        assert torch.equal(part[b], full[:, places][:, :, places])


def test_relative_position_index():
    """(2H-1)(2W-1)+3 rows: patch i to j at (yi-yj+H-1)(2W-1) + xi-xj+W-1, three for the class token."""
    encoder = build("beit")
    side, table = 4, encoder.rel_pos_bias.relative_position_bias_table
    assert table.shape == (7 * 7 + 3, 2)
    bias = kit.shared_bias(encoder)[0]
    for i in range(16):
        for j in range(16):
            row = (i // side - j // side + side - 1) * (2 * side - 1) + i % side - j % side + side - 1
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
    maps = kit.attention(encoder, images)
    assert maps.shape == (3, 2, 17, 17)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 2, 17))
    bias = block.attn.qkv.bias if block.attn.qkv.bias is not None \
        else torch.cat([block.attn.q_bias, block.attn.k_bias, block.attn.v_bias])
    value = (x @ block.attn.qkv.weight.T + bias)[..., 32:].view(3, 17, 2, 8).transpose(1, 2)
    out = block.attn.proj((maps @ value).transpose(1, 2).reshape(3, 17, 16))
    assert torch.allclose(out, expected, atol=1e-5)


def test_registers_and_missing_class_token(images):
    registers = kit.sincos_vit(spec(reg_tokens=2)).eval()
    assert registers.pos_embed[0, :3].abs().max() == 0
    assert torch.equal(registers.pos_embed[0, 3:], sincos_2d(16, 4))
    tokens = kit.with_prefix(registers, kit.patch_tokens(registers, images))
    assert tokens.shape == (3, 19, 16)
    out, _ = kit.run_blocks(registers, tokens)
    assert torch.allclose(registers.norm(out), registers.forward_features(images), atol=1e-6)
    bare = kit.sincos_vit(spec(class_token=False, global_pool="avg", fc_norm=False)).eval()
    features = kit.features(bare, images)
    assert torch.equal(features["cls"], features["patch"].mean(1))


@pytest.mark.parametrize(("changes", "match"), [
    ({"size": 18}, "model.patch_size"), ({"name": "resnet18"}, "model"),
    ({"name": "vit_tiny_patch16_223"}, "vit_tiny_patch16_224"), ({"bogus": 1}, "bogus"),
    ({"heads": 3}, "model"), ({"width": 18}, "multiple of 4"), ({"pos_embed": "none"}, "pos_embed"),
])
def test_errors_name_the_key(changes, match):
    with pytest.raises(ValueError, match=match):
        kit.sincos_vit(spec(**changes))


# --- fine-tuning ------------------------------------------------------------------------------------------

def test_classifier_of_a_vit(images, tmp_path):
    encoder = build("vit")
    kit.save(encoder, tmp_path, spec())
    torch.manual_seed(0)
    model = kit.classifier(tmp_path, 7, drop_path=0.1).eval()
    state, new = encoder.state_dict(), model.state_dict()
    assert set(new) - set(state) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert set(state) - set(new) == {"norm.weight", "norm.bias"}
    assert all(torch.equal(state[key], new[key]) for key in set(state) & set(new))
    assert not encoder.pos_embed.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.pos_embed[0, 1:], sincos_2d(16, 4))
    assert [round(getattr(block.drop_path1, "drop_prob", 0.0), 6) for block in model.blocks] == [0.0, 0.1]
    assert 0 < model.head.weight.abs().max() < 5 * 2e-5
    assert model.head.bias.abs().max() == 0
    # mean of the patches -> new norm -> head, without the old norm and without cls
    tokens, _ = kit.run_blocks(encoder, kit.with_prefix(encoder, kit.patch_tokens(encoder, images)))
    pooled = torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), (16,), eps=1e-6)
    assert torch.allclose(model(images), pooled @ model.head.weight.T, atol=1e-7)


def test_classifier_on_the_class_token_keeps_the_norm(encoder, images, tmp_path):
    kit.save(encoder, tmp_path, spec())
    model = kit.classifier(tmp_path, 7, pool="token").eval()
    expected = model.head(kit.features(encoder, images)["cls"])
    assert torch.allclose(model(images), expected, atol=1e-6)


def test_classifier_of_a_beit_unshares_the_table(images, tmp_path):
    encoder = build("beit")
    kit.save(encoder, tmp_path, spec())
    model = kit.classifier(tmp_path, 7).eval()
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    assert model.rel_pos_bias is None
    assert all(torch.equal(table, encoder.rel_pos_bias.relative_position_bias_table) for table in tables)
    with torch.no_grad():
        tables[0].add_(1)
    assert not torch.equal(tables[0], tables[1])
    with torch.no_grad():
        tables[0].sub_(1)
    tokens, _ = kit.run_blocks(encoder, kit.with_prefix(encoder, kit.patch_tokens(encoder, images)))
    pooled = torch.nn.functional.layer_norm(tokens[:, 1:].mean(1), (16,), eps=1e-6)
    assert torch.allclose(model(images), pooled @ model.head.weight.T, atol=1e-6)
    assert model(images).abs().max() < 1e-3
    assert not [key for key in model.state_dict() if "mask_token" in key or "aggregation" in key]


def test_classifier_at_another_size(encoder, tmp_path):
    kit.save(encoder, tmp_path, spec())
    assert kit.classifier(tmp_path, 7, img_size=24)(torch.randn(2, 3, 24, 24)).shape == (2, 7)


def test_fine_tuning_model_of_beit_base_has_86_530_984_parameters(tmp_path, monkeypatch):
    with torch.device("meta"):
        encoder = kit.create(spec(224, 16, 768, 12, 12, name="vit_base_patch16_224"), "beit")
        save_config_for_hf(encoder, tmp_path / "config.json")
        (tmp_path / "model.safetensors").touch()
        monkeypatch.setattr(kit, "load_file", lambda path: dict(encoder.state_dict()))
        model = kit.classifier(tmp_path, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_530_984


def test_what_is_no_encoder_is_refused(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrain"):
        kit.load(tmp_path / "nothing")
    kit.save(encoder, tmp_path, spec())
    from safetensors.torch import load_file, save_file
    state = load_file(tmp_path / "model.safetensors")
    del state["blocks.1.norm2.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="blocks.1.norm2.weight"):
        kit.classifier(tmp_path, 3)
    with pytest.raises(ValueError, match="pool"):
        kit.classifier(tmp_path, 3, pool="max")


# --- positions and patches --------------------------------------------------------------------------------

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
            expected = [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)]
            found = table[place, [k, 8 + k, 16 + k, 24 + k]]
            assert torch.allclose(found, torch.tensor(expected), atol=1e-7)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(30, 4)


def test_patchify_order_and_inverse():
    x = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).view(2, 3, 8, 12)
    p = patches.patchify(x, 4)
    assert p.shape == (2, 6, 48)
    for b, row, column, y, xx, channel in ((0, 0, 0, 0, 1, 2), (1, 1, 2, 3, 0, 1), (0, 1, 0, 2, 3, 0)):
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
