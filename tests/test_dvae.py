"""Facts of the targets dvae and dalle: relaxation, divergence, schedules, pictures, weights."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from stages import targets
from stages.kit.nets.resize import filters, lanczos
from stages.kit.parts.weights import WeightsError
from stages.kit.train.loop import Recipe
from stages.targets import dalle, dvae
from tests import tiny

SPEC, images = tiny.spec(), tiny.images
SMALL = {"codes": 8, "hidden": 8, "code_dim": 4, "min_usage": 0.0, "min_perplexity": 0.0}


def config(**changes):
    return dvae.Config(**{**SMALL, **changes})


def training(spec=SPEC, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return dvae.Training(config(**changes), spec)


def uniforms(rows: int = 4, step: int = 3):
    return tiny.progress(rows, step).uniform("gumbel", 16, 8)


# --- relaxation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
def test_shares_of_the_codes_sum_to_one(hard):
    logits = 3 * torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    shares = dvae.relaxed(logits, torch.tensor(0.7), hard)
    assert torch.allclose(shares.sum(-1), torch.ones(4, 16), atol=1e-6)
    assert (shares >= -1e-6).all()
    one_hot = F.one_hot(logits.argmax(-1), 8).float()
    assert torch.allclose(shares, one_hot, atol=1e-6) is hard


def test_hard_shares_have_the_gradient_of_the_soft_ones():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    soft, hard = (
        torch.autograd.grad((dvae.relaxed(logits, torch.tensor(0.5), h) * weight).sum(), logits)[0]
        for h in (False, True)
    )
    assert soft.abs().sum() > 0
    assert torch.equal(soft, hard)


def test_the_soft_sample_is_torchs_gumbel_softmax():
    """torch draws -ln(E) with E exponential, which is -ln(-ln u)."""
    logits, u = torch.randn(4, 16, 8), uniforms()
    noise = dvae.gumbel(u).float()
    expected = F.softmax((logits - (-u.double().log()).log()) / 0.9, dim=-1)
    assert torch.allclose(
        dvae.relaxed(logits + noise, torch.tensor(0.9), False), expected.float(), atol=1e-5
    )


def test_gumbel_noise_is_gumbel_and_finite():
    edges = dvae.gumbel(torch.tensor([0.0, 1 - 2.0**-24]))
    assert edges.isfinite().all()
    noise = dvae.gumbel(tiny.progress(500).uniform("gumbel", 200))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)


def test_the_largest_noisy_score_has_the_probability_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0])
    noise = dvae.gumbel(tiny.progress(400).uniform("gumbel", 100, 3))
    counts = torch.bincount((logits + noise).argmax(-1).flatten(), minlength=3)
    found, expected = counts / counts.sum(), logits.softmax(0)
    assert torch.allclose(found.float(), expected, atol=0.01)


# --- loss ---------------------------------------------------------------------------------------


def test_the_divergence_is_kl_from_uniform_codes():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    p = logits.softmax(-1).numpy()
    expected = (p * np.log(p / (1 / 5))).sum(-1)
    assert np.allclose(dvae.divergence(logits).numpy(), expected)
    assert dvae.divergence(torch.zeros(1, 1, 5)).abs().max() < 1e-6
    sure = torch.tensor([[[0.0, -200.0, -200.0]]])
    assert float(dvae.divergence(sure)) == pytest.approx(math.log(3))


def loss_by_hand(module, x, now):
    """In float64, with sums written out."""
    cfg, target = module.config, module.target.double()
    pixels = 2 * x.double() - 1
    logits = target.encoder(pixels).permute(0, 2, 3, 1).reshape(len(x), -1, cfg.codes)
    u = now.uniform("gumbel", *logits.shape[1:]).double()
    noisy = (logits - (-u.log()).log()) / module.temperature(now.fraction)
    y = noisy.exp() / noisy.exp().sum(-1, keepdim=True)
    vectors = torch.einsum("bnk,kd->bdn", y, target.codebook.weight)
    rebuilt = target.decoder(vectors.reshape(len(x), -1, 4, 4))
    error = (rebuilt - pixels).square().sum() / pixels.numel()
    q = logits.softmax(-1)
    kl = (q * (q * cfg.codes).log()).sum(-1)  # (B,N)
    return error, kl


@pytest.mark.parametrize("over", ["tokens", "batch"])
def test_the_loss(over):
    module, x, now = training(kl_weight=0.3, kl_over=over), images(), tiny.progress(4, step=3)
    nn.init.normal_(module.target.encoder[-1].weight)  # codes that are far from uniform
    out = module({"view": x}, now)
    error, kl = loss_by_hand(module, x, now)
    assert float(kl.detach().mean()) > 0.05
    expected = error + 0.3 * (kl.sum() if over == "batch" else kl.sum() / 64)
    assert out["loss"].item() == pytest.approx(float(expected), rel=1e-5)
    assert out["reconstruction"].item() == pytest.approx(float(error), rel=1e-5)
    assert out["kl"].item() == pytest.approx(float(kl.mean()), rel=1e-5)


def test_the_released_sum_is_torchs_batchmean_of_a_tensor_of_length_one():
    """As microsoft/unilm calls it: log_uniform (1,) first, log_qy second."""
    logits = torch.randn(4, 16, 8)
    log_q, uniform = logits.log_softmax(-1), torch.tensor([1 / 8]).log()
    released = F.kl_div(uniform, log_q, None, None, "batchmean", log_target=True)
    assert float(dvae.divergence(logits).sum()) == pytest.approx(float(released), rel=1e-5)


def test_a_sum_over_the_batch_refuses_to_be_cut():
    assert not hasattr(training(), "whole_batch")
    assert "kl_over" in training(kl_over="batch").whole_batch


def test_schedules_are_functions_of_progress():
    module = training(kl_weight=0.2, kl_share=0.1)
    shares = (0.0, 0.125, 0.25, 0.5, 0.9)
    expected = [1 / 16 + (15 / 16) * 0.5 * (1 + math.cos(math.pi * min(2 * f, 1))) for f in shares]
    assert [module.temperature(f) for f in shares] == pytest.approx(expected)
    assert module.temperature(0.0) == 1.0 and module.temperature(0.5) == 1 / 16
    assert [module.kl_weight(f) for f in (0.0, 0.05, 0.1, 1.0)] == pytest.approx([0, 0.1, 0.2, 0.2])
    constant = training(temperature=0.9, temperature_end=0.9, temperature_share=0.0, kl_share=0.0)
    assert {constant.temperature(f) for f in shares} == {0.9}
    assert constant.kl_weight(0.0) == constant.config.kl_weight


def test_noise_is_drawn_for_each_sample_and_step():
    module, x = training(), images()
    now = tiny.progress(torch.tensor([0, 1, 2, 3]))
    whole = module({"view": x}, now)["loss"]
    halves = [
        module({"view": x[rows]}, tiny.progress(rows))["loss"]
        for rows in (torch.tensor([3, 0]), torch.tensor([1, 2]))
    ]
    assert float(sum(halves) / 2) == pytest.approx(float(whole), rel=1e-5)
    assert module({"view": x}, tiny.progress(4, step=4))["loss"] != whole


def test_it_learns_to_rebuild_two_patterns():
    """Images of few colours: the codes must tell them apart, and the decoder paint them."""
    module = training(kl_weight=0.001, hidden=16)
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round()
    x = F.interpolate(x[:, :1].expand(-1, 3, -1, -1), size=16, mode="nearest")
    optimiser = torch.optim.Adam(module.parameters(), lr=5e-3)
    for step in range(80):
        out = module({"view": x}, tiny.progress(8, step, 80))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
    target = module.target
    ids = target(x, "ids")["ids"]
    left = (target.decode(ids) - x).square().mean() / x.var()
    assert float(left) < 0.2
    dark = F.adaptive_avg_pool2d(x[:, :1], 4).flatten(1) < 0.5
    assert not set(ids[dark].tolist()) & set(ids[~dark].tolist())


# --- the finished tokenizer ---------------------------------------------------------------------


def test_codes_are_on_the_students_grid_and_always_the_same():
    target = training().target.requires_grad_(False)
    found = [target(images(), "ids", "logits") for _ in range(2)]
    assert found[0]["ids"].shape == (4, 16)
    assert found[0]["ids"].dtype == torch.int64
    assert set(found[0]["ids"].flatten().tolist()) <= set(range(8))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert torch.equal(found[0]["logits"].argmax(-1), found[0]["ids"])
    assert not target.training and not any(p.requires_grad for p in target.parameters())


def test_a_code_is_that_of_its_place():
    """Patch (1, 2) is code 6. Of many encoders and decoders, the mean change is largest there."""
    x = torch.full((1, 3, 16, 16), 0.5)
    bright = x.clone()
    bright[:, :, 4:8, 8:12] = 1.0
    codes = torch.zeros(1, 16, dtype=torch.int64)
    other = codes.clone()
    other[0, 6] = 3
    seen, painted = torch.zeros(16), torch.zeros(16)
    for seed in range(30):
        target = training(seed=seed).target.requires_grad_(False)
        moved = target(bright, "logits")["logits"] - target(x, "logits")["logits"]
        seen += moved.norm(dim=-1)[0]
        changed = (target.decode(other) - target.decode(codes)).abs().sum(1)[0]
        painted += changed.unfold(0, 4, 4).unfold(1, 4, 4).sum((2, 3)).flatten()
    assert int(seen.argmax()) == int(painted.argmax()) == 6


def test_its_own_resolution():
    """BEiT: the tokenizer looks at half the student's pixels, by Lanczos' filter."""
    target = training(input_size=8).target
    assert target.config.stages(16, 4) == 1
    x = 0.3 + 0.4 * images()
    small = torch.stack([resized(each, 8) for each in x])
    pixels = target.pixels(x)
    assert pixels.shape == (4, 3, 8, 8)
    assert (pixels - (2 * small - 1)).abs().max() < 2 * 1.6 / 255
    assert target(images(), "ids")["ids"].shape == (4, 16)
    assert target.decode(torch.zeros(4, 16, dtype=torch.int64)).shape == (4, 3, 16, 16)


def resized(image, size: int):
    """By Pillow, in 8 bits."""
    bytes_ = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    found = Image.fromarray(bytes_).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(found)).permute(2, 0, 1) / 255


@pytest.mark.parametrize("size", [8, 11, 16, 24])
def test_lanczos_is_pillows(size):
    x = ((0.3 + 0.4 * images()) * 255).round() / 255  # Pillow cuts what leaves [0,1] on the way
    expected = torch.stack([resized(each, size) for each in x])
    assert (lanczos(x, size) - expected).abs().max() < 1.6 / 255
    weights = filters(16, size)
    assert torch.allclose(weights.sum(1), torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize(("side", "grid", "stages"), [(16, 4, 2), (224, 28, 3), (32, 32, 0)])
def test_stages_fit_the_patch(side, grid, stages):
    assert config().stages(side, grid) == stages


def test_a_patch_that_no_stages_make_is_refused():
    for change, side, patch in (({}, 12, 3), ({"input_size": 20}, 16, 4)):
        with pytest.raises(ValueError, match="^input_size: found .* a power of two, such as"):
            config(**change).check(side, tiny.model(patch_size=patch))


def test_health_says_how_much_is_rebuilt():
    """By numpy, over both batches at once."""
    target = training().target
    both = [images(), images(6, seed=1)]
    found = dvae.health(target, iter(both), config())
    x = torch.cat(both).double().numpy()
    ids = target(torch.cat(both), "ids")["ids"]
    again = target.decode(ids).double().detach().numpy()
    about = ((x - x.mean((0, 2, 3), keepdims=True)) ** 2).sum()
    assert found["explained"] == pytest.approx(1 - ((x - again) ** 2).sum() / about, rel=1e-6)
    counts = np.bincount(ids.flatten().numpy(), minlength=8)
    assert found["counts"] == counts.tolist()
    assert found["majority"] == pytest.approx(counts.max() / 160)
    assert found["problems"] == []


def test_a_collapsed_codebook_is_a_problem():
    module = training()
    nn.init.zeros_(module.target.encoder[-1].weight)  # one code for all
    strict = config(min_usage=0.2, min_perplexity=0.2)
    problems = dvae.health(module.target, iter([images()]), strict)["problems"]
    assert "collapsed" in problems[0] and "a few codes take almost all" in problems[1]


def test_pictures():
    target = training().target
    found = dvae.pictures(target, images(8))
    assert set(found) == {"reconstruction", "code_map", "codebook"}
    sheet = found["reconstruction"]
    assert sheet.shape == (8 * 100 - 4, 2 * 100 - 4, 3)
    again = target.decode(target(images(8), "ids")["ids"])[0]
    shown = torch.from_numpy(sheet[:96, 100:]).permute(2, 0, 1)[:, ::6, ::6] / 255
    assert torch.allclose(shown, again, atol=0.5 / 255 + 1e-6)


def test_sizes_of_the_released_model():
    """microsoft/unilm's DiscreteVAE(num_tokens=8192, codebook_dim=512, num_layers=3,
    hidden_dim=256): its layers written out.
    """
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in dvae.PUBLISHED.items()}
    train = {key: given.pop(key) for key in ("epochs", "batch_size")}
    published = dataclasses.replace(dvae.Config(**given), input_size=112)
    spec = tiny.spec(224, patch_size=16, embed_dim=32)
    with torch.device("meta"):
        target = dvae.Target(published, spec)

    def conv(channels, width, size):
        return channels * width * size**2 + width

    residual = 2 * conv(256, 256, 3) + conv(256, 256, 1)
    encoder = conv(3, 256, 4) + 2 * conv(256, 256, 4) + 3 * residual + conv(256, 8192, 1)
    decoder = conv(512, 256, 4) + 2 * conv(256, 256, 4) + 3 * residual + conv(256, 3, 1)
    count = sum(p.numel() for p in target.parameters())
    assert count == encoder + decoder + 8192 * 512
    recipe = Recipe.of(published, train, steps_per_epoch=2500)
    assert (recipe.epochs, recipe.lr, recipe.betas) == (1200, 1e-4, (0.9, 0.999))
    assert published.kl_weight == pytest.approx(6.6 / 192)


# --- DALL-E's encoder ---------------------------------------------------------------------------


def dalle_state(width: int = 8, codes: int = 16) -> dict:
    """The names and shapes of openai/DALL-E, with small sizes: 2 blocks in each of 4 groups."""
    generator, state = torch.Generator().manual_seed(0), {}

    def conv(name: str, channels: int, out: int, size: int):
        state[f"{name}.w"] = torch.randn(out, channels, size, size, generator=generator)
        state[f"{name}.w"] /= math.sqrt(channels * size**2)
        state[f"{name}.b"] = 0.1 * torch.randn(out, generator=generator)

    conv("blocks.input", 3, width, 7)
    before = width
    for group in (1, 2, 3, 4):
        wide = width * 2 ** (group - 1)
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            if before != wide:
                conv(f"{name}.id_path", before, wide, 1)
            conv(f"{name}.res_path.conv_1", before, wide // 4, 3)
            conv(f"{name}.res_path.conv_2", wide // 4, wide // 4, 3)
            conv(f"{name}.res_path.conv_3", wide // 4, wide // 4, 3)
            conv(f"{name}.res_path.conv_4", wide // 4, wide, 1)
            before = wide
    conv("blocks.output.conv", before, codes, 1)
    return state


def forward_by_hand(state: dict, x: torch.Tensor) -> torch.Tensor:
    """openai/DALL-E's forward in float64."""

    def conv(name, x):
        w, b = (state[f"{name}.{part}"].double() for part in "wb")
        return F.conv2d(x, w, b, padding=(w.shape[-1] - 1) // 2)

    x = conv("blocks.input", 0.8 * x.double() + 0.1)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            same = f"{name}.id_path.w" not in state
            out = x
            for number in (1, 2, 3, 4):
                out = conv(f"{name}.res_path.conv_{number}", out.relu())
            x = (x if same else conv(f"{name}.id_path", x)) + out / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    return conv("blocks.output.conv", x.relu())


def prepared(folder, state=None, name: str = "encoder.pt", spec=SPEC):
    state = dalle_state() if state is None else state
    save_file(state, folder / name) if name.endswith("s") else torch.save(state, folder / name)
    return dalle.Target(dalle.Config(weights=f"file:{folder / name}", codes=16), spec).prepare()


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.safetensors"])
def test_dalles_encoder(tmp_path, name):
    spec = tiny.spec(32, patch_size=8)
    target, x = prepared(tmp_path, name=name, spec=spec), images(size=32)
    expected = forward_by_hand(dalle_state(), x).flatten(2).transpose(1, 2)
    found = target(x, "ids", "logits")
    assert target.sizes == {"ids": 16, "logits": 16}
    assert torch.allclose(found["logits"], expected.float(), atol=1e-5)
    assert torch.equal(found["ids"], expected.argmax(-1))
    assert len(found["ids"].unique()) > 1
    (tmp_path / "saved").mkdir()
    targets.save(target, tmp_path / "saved", "dalle", target.config, spec)
    (tmp_path / name).unlink()  # a finished target needs it no more
    assert torch.equal(targets.load(tmp_path / "saved")(x, "ids")["ids"], found["ids"])


def test_dalle_looks_at_eight_pixels_for_a_patch(tmp_path):
    """112 for the published 224 pixels; here 16 pixels in patches of 4 become 32."""
    target = prepared(tmp_path)
    expected = forward_by_hand(dalle_state(), lanczos(images(), 32)).flatten(2).transpose(1, 2)
    assert torch.allclose(target(images(), "logits")["logits"], expected.float(), atol=1e-5)
    big = dalle.Target(target.config, tiny.spec(224, patch_size=16, embed_dim=32))
    assert big.side == 112


def test_dalles_published_sizes():
    with torch.device("meta"):
        encoder = dalle.Encoder()
    shapes = {name: tuple(x.shape) for name, x in encoder.state_dict().items()}
    assert shapes == {name: tuple(x.shape) for name, x in meta_state().items()}
    assert shapes["blocks.input.w"] == (256, 3, 7, 7)
    assert shapes["blocks.group_4.block_1.id_path.w"] == (2048, 1024, 1, 1)
    assert shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert encoder.blocks.group_1.block_1.gain == 1 / 64


def meta_state():
    """Names and shapes at the published width, from those of the small one."""
    scale = 256 // 8
    found = {}
    for name, x in dalle_state().items():
        shape = list(x.shape)
        shape[0] = 8192 if "output" in name else shape[0] * scale
        if len(shape) == 4 and "input" not in name:
            shape[1] *= scale
        found[name] = torch.empty(shape, device="meta")
    return found


RAN = []


def run(what: str) -> None:
    RAN.append(what)


class Runs:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (run, ("code",))


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_file_of_weights_is_not_run(tmp_path, write):
    path = tmp_path / "encoder.pkl"
    write(Runs(), path)
    with pytest.raises(WeightsError, match=f"^weights: {path}: .*state dict"):
        dalle.Target(dalle.Config(weights=f"file:{path}"), SPEC).prepare()
    assert not RAN
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert RAN.pop() == "code"  # it would have run


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weight": torch.zeros(3)}, "found other tensors than those of DALL-E's encoder"),
        (dalle_state() | {"blocks.input.w": torch.zeros(8, 3, 5, 5)}, "found other tensors"),
        ([torch.zeros(3)], "found a list, expected a state dict"),
    ],
)
def test_wrong_weights_are_named(tmp_path, content, says):
    with pytest.raises(WeightsError, match=says):
        prepared(tmp_path, content)


def test_another_number_of_codes_is_named(tmp_path):
    prepared(tmp_path)
    with pytest.raises(WeightsError, match="^codes: found 8192, expected the 16 of"):
        dalle.Target(dalle.Config(weights=f"file:{tmp_path / 'encoder.pt'}"), SPEC).prepare()


def test_a_file_that_is_not_weights_is_named(tmp_path):
    for name in ("encoder.pt", "encoder.safetensors"):
        (tmp_path / name).write_bytes(b"version https://git-lfs")
        with pytest.raises(WeightsError, match=f"^weights: {tmp_path / name}"):
            dalle.Target(dalle.Config(weights=f"file:{tmp_path / name}"), SPEC).prepare()


@pytest.mark.parametrize("weights", ["encoder.pt", "file:", "", "timm:x"])
def test_weights_must_be_a_file(weights):
    with pytest.raises(ValueError, match="^weights: found .*expected file:PATH"):
        dalle.Config(weights=weights)


def test_without_weights_it_says_so():
    with pytest.raises(RuntimeError, match="prepare"):
        dalle.Target(dalle.Config(), SPEC)(images(), "ids")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"hidden": 0}, "hidden"),
        ({"code_dim": 0}, "code_dim"),
        ({"input_size": 2}, "input_size"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature_end": 0.0}, "temperature_end"),
        ({"temperature_share": 1.5}, "temperature_share"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"kl_share": -0.1}, "kl_share"),
        ({"codes": 1}, "codes"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}: found "):
        config(**values)
