"""What supplies targets: the base's checks, what holds a target frozen, the encoder of a run."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets import encoders, target
from stages.kit.nets.target import EncoderTarget, Frozen, Target
from tests import tiny

SPEC = tiny.spec(embed_dim=16)
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CASES = [("timm", {}), ("sincos", {}), ("beit", {}), ("timm", {"depth": 0})]
CASES += [("sincos", {"reg_tokens": 2})]


def exported(folder, style="timm", spec=SPEC, **kw):
    """A folder with an encoder whose weights are not trivial."""
    torch.manual_seed(1)
    encoder = encoders.create(spec, style, **kw)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    nn.init.normal_(encoder.norm.weight, 1, 0.3)
    nn.init.normal_(encoder.norm.bias)
    encoders.save(encoder, folder, spec)
    return folder


def plain(folder):
    """The timm model of a folder, and what goes through its blocks and its last norm."""
    model, seen = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), {}
    hook = lambda name: lambda m, args, out: seen.update({name: (args[0], out)})  # noqa: E731
    model.norm.register_forward_hook(hook("norm"))
    for number, block in enumerate(getattr(model, "blocks", ()), start=1):
        block.register_forward_hook(hook(number))
    with torch.no_grad():
        model.forward_features(SPEC.normalise(IMAGES))
    return model, seen


# --- the base -----------------------------------------------------------------------------------


class Own(Target):
    """Gives whatever it is told to."""

    def __init__(self, spec, **found):
        super().__init__()
        self.spec, self.found, self.asked = spec, found, []
        self.sizes = dict.fromkeys(found, 4)

    def look(self, images, wanted, norm, layers):
        self.asked.append((wanted, norm, layers))
        return self.found


def test_it_gives_what_is_wanted_and_passes_on_how():
    patch, cls = torch.zeros(3, 16, 4), torch.zeros(3, 4)
    own = Own(SPEC, patch=patch, cls=cls, layers=[patch, patch])
    found = own(IMAGES, "cls", "layers", norm=False, layers=[1, -1])
    assert list(found) == ["cls", "layers"]
    assert found["cls"] is cls
    assert own.asked == [({"cls", "layers"}, False, (1, -1))]
    assert list(own(IMAGES, "patch", "cls")) == ["patch", "cls"]
    assert own.asked[1] == ({"patch", "cls"}, True, ())


def test_what_it_does_not_give_is_named():
    own = Own(SPEC, ids=torch.zeros(3, 16), patch=torch.zeros(3, 16, 4))
    with pytest.raises(ValueError, match="^target: found ids, patch, expected attention, cls$"):
        own(IMAGES, "cls", "ids", "attention")
    assert not own.asked


@pytest.mark.parametrize(
    ("name", "shape"),
    [("ids", (3, 4)), ("patch", (3, 64, 4)), ("logits", (2, 16, 4)), ("patch", (3, 4, 16))],
)
def test_another_grid_than_the_students_is_refused(name, shape):
    own = Own(SPEC, **{name: torch.zeros(shape)})
    with pytest.raises(
        ValueError, match=rf"^target: found {name} of shape .* 3 rows of 16 patches"
    ):
        own(IMAGES, name)


@pytest.mark.parametrize("images", [IMAGES * 3, IMAGES - 0.5, IMAGES * torch.nan])
def test_normalised_images_are_refused(images):
    own = Own(SPEC, ids=torch.zeros(3, 16))
    with pytest.raises(ValueError, match=r"^test_target_base: found .* pixels in \[0, 1\]"):
        own(images, "ids")
    rounded = IMAGES.clone()
    rounded[0, 0, 0, 0] = 1 + 5e-5
    own(rounded, "ids")


def test_every_batch_is_looked_at_on_a_cpu():
    looked = target.UnitRange("me")
    for _ in range(3):
        looked(IMAGES)
    with pytest.raises(ValueError, match="^me: found images with pixels"):
        looked(IMAGES + 1)


def test_it_stays_in_evaluation_mode():
    class Inner(Target):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout()

    inner = Inner().train()
    assert not any(module.training for module in inner.modules())
    assert not any(module.training for module in nn.ModuleList([inner]).train()[0].modules())


# --- what holds it for a student ----------------------------------------------------------------


def test_frozen_passes_no_gradient_and_open_passes_it_to_the_images():
    colours = tiny.target(SPEC)
    images = IMAGES.clone().requires_grad_()
    found = colours(images, "patch", "cls")
    assert not any(value.requires_grad for value in found.values())
    assert colours.sizes == {"ids": 8, "patch": 6, "cls": 6}
    assert not any(parameter.requires_grad for parameter in colours.open.parameters())
    open_ = colours.open(images, "patch")["patch"]
    assert torch.equal(open_, found["patch"])
    open_.square().sum().backward()
    assert images.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in colours.open.parameters())


def test_torch_neither_trains_nor_saves_nor_moves_what_is_frozen():
    class Student(nn.Module):
        def __init__(self, target):
            super().__init__()
            self.target, self.own = target, nn.Linear(2, 2)

    held = tiny.target(SPEC)
    student = Student(held)
    assert set(student.state_dict()) == {"own.weight", "own.bias"}
    assert len(list(student.parameters())) == 2
    student.train().requires_grad_(True)
    assert not held.open.training
    assert not any(parameter.requires_grad for parameter in held.open.parameters())


# --- the encoder of a run -----------------------------------------------------------------------


@pytest.mark.parametrize(("style", "kw"), CASES)
def test_features_are_those_of_the_plain_timm_model(tmp_path, style, kw):
    folder = exported(tmp_path, style, **kw)
    teacher, (model, seen) = Frozen(EncoderTarget.load(folder, SPEC)), plain(folder)
    before, after = seen["norm"]
    prefix = model.num_prefix_tokens
    for norm, expected in ((True, after), (False, before)):
        found = teacher(IMAGES, "patch", "cls", norm=norm)
        torch.testing.assert_close(found["patch"], expected[:, prefix:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["cls"], expected[:, 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after, atol=0.1)
    sizes = {"patch": 16, "cls": 16, "layers": 16} | (
        {} if kw.get("depth") == 0 else {"attention": 2}
    )
    assert teacher.sizes == sizes
    assert teacher(IMAGES, "patch")["patch"].dtype == torch.float32


@pytest.mark.parametrize(("style", "kw"), [case for case in CASES if case[1].get("depth") != 0])
def test_layers_are_the_outputs_of_blocks(tmp_path, style, kw):
    folder = exported(tmp_path, style, **kw)
    teacher, (model, seen) = Frozen(EncoderTarget.load(folder, SPEC)), plain(folder)
    prefix = model.num_prefix_tokens
    found = teacher(IMAGES, "layers", "patch", "cls", layers=(2, 1, -1, -2))
    for states, number in zip(found["layers"], (2, 1, 2, 1), strict=True):
        torch.testing.assert_close(states, seen[number][1][:, prefix:], atol=1e-5, rtol=1e-5)
    alone = teacher(IMAGES, "patch", "cls")
    for name, expected in alone.items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
    last = teacher(IMAGES, "patch", norm=False)["patch"]
    torch.testing.assert_close(found["layers"][0], last, atol=1e-5, rtol=1e-5)
    for wrong in (3, 0, -3):
        with pytest.raises(ValueError, match=r"taps: found .*expected block numbers 1\.\.2"):
            teacher(IMAGES, "layers", layers=(wrong,))


@pytest.mark.parametrize(("style", "kw"), [case for case in CASES if case[1].get("depth") != 0])
def test_attention_is_the_class_tokens_of_the_last_block(tmp_path, style, kw):
    folder = exported(tmp_path, style, **kw)
    teacher, encoder = Frozen(EncoderTarget.load(folder, SPEC)), encoders.load(folder).eval()
    maps = encoders.attention(encoder, SPEC.normalise(IMAGES))
    found = teacher(IMAGES, "attention")["attention"]
    assert found.shape == (3, 2, 16)
    torch.testing.assert_close(found, maps[:, :, 0, encoder.num_prefix_tokens :])


def test_gradients_reach_the_images_and_no_weight(tmp_path):
    teacher = EncoderTarget.load(exported(tmp_path), SPEC)
    wanted = ("patch", "cls", "attention", "layers")
    for name in wanted:
        images = IMAGES.clone().requires_grad_()
        found = teacher(images, name, layers=(1,) if name == "layers" else ())[name]
        found = found[0] if name == "layers" else found
        (found * torch.randn(found.shape)).sum().backward()
        assert images.grad.abs().amax((1, 2, 3)).min() > 0, name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    found = Frozen(teacher)(images, *wanted, layers=(1,))
    assert not any(found[name].requires_grad for name in ("patch", "cls", "attention"))
    assert not found["layers"][0].requires_grad


def test_it_is_frozen_and_stays_in_evaluation_mode(tmp_path):
    teacher = EncoderTarget.load(exported(tmp_path, drop_path=0.9), SPEC).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(IMAGES, "patch")["patch"], teacher(IMAGES, "patch")["patch"])


def test_all_lies_on_the_students_grid(tmp_path):
    """An encoder whose grid is coarser than the student's, as a pyramid's is: corners stay, what is
    between is mixed, and attention keeps its sum.
    """
    folder = exported(tmp_path)
    finer, names = tiny.spec(embed_dim=16, patch_size=2), ("patch", "cls", "attention", "layers")
    own, found = (
        EncoderTarget.load(folder, spec)(IMAGES, *names, norm=False, layers=(1,))
        for spec in (SPEC, finer)
    )
    assert torch.equal(own["cls"], found["cls"])
    for pick, share in (
        (lambda x: x["patch"].transpose(1, 2), 1),
        (lambda x: x["layers"][0].transpose(1, 2), 1),
        (lambda x: x["attention"], 4),  # four patches for each
    ):
        coarse, fine = pick(own).unflatten(2, (4, 4)), share * pick(found).unflatten(2, (8, 8))
        torch.testing.assert_close(fine[..., 0, 0], coarse[..., 0, 0], atol=1e-6, rtol=1e-6)
        mixed = 0.75 * coarse[..., 0, 0] + 0.25 * coarse[..., 1, 0]
        torch.testing.assert_close(fine[..., 1, 0], mixed, atol=1e-5, rtol=1e-5)
    sums = [each["attention"].sum(-1) for each in (own, found)]
    torch.testing.assert_close(sums[1], sums[0], atol=1e-6, rtol=1e-6)
    normed = EncoderTarget.load(folder, finer)
    expected = normed.norm(found["patch"])  # resized before the norm
    torch.testing.assert_close(normed(IMAGES, "patch")["patch"], expected, atol=1e-5, rtol=1e-5)


def test_a_finer_teacher_is_averaged(tmp_path):
    folder = exported(tmp_path)
    coarse = tiny.spec(embed_dim=16, patch_size=8)
    found = EncoderTarget.load(folder, coarse)(IMAGES, "patch", "attention", norm=False)
    own = EncoderTarget.load(folder, SPEC)(IMAGES, "patch", "attention", norm=False)
    assert found["patch"].shape == (3, 4, 16)
    maps = own["patch"].transpose(1, 2).unflatten(2, (4, 4))
    how = {"mode": "bilinear", "align_corners": False, "antialias": True}
    expected = F.interpolate(maps, (2, 2), **how).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found["patch"], expected)
    sums = [each["attention"].sum(-1) for each in (own, found)]
    torch.testing.assert_close(
        sums[1], sums[0], atol=0.05, rtol=0.05
    )  # borders weigh a little more


def test_a_run_with_images_of_another_size(tmp_path):
    """Its positions are resized to the student's images."""
    folder = exported(tmp_path, "sincos", SPEC.at(24))
    teacher = EncoderTarget.load(folder, SPEC)
    assert teacher(IMAGES, "patch")["patch"].shape == (3, 16, 16)
    expected = encoders.load(folder, img_size=16).eval().forward_features(SPEC.normalise(IMAGES))
    torch.testing.assert_close(teacher(IMAGES, "patch")["patch"], expected[:, 1:])


@pytest.mark.parametrize(
    ("kind", "kw", "size"),
    [
        ("swin", {}, 64),
        ("convvit", {}, 32),
        ("vit", {"class_token": False, "global_pool": "avg", "fc_norm": False}, 32),
    ],
)
def test_encoders_without_a_class_token(tmp_path, kind, kw, size):
    """A student with the teacher's own grid, and one with a finer grid."""
    spec = tiny.spec(16, kind)
    folder = exported(tmp_path, spec=spec, **kw)
    student = tiny.spec(16, patch_size=2)
    teacher = Frozen(EncoderTarget.load(folder, student))
    assert teacher.sizes == {"patch": size} | ({"layers": size} if kind == "vit" else {})
    assert teacher(IMAGES, "patch")["patch"].shape == (3, 64, size)
    with pytest.raises(ValueError, match="^target: found .*patch, expected attention, cls$"):
        teacher(IMAGES, "cls", "attention")
    own = Frozen(EncoderTarget.load(folder, spec))(IMAGES, "patch")["patch"]
    model = encoders.load(folder).eval()
    expected = encoders.features(model, spec.normalise(IMAGES))["patch"]
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no exported encoder here"):
        EncoderTarget.load(tmp_path, SPEC)
    teacher = EncoderTarget.load(exported(tmp_path), SPEC)
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        teacher(IMAGES * 3, "patch")
