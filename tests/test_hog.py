"""HOG as DMJD's official code computes it (arXiv 2301.00230): golden and independent numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stages.kit.nets.patches import normalise_patches, patchify
from stages.kit.parts import hog
from stages.targets import hog as target
from stages.targets import pixels
from tests import tiny


def spec(size=32, patch=16):
    return tiny.spec(size, patch_size=patch)


def patches(made, images: torch.Tensor) -> torch.Tensor:
    return made(images, "patch")["patch"]


def pictures(batch=3, size=32, seed=0):
    """8-bit images on a scale of 0..255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, size, size), generator=generator).float()


def reference(image: np.ndarray, cell: int, bins: int = 9) -> np.ndarray:
    """One channel (H,W) -> (H/cell,W/cell,bins), pixel by pixel in float64 with degrees."""
    height, width = image.shape
    out = np.zeros((height // cell, width // cell, bins))
    for y in range(height):
        for x in range(width):
            down = image[y + 1, x] - image[y - 1, x] if 0 < y < height - 1 else 0.0
            along = image[y, x + 1] - image[y, x - 1] if 0 < x < width - 1 else 0.0
            angle = math.degrees(math.atan2(down, along)) % 180.0
            out[y // cell, x // cell, int(angle // (180 / bins)) % bins] += math.hypot(down, along)
    return out / cell**2


@pytest.mark.parametrize(
    ("formula", "place", "value"),
    [
        (lambda row, column: column, 0, 2.0),
        (lambda row, column: row, 4, 2.0),
        (lambda row, column: row + column, 2, math.sqrt(8)),
        (lambda row, column: row - column, 6, math.sqrt(8)),
        (lambda row, column: -column, 0, 2.0),
        (lambda row, column: -row, 4, 2.0),
        (lambda row, column: -row - column, 2, math.sqrt(8)),
        (lambda row, column: column - row, 6, math.sqrt(8)),
    ],
)
def test_golden_vectors(formula, place, value):
    """Ramps: all of a cell away from the border is in one bin, with the undivided difference; signs
    do not count.
    """
    row, column = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    found = hog.hog((formula(row, column) + 100).expand(1, 3, 24, 24), 8)[0, :, 1, 1]
    expected = torch.zeros(3, 9)
    expected[:, place] = value
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("cell", "bins"), [(8, 9), (4, 9), (2, 6), (16, 9)])
def test_against_a_pixel_by_pixel_calculation(cell, bins):
    images = pictures(2, 16)
    images[1] = torch.arange(16.0).view(
        1, 16, 1
    )  # exact angles of 0 and 90 degrees, and flat borders
    found = hog.hog(images, cell, bins)
    assert found.shape == (2, 3, 16 // cell, 16 // cell, bins)
    expected = [
        [reference(channel.double().numpy(), cell, bins) for channel in image] for image in images
    ]
    np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bins", [4, 6, 8, 9, 11, 12, 18, 22, 36])
def test_an_angle_on_a_border_opens_the_next_bin(bins):
    """Multiples of 45 degrees of every sign and length: bin floor(bins * quarters / 4), also where
    float32 rounds down.
    """
    for down, along, quarters in ((0, 1, 0), (1, 1, 1), (1, 0, 2), (1, -1, 3)):
        for length in (*range(1, 8), 60, -1, -7, -60):
            row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
            image = (down * row + along * column) * length
            found = hog.hog(image.expand(1, 1, 12, 12), 4, bins)[
                0, 0, 1, 1
            ]  # 16 pixels: vectorised as large images are
            assert found.nonzero().flatten().tolist() == [bins * quarters // 4], (
                down,
                along,
                length,
            )


def test_borders_have_no_gradient_of_their_own():
    """On the first and last row only differences along the columns count, and vice versa."""
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 1, 3] = image[0, 0, 4, 1] = 64.0
    found = hog.hog(image, 1)[0, 0]
    assert found[0, 3].sum() == 0  # the bright pixel below it is no neighbour that counts
    assert found[4, 0].sum() == 0
    assert found[2, 3, 4] == 64
    assert found[4, 2, 0] == 64


def test_8_bit_images_come_through_the_unit_scale_unharmed():
    """(k / 255) * 255 == k in float32: an angle of 0 must not become one of 179.99 degrees."""
    values = torch.arange(256.0)
    assert torch.equal(values / 255 * 255, values)
    made = target.Target(target.Config(), spec())
    expected = hog.to_tokens(hog.whiten(hog.hog(pictures(), 8)), 2)
    assert torch.equal(patches(made, pictures() / 255), expected)


def test_batches_do_not_matter(monkeypatch):
    images = pictures(7)
    whole = hog.hog(images, 8)
    assert torch.equal(hog.hog(images[4:5], 8)[0], whole[4])
    monkeypatch.setattr(hog, "WORKING_SET", 2 * images[0].numel())
    assert torch.equal(hog.hog(images, 8), whole)


def test_sums_are_exact_in_any_order():
    """Magnitudes of 8-bit images have so few bits that float64 adds them without rounding."""
    down, along = np.meshgrid(np.arange(-255, 256), np.arange(-255, 256))
    magnitudes = np.sqrt((down**2 + along**2).astype(np.float32)).astype(np.float64)
    scaled = magnitudes * 2.0**23
    assert (scaled == np.round(scaled)).all()
    assert scaled.max() * 32**2 < 2.0**53  # cells of up to 32 pixels


def test_whitened_histograms_have_mean_0_and_variance_1():
    images = pictures(2, 32)
    images[0, :, :8, :8] = 7.0  # a flat cell, except for the pixels beside the others
    images[0, :, 8:16, :16] = images[0, :, :16, 8:16] = 7.0
    found = hog.whiten(hog.hog(images, 8)).double()
    flat = hog.hog(images, 8).sum(-1) == 0
    assert flat.sum() == 3
    assert (found[flat] == 0).all()
    assert found[~flat].mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(
        found[~flat].var(-1, correction=0),
        torch.ones(int((~flat).sum()), dtype=torch.float64),
        atol=1e-4,
        rtol=0,
    )
    raw = hog.hog(images, 8).double()[1, 2, 3, 0]
    expected = (raw - raw.mean()) / (raw.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(found[1, 2, 3, 0], expected, atol=1e-5, rtol=1e-5)


def test_layout_with_one_textured_cell():
    """Patch (1,0), in it cell (0,1), channel 2: cell row, cell column, bin, channel, the channel
    fastest.
    """
    images = torch.full((1, 3, 32, 32), 100.0)
    images[0, 2, 16 + 3, 8 + 3 : 8 + 5] = (
        180.0  # away from the cell's border: its neighbours stay flat
    )
    tokens = hog.to_tokens(hog.hog(images, 8), 2)
    assert tokens.shape == (1, 4, 108)
    places = tokens[0].nonzero()
    assert set(places[:, 0].tolist()) == {2}
    index = places[:, 1]
    assert set((index // 54).tolist()) == {0}  # cell row
    assert set((index // 27 % 2).tolist()) == {1}  # cell column
    assert set((index % 3).tolist()) == {2}  # channel
    assert set((index // 3 % 9).tolist()) == {0, 4}  # steps along rows and columns


def test_tokens_go_back_to_their_cells():
    histograms = hog.hog(pictures(), 4)
    assert torch.equal(hog.from_tokens(hog.to_tokens(histograms, 2), 2), histograms)
    assert torch.equal(hog.from_tokens(hog.to_tokens(histograms, 1), 1), histograms)


def test_cells_must_divide():
    with pytest.raises(ValueError, match="cells of 5 pixels do not divide an image of 32x32"):
        hog.hog(pictures(), 5)


def test_strokes_lie_along_edges():
    """A gradient along the columns (bin 0) is an edge that runs down, and is drawn so; that of bin
    4 lies across.
    """
    histograms = torch.zeros(1, 3, 1, 2, 9)
    histograms[0, 0, 0, 0, 0] = histograms[0, 0, 0, 1, 4] = 2.0
    histograms[0, 1] = -1.0
    drawn = hog.strokes(histograms, 9)
    assert drawn.shape == (1, 3, 9, 18)
    upright, level = drawn[0, 0].split(9, dim=1)
    assert upright[:, 4].min() > 0.2 and upright[4, :2].max() == 0
    assert level[4].min() > 0.2 and level[:2, 4].max() == 0
    assert drawn.max() == 1 and drawn[:, 1:].abs().max() == 0


# --- the target plug-ins --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "cell", "dim"), [(16, 8, 108), (8, 4, 108), (4, 4, 27), (14, 7, 108), (7, 7, 27)]
)
def test_default_cells(patch, cell, dim):
    made = target.Target(target.Config(), spec(patch * 2, patch))
    assert (made.cell, made.sizes) == (cell, {"patch": dim})
    assert patches(made, torch.rand(2, 3, patch * 2, patch * 2)).shape == (2, 4, dim)


def test_hog_target_has_nothing_to_train_or_save():
    made = target.Target(target.Config(), spec())
    assert not list(made.parameters())
    assert not made.state_dict()
    assert target.Target(target.Config(cell=2), spec(16, 4)).sizes == {"patch": 108}


@pytest.mark.parametrize(("values", "key"), [({"cell": 0}, "cell"), ({"bins": 1}, "bins")])
def test_bad_hog_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        target.Config(**values)


def test_hog_cells_must_fit_the_patch():
    target.Config(cell=2).check(32, tiny.model(patch_size=8))
    swin = tiny.model("swin", patch_size=2, depth=(1, 1, 1), num_heads=(1, 2, 4))
    target.Config(cell=8).check(32, swin)  # its last patches have 8 pixels
    with pytest.raises(
        ValueError, match="^cell: 3 pixels do not divide the student's patches of 8"
    ):
        target.Config(cell=3).check(32, tiny.model(patch_size=8))


def test_flat_images_are_refused():
    for module in (target, pixels):
        made = module.Target(module.Config(), spec())
        assert module.health(made, iter([torch.full((4, 3, 32, 32), 0.3)]), module.Config())[
            "problems"
        ]
        assert not module.health(made, iter([pictures() / 255]), module.Config())["problems"]


def test_pixels_are_maes_targets():
    images = pictures() / 255
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec().mean, spec().std))
    normalised = (images.double() - mean) / std
    expected = normalise_patches(patchify(normalised, 16))
    found = patches(pixels.Target(pixels.Config(), spec()), images)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    plain = pixels.Target(pixels.Config(norm_pix=False), spec())
    expected = patchify(normalised, 16)
    torch.testing.assert_close(patches(plain, images).double(), expected, atol=1e-5, rtol=1e-5)
    assert plain.sizes == {"patch": 768}


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pixels_render_the_image_from_its_own_target(norm_pix):
    images = pictures() / 255
    made = pixels.Target(pixels.Config(norm_pix=norm_pix), spec())
    drawn = made.render(patches(made, images), images)
    torch.testing.assert_close(drawn, images, atol=1e-5, rtol=1e-5)
