"""MaskFeat's HOG without its window, as FastMIM predicts it: golden vectors and an independent
calculation, pixel by pixel.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stages.kit.parts import maskfeat
from stages.kit.parts.maskfeat import BINS, from_tokens, hog, to_tokens


def ramp(down: float, along: float, size: int = 32) -> torch.Tensor:
    """An image whose value is down * row + along * column."""
    place = torch.arange(size, dtype=torch.float32)
    return (down * place[:, None] + along * place).expand(1, 3, -1, -1).clone()


def noise(rows=2, size=16, seed=0):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("down", "along", "expected"), [(0, 1, 4), (1, 0, 0), (1, 1, 2), (1, -1, 6)]
)
def test_golden_ramps(down, along, expected):
    """Of the official layer: all of an interior cell is in one bin."""
    found = hog(ramp(down, along), 8).unflatten(1, (3, BINS))[..., 1:-1, 1:-1]
    wanted = torch.zeros(BINS)
    wanted[expected] = 1
    assert torch.allclose(found, wanted.view(1, 1, BINS, 1, 1).expand_as(found), atol=1e-6)


def by_hand(image: np.ndarray, cell: int) -> np.ndarray:
    """(H,W) -> (9, H/cell, W/cell): sums of magnitudes, in float64."""
    padded = np.pad(image, 1, mode="reflect")
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    found = np.zeros((BINS, image.shape[0] // cell, image.shape[1] // cell))
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            window = padded[y : y + 3, x : x + 3]
            gx, gy = (window * kernel).sum(), (window * kernel.T).sum()
            bin = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
            found[bin, y // cell, x // cell] += math.hypot(gx, gy)
    return found


@pytest.mark.parametrize("norm", [True, False])
def test_it_is_the_calculation_pixel_by_pixel(norm):
    """Of whole numbers, so that nothing is rounded before the bins."""
    images = (noise() * 40).round()
    found = hog(images, 4, norm).unflatten(1, (3, BINS)).double().numpy()
    for b in range(2):
        for c in range(3):
            expected = by_hand(images[b, c].double().numpy(), 4)
            if norm:
                expected = expected / np.linalg.norm(expected, axis=0)
            np.testing.assert_allclose(found[b, c], expected, rtol=1e-5, atol=1e-6)


def test_histograms_have_length_one_or_are_zero():
    images = noise()
    images[0, 1] = 0.25  # a flat channel
    lengths = hog(images, 4).unflatten(1, (3, BINS)).norm(dim=2)
    assert torch.equal(lengths[0, 1], torch.zeros(4, 4))
    lengths[0, 1] = 1
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)


def test_brightness_contrast_and_sign():
    images = (noise() * 40).round()
    found = hog(images, 4)
    torch.testing.assert_close(hog(images + 7, 4), found)
    torch.testing.assert_close(hog(images * 4, 4), found)
    # unsigned: of the negative the same, but for gradients on a bin's edge, such as the border's
    inside = (..., slice(1, -1), slice(1, -1))
    smooth = noise() * 40 + 1e-3 * noise(seed=1)
    torch.testing.assert_close(hog(-smooth, 4)[inside], hog(smooth, 4)[inside], atol=1e-4, rtol=0)


def test_on_the_border_horizontal_gradients_are_exactly_zero():
    """Reflected neighbours are one pixel, so the edge's gradients lie at the beginning of bin 0."""
    found = hog(noise(), 1, norm=False).unflatten(1, (3, BINS))
    for column in (0, -1):
        assert (found[..., 1:, 1:-1, column] == 0).all()
        assert (found[..., 0, 1:-1, column] > 0).all()


def test_no_gradient_and_float32_under_autocast():
    images = noise().requires_grad_()
    assert not hog(images, 4).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hog(images, 4), hog(images.detach(), 4))


def test_tokens_are_channel_then_cell_row_then_cell_column():
    maps = hog(noise(), 4)  # (2,27,4,4): 2 x 2 places of 2 x 2 cells
    tokens = to_tokens(maps, 2)
    assert tokens.shape == (2, 4, 108)
    for place, channel, row, column in ((0, 0, 0, 0), (1, 5, 1, 0), (2, 26, 0, 1), (3, 13, 1, 1)):
        y, x = place // 2 * 2 + row, place % 2 * 2 + column
        index = channel * 4 + row * 2 + column
        assert torch.equal(tokens[:, place, index], maps[:, channel, y, x])
    assert torch.equal(from_tokens(tokens, 2), maps)


def test_a_ramp_in_one_cell_lights_the_components_of_that_cell():
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 8:16, 16:24] = ramp(0, 1)[:, :, :8, :8] * torch.ones(1, 3, 1, 1)
    tokens = to_tokens(hog(images, 8, norm=False), 2).view(4, 3, BINS, 2, 2)
    place, row, column = 1, 1, 0  # rows 8..15 and columns 16..23 of 32
    assert (tokens[place, :, 4, row, column] > 0).all()
    assert tokens[place, :, 4, row, column].argmax() < 3 and not tokens[2].any()


def test_cells_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="cells of 5 pixels do not divide an image of 16x16"):
        hog(noise(), 5)


def test_strokes_lie_along_the_edges():
    """Brightness that changes along the columns makes upright strokes, and the other way round."""
    for down, along in ((0, 1), (1, 0)):
        drawn = maskfeat.strokes(hog(ramp(down, along), 8), 8)[0, 0, 8:16, 8:16]
        upright, level = drawn[:, 3:5].sum(), drawn[3:5].sum()
        assert (upright > 2 * level) if along else (level > 2 * upright)
