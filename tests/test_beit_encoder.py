"""Options of encoders of style "beit": how they start, how their positions learn, absolute ones."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import timm
import torch
from test_end_to_end import run_all
from torch import nn

from stages.kit.nets import encoders
from stages.kit.nets.init import scale_by_depth, trunc_init
from stages.kit.train import optim
from stages.kit.train.recipe import Recipe
from stages.kit.train.updates import Updates
from tests import tiny
from tests.conftest import tiny_content, write_params
from workflow import checks, plugins
from workflow.params import ParamsError, check

TABLE = "relative_position_bias_table"
OPTIONS = ("init", "rel_pos_rate", "rel_pos_decay")
NAMES = [
    name
    for name in plugins.names("method")
    if issubclass(tiny.module(name).Config, checks.BeitEncoder)
]
CUT = 0.5396  # deviation of a standard normal that is cut at 1


def published(name, **changes):
    return {key: tiny.module(name).PUBLISHED[key] for key in OPTIONS} | changes


def tables(method):
    return {name: p for name, p in method.named_parameters() if name.endswith(TABLE)}


def test_both_methods_have_them():
    assert {"beitv2", "simmim"} <= set(NAMES)
    for name in NAMES:
        assert published(name) == {"init": "published", "rel_pos_rate": 1.0, "rel_pos_decay": True}


# --- init ---------------------------------------------------------------------------------------


def linears(blocks):
    return [(name, m) for name, m in blocks.named_modules() if isinstance(m, nn.Linear)]


def expected_deviation(how, name, layer, width, number):
    """Of the weights of a layer of block `number`, by the formulas."""
    if how == "xavier":  # uniform in +-sqrt(6 / (in + out))
        return math.sqrt(2 / (layer.in_features + layer.out_features))
    std = 0.02 * (math.sqrt(768 / width) if how == "width" else 1) * CUT
    return std / math.sqrt(2 * number) if name.endswith(("attn.proj", "fc2")) else std


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("how", ["published", "xavier", "width"])
@pytest.mark.parametrize("name", [*NAMES, "random"])
def test_weights_start_as_init_says(name, how, width):
    style = {"style": "beit"} if name == "random" else {}
    spec = tiny.spec(embed_dim=width, depth=3)
    method = tiny.method(name, spec, init=how, **style)
    encoder = method.encoder
    for key, layer in linears(encoder.blocks):
        found, number = layer.weight.detach(), int(key.split(".")[0]) + 1
        deviation = expected_deviation(how, key, layer, width, number)
        assert found.std().item() == pytest.approx(deviation, rel=0.05), key
        limit = deviation * math.sqrt(3) if how == "xavier" else deviation / CUT
        assert 0.97 * limit < found.abs().max().item() <= limit * (1 + 1e-5), key
        assert layer.bias is None or not layer.bias.any()
    patches = encoder.patch_embed.proj
    fan = 3 * spec.patch**2 + width
    std = {"published": 0.02, "width": 0.02 * math.sqrt(768 / width)}.get(how)
    deviation = CUT * std if std else math.sqrt(2 / fan)
    assert patches.weight.detach().std().item() == pytest.approx(deviation, rel=0.05)
    assert not patches.bias.any()
    assert encoder.cls_token.abs().max() <= 0.02  # whatever the blocks have
    assert not encoder.rel_pos_bias.relative_position_bias_table.any()
    for block in encoder.blocks:
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
        assert (block.norm1.weight == 1).all() and not block.norm1.bias.any()


@pytest.mark.parametrize("how", ["xavier", "width"])
def test_aggregation_blocks_start_as_the_encoders(how):
    spec = tiny.spec(embed_dim=64, depth=3)
    method = tiny.method("beitv2", spec, init=how, early_layer=2, head_depth=2)
    for key, layer in linears(method.aggregation):
        number = 2 + int(key.split(".")[0]) + 1  # they follow the early layer
        deviation = expected_deviation(how, key, layer, 64, number)
        assert layer.weight.detach().std().item() == pytest.approx(deviation, rel=0.05), key
        assert layer.bias is None or not layer.bias.any()
    assert method.head.weight.abs().max() <= 0.02


def test_at_a_width_of_768_the_cut_is_the_published_one():
    """The same weights, if they are drawn from the same numbers."""
    made = encoders.create(tiny.spec(embed_dim=768, depth=1), "beit")
    again = encoders.create(tiny.spec(embed_dim=768, depth=1), "beit", init="width")
    torch.manual_seed(0)
    trunc_init(made.blocks)
    scale_by_depth(made.blocks)
    trunc_init(made.patch_embed)
    torch.manual_seed(0)
    tiny.module("vit", "encoder").start(again, "width")
    for key, value in again.state_dict().items():
        if key.startswith(("blocks.", "patch_embed.")):
            torch.testing.assert_close(value, made.state_dict()[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["published", "xavier", "width"])
def test_the_untrained_encoder_starts_as_the_methods(name, how):
    spec = tiny.spec(absolute_positions=True)
    untrained = tiny.method("random", spec, seed=4, style="beit", init=how).encoder.state_dict()
    trained = tiny.method(name, spec, seed=4, init=how).encoder.state_dict()
    assert "pos_embed" in untrained
    assert all(torch.equal(untrained[key], trained[key]) for key in untrained | trained)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_and_its_untrained_encoder_have_the_same_defaults(name):
    config, untrained = tiny.module(name).Config(), tiny.module("random").Config()
    assert (config.init, config.layer_scale) == (untrained.init, untrained.layer_scale)


def test_a_swin_keeps_its_own_weights():
    states = [
        tiny.method("simmim", tiny.spec(kind="swin"), init=how).state_dict()
        for how in ("published", "xavier", "width")
    ]
    for other in states[1:]:
        assert all(torch.equal(other[key], value) for key, value in states[0].items())


def test_other_styles_start_as_ever():
    for style in ("timm", "sincos"):
        torch.manual_seed(0)
        plain = encoders.create(tiny.spec(), style).state_dict()
        torch.manual_seed(0)
        asked = encoders.create(tiny.spec(), style, init="width").state_dict()
        assert all(torch.equal(asked[key], value) for key, value in plain.items())


# --- relative positions -------------------------------------------------------------------------


def stepped(name, kind="vit", gradients=True, **options):
    """How far every parameter moves in the first step of AdamW at a rate of 1e-3."""
    method = tiny.method(name, tiny.spec(kind=kind), **options)
    recipe = Recipe(1, 8, 10, lr=1e-3, weight_decay=0.5)
    updates = Updates(method, recipe, torch.device("cpu"), None)
    with torch.no_grad():
        for table in tables(method).values():
            table.fill_(1.0)
    before = {key: p.detach().clone() for key, p in method.named_parameters()}
    updates.set_rates(0)
    for parameter in updates.parameters:
        parameter.grad = torch.full_like(parameter, 0.1 if gradients else 0.0)
    updates.step()
    return {key: p.detach() - before[key] for key, p in method.named_parameters()}


CASES = [*((name, "vit") for name in NAMES), ("simmim", "swin")]


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("rate", [1.0, 20.0, 3.5])
def test_tables_move_by_their_rate(name, kind, rate):
    moved = stepped(name, kind, rel_pos_rate=rate)
    found = [key for key in moved if key.endswith(TABLE)]
    assert len(found) == (1 if kind == "vit" else 2)  # shared, or one in each block
    for key, by in moved.items():
        if key in found:
            torch.testing.assert_close(by, torch.full_like(by, -1e-3 * rate), rtol=1e-4, atol=0)
        elif by.ndim == 1:  # not decayed
            torch.testing.assert_close(by, torch.full_like(by, -1e-3), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_tables_are_decayed_on_request(name, kind):
    """AdamW's decay is its own rate times the weight decay times the value, here 1."""
    for decay, expected in ((False, 0.0), (True, -1e-3 * 2 * 0.5)):
        moved = stepped(name, kind, gradients=False, rel_pos_rate=2.0, rel_pos_decay=decay)
        for key in (key for key in moved if key.endswith(TABLE)):
            by = moved[key]
            torch.testing.assert_close(by, torch.full_like(by, expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_published_values_leave_two_groups_as_they_were(name, kind):
    """In the order of the parameters, on which the last bits of a clipped norm depend."""
    method = tiny.method(name, tiny.spec(kind=kind), **published(name))
    exempt = method.no_weight_decay()
    named = [(key, p) for key, p in method.named_parameters() if p.requires_grad]
    decayed = [p for key, p in named if p.ndim > 1 and key not in exempt]
    plain = [p for key, p in named if p.ndim <= 1 or key in exempt]
    assert exempt == ({"encoder.cls_token"} if kind == "vit" else {"mask_token"})
    groups = optim.groups(method, 0.05)
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.05, 1.0), (0.0, 1.0)]
    for group, expected in zip(groups, (decayed, plain), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]


@pytest.mark.parametrize("version", [1, 2])
def test_every_table_of_an_encoder_is_found(version):
    name = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}[version]
    swin = encoders.create(tiny.spec(kind="swin", name=name))
    found = {f"layers.{i}.blocks.0.attn.{TABLE}" for i in (0, 1)}
    assert encoders.relative_positions(swin) == (found if version == 1 else set())
    own = {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}
    beit = encoders.create(tiny.spec(), "beit", **own)
    assert encoders.relative_positions(beit) == {f"blocks.{i}.attn.{TABLE}" for i in (0, 1)}
    assert encoders.relative_positions(encoders.create(tiny.spec(), "sincos")) == set()


# --- absolute positions -------------------------------------------------------------------------


def positioned(**changes):
    """A Beit with absolute positions in which nothing is zero that could hide a mistake."""
    spec = tiny.spec(absolute_positions=True, **changes)
    torch.manual_seed(0)
    encoder = encoders.create(spec, "beit").eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder, spec


def test_absolute_positions_are_those_of_the_argument_of_timm():
    torch.manual_seed(0)
    asked = encoders.create(tiny.spec(absolute_positions=True), "beit").state_dict()
    torch.manual_seed(0)
    argued = encoders.create(tiny.spec(args={"use_abs_pos_emb": True}), "beit").state_dict()
    assert asked.keys() == argued.keys() and "pos_embed" in asked
    assert all(torch.equal(asked[key], value) for key, value in argued.items())
    assert "pos_embed" not in encoders.create(tiny.spec(), "beit").state_dict()


@pytest.mark.parametrize("style", ["timm", "sincos"])
def test_styles_that_have_absolute_positions_ignore_the_key(style):
    states = []
    for asked in (False, True):
        torch.manual_seed(0)
        states.append(encoders.create(tiny.spec(absolute_positions=asked), style).state_dict())
    assert "pos_embed" in states[0]
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


@torch.no_grad()
def test_an_export_with_absolute_positions_gives_equal_bits(tmp_path):
    encoder, spec = positioned()
    encoders.save(encoder, tmp_path, spec)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    there = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    expected = encoders.features(encoder, images)
    tokens = there.forward_features(images)
    assert torch.equal(tokens[:, 0], expected["cls"]) and torch.equal(
        tokens[:, 1:], expected["patch"]
    )
    here = encoders.load(tmp_path).eval()
    assert torch.equal(encoders.features(here, images)["patch"], expected["patch"])
    pos_embed = encoder.pos_embed.clone()
    encoder.pos_embed.zero_()
    assert not torch.equal(encoders.features(encoder, images)["patch"], expected["patch"])
    encoder.pos_embed.copy_(pos_embed)


@pytest.mark.parametrize("how", ["timm", "bicubic", "dino"])
def test_both_kinds_of_positions_are_resized_and_fine_tuned(how, tmp_path):
    encoder, spec = positioned()
    encoders.save(encoder, tmp_path, spec)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    larger = encoders.load(tmp_path, positions=how, img_size=32).eval()
    assert larger.pos_embed.shape == (1, 65, 32)
    assert torch.equal(larger.pos_embed[:, :1], encoder.pos_embed[:, :1])
    assert larger.rel_pos_bias.relative_position_bias_table.shape == (15**2 + 3, 2)
    model = encoders.classifier(tmp_path, 5, positions=how, img_size=32)
    assert torch.equal(model.pos_embed, larger.pos_embed)
    assert encoders.relative_positions(model) == {f"blocks.{i}.attn.{TABLE}" for i in (0, 1)}
    model(images).sum().backward()
    assert model.pos_embed.requires_grad
    same = encoders.classifier(tmp_path, 5, positions=how)
    assert torch.equal(same.pos_embed, encoder.pos_embed)
    groups = optim.layer_decay_groups(same, 2, 0.5, 0.05)
    (group,) = [g for g in groups if any(p is same.pos_embed for p in g["params"])]
    assert (group["weight_decay"], group["lr_scale"]) == (0.0, 0.5**3)


@pytest.mark.parametrize("name", NAMES)
def test_absolute_positions_learn_and_are_not_decayed(name):
    method = tiny.method(name, tiny.spec(absolute_positions=True))
    assert "encoder.pos_embed" in method.no_weight_decay()
    method(tiny.batch(tiny.module(name), method.spec), tiny.progress())["loss"].backward()
    assert method.encoder.pos_embed.grad.abs().sum() > 0


def test_one_entry_of_models_gives_every_method_absolute_positions(tmp_path):
    """From params.yaml to the report."""
    content = tiny_content(model={"absolute_positions": True}, methods={"simmim": {}, "random": {}})
    content["grid"]["runs"] = {
        "mae": {"method": "mae"},
        "simmim": {"method": "simmim"},
        "beitv2": {"method": "beitv2", "target": "vqkd"},
        "untrained": {"method": "random", "set": {"style": "beit"}},
    }
    results = tmp_path / "results"
    run_all(write_params(tmp_path, content), results)
    for run in content["grid"]["runs"]:
        encoder = encoders.load(results / f"pretrain/{run}-s0/encoder")
        assert encoder.pos_embed is not None
        assert bool(encoders.relative_positions(encoder)) == (run != "mae")
        for task in content["tasks"]:
            metrics = json.loads((results / f"transfer/{run}-s0/{task}/metrics.json").read_text())
            assert 0 <= metrics["top1"] <= 1


# --- what params.yaml may say -------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"init": "xaver"}, "init: must be 'published', 'xavier' or 'width' .found 'xaver'"),
        ({"rel_pos_rate": "fast"}, "rel_pos_rate: must be a valid number .found 'fast'"),
        ({"rel_pos_rate": -1}, "rel_pos_rate: found -1.0, expected 0 or more"),
        ({"rel_pos_decay": 3}, "rel_pos_decay: must be a valid boolean .found 3"),
        ({"rel_pos": 3}, "rel_pos: unknown key .found 3"),
    ],
)
def test_a_bad_option_is_named(name, given, message):
    with pytest.raises(ParamsError, match=f"methods.{name}.{message}"):
        check(tiny_content(methods={name: given}))


def test_a_bad_key_of_the_model_is_named():
    with pytest.raises(ParamsError, match="model.absolute_positions: must be a valid boolean"):
        check(tiny_content(model={"absolute_positions": "learnt"}))


def test_the_defaults_stand_at_one_place():
    """A method that has other ones would no longer be compared with `random` of the same name."""
    for name in NAMES:
        config = tiny.module(name).Config
        own = {f.name: f.default for f in dataclasses.fields(config)}
        shared = {f.name: f.default for f in dataclasses.fields(checks.BeitEncoder)}
        assert shared.items() <= own.items()
