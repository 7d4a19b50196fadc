"""What a Config may use: checks of its settings, and the settings that many plug-ins share.

The plan reads every Config without torch, so this file needs nothing but Python. A check raises
ValueError as "key: found ..., expected ...". A Config inherits what it shares with others:

    @dataclass(frozen=True)
    class Config(checks.Optimiser, checks.Crop, checks.Decoder):
        mask_ratio: float = 0.75
        lr: float = 1.5e-3  # another default than the mixin's

        def __post_init__(self):
            super().__post_init__()  # the mixins check their own settings
            checks.within(self, "(0, 1)", "mask_ratio")
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil, inf
from typing import Any, Literal

# Beyond reason: no encoder is so wide, so deep, or sees so large an image.
MOST_WIDTH, MOST_DEPTH, MOST_PIXELS = 2**16, 1000, 4096

# What a self-distillation needs at least by its centring, see SelfDistillation.doubt
LEAST_STEPS, IMAGES_PER_PROTOTYPE = {"centre": 2500, "sinkhorn": 200}, 20

# --- settings that are shared -------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The base of the mixins: each checks its own settings, then those of the next."""

    def __post_init__(self):
        pass


@dataclass(frozen=True)
class Optimiser(Settings):
    """How a training optimises; kit/train/recipe.py reads every one of these."""

    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = 1e-3  # peak, for batches of lr_per images
    lr_per: int | None = None  # images; None: lr is not scaled by the batch
    min_lr: float = 0.0  # at the end of the cosine
    # shares of the steps at which a constant rate falls to a tenth
    lr_drops: tuple[float, ...] = ()
    warmup: float = 0.05  # share of the steps
    warmup_from: float = 0.0  # share of lr at which it begins
    # whose official code counts the steps of the rate, see kit/train/schedule.py
    schedule: Literal["mae", "beit", "simmim"] = "mae"
    weight_decay: float = 0.05
    weight_decay_end: float | None = None  # reached as a cosine; None: constant
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    eps: float = 1e-8  # of AdamW
    sgd_momentum: float = 0.9  # of SGD and LARS
    clip: float | None = None  # largest norm of the gradient
    clip_mode: Literal["global", "tensor"] = "global"  # one norm of all, or each tensor's own

    def __post_init__(self):
        super().__post_init__()
        within(self, "(0, inf)", "lr", "eps", most=1000)
        within(self, "[1, inf)", "lr_per")
        within(self, "[0, inf)", "min_lr", "weight_decay", "weight_decay_end", most=1000)
        within(self, "[0, inf)", "clip")
        within(self, "[0, 1)", "warmup", "warmup_from", "betas", "sgd_momentum")
        within(self, "(0, 1)", "lr_drops")


@dataclass(frozen=True)
class Crop(Settings):
    """One random resized crop of an image, perhaps mirrored."""

    crop_min: float = 0.2  # smallest share of the image's area in a crop
    flip: float = 0.5  # probability

    def __post_init__(self):
        super().__post_init__()
        within(self, "(0, 1]", "crop_min")
        within(self, "[0, 1]", "flip")


@dataclass(frozen=True)
class SizedCrop(Crop):
    """A crop of a size of its own. The encoder is built for it; tasks resize its positions."""

    input_size: int | None = None  # side in pixels; None: image_size of the data

    def __post_init__(self):
        super().__post_init__()
        within(self, "[4, inf)", "input_size", most=MOST_PIXELS)


@dataclass(frozen=True)
class Evaluation(Settings):
    """What of an image a task's evaluation shows, and how the encoder is fitted to its size."""

    # middle share of the centre square's side; papers resize to 256 pixels for crops of 224: 0.875
    eval_crop: float = 1.0
    # how tables of positions are resized, if they must be: by timm, or as officially, see
    # kit/nets/positions.py
    positions: Literal["timm", "bicubic", "dino"] = "timm"

    def __post_init__(self):
        super().__post_init__()
        within(self, "(0, 1]", "eval_crop")


@dataclass(frozen=True)
class Decoder(Settings):
    """The transformer decoder of masked autoencoders (kit/nets/decoder.py)."""

    decoder_dim: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4

    def __post_init__(self):
        super().__post_init__()
        within(self, "[1, inf)", "decoder_dim", "decoder_heads", most=MOST_WIDTH)
        within(self, "[1, inf)", "decoder_depth", most=MOST_DEPTH)
        quarters(self, "decoder_dim")
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_heads: found {self.decoder_heads}, expected a divisor of decoder_dim "
                f"{self.decoder_dim}"
            )


@dataclass(frozen=True)
class PaintedImages(Optimiser, SizedCrop, Decoder):
    """FastMIM's painted squares, decoder and targets (kit/parts/fastmim.py), and its optimiser."""

    # at each place: MaskFeat's histograms of oriented gradients, or the pixels
    predict: Literal["hog", "pixels"] = "hog"
    norm: bool = True  # histograms at length 1; the pixels of a place at mean 0 and variance 1
    mask_ratio: float = 0.75  # share of the squares that is painted
    block: int | None = None  # side of a square in pixels; None: of a token that comes out
    # side of a histogram's cell in pixels; None: 8, as published, where tokens have 16 or more,
    # else 4; a whole token where that does not divide it
    cell: int | None = None
    discard: int = 0  # last blocks of the encoder that pretraining leaves out, as they were drawn
    crop_min: float = 0.4
    decoder_depth: int = 1
    lr_per: int | None = 512
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        super().__post_init__()
        within(self, "(0, 1)", "mask_ratio")
        within(self, "[1, inf)", "block", "cell", most=MOST_PIXELS)
        within(self, "[0, inf)", "discard", most=MOST_DEPTH)

    def side(self, model) -> int:
        """Side of a painted square."""
        return self.block or model.stride

    def cell_side(self, model) -> int:
        """Side of a square for which there is one error: a histogram's cell, or a whole token."""
        if self.predict == "pixels":
            return model.stride
        usual = 8 if model.stride >= 16 else 4
        return self.cell or (model.stride if model.stride % usual else usual)

    def check(self, image_size: int, model) -> None:
        block, cell, stride = self.side(model), self.cell_side(model), model.stride
        if stride % cell:
            raise ValueError(f"cell: found {cell}, expected a divisor of a token's {stride} pixels")
        if image_size % block or block % cell or (block % stride and stride % block):
            whole = "a token's" if self.predict == "pixels" else "a cell's"
            raise ValueError(
                f"block: found {block} pixels, expected a divisor of image_size {image_size} and a "
                f"multiple of {whole} {cell}, which divides a token's {stride} or is its multiple"
            )
        keep_count((image_size // block) ** 2, self.mask_ratio, "blocks")
        last = model.depth if isinstance(model.depth, int) else model.depth[-1]
        if self.discard >= last:
            raise ValueError(
                f"discard: found {self.discard}, expected less than the {last} blocks of "
                f"{'model.depth' if isinstance(model.depth, int) else 'the last stage'}"
            )
        if "sincos" in model.styles:
            sincos(model)


@dataclass(frozen=True)
class BeitStart(Settings):
    """How an encoder of style "beit" starts (stages/encoders/vit.py); a Swin starts as its own."""

    # of its blocks and patch embedding: as published, made for a width of 768; MAE's; or as
    # published with 0.02 * sqrt(768 / width) in the place of 0.02
    init: Literal["published", "xavier", "width"] = "xavier"
    layer_scale: float = 0.1  # of a ViT

    def __post_init__(self):
        super().__post_init__()
        within(self, "[0, inf)", "layer_scale", most=1000)


@dataclass(frozen=True)
class BeitEncoder(BeitStart):
    """How it starts, and how its tables of relative positions are trained; a Swin's, too."""

    rel_pos_rate: float = 20.0  # factor of their learning rate
    rel_pos_decay: bool = False  # whether they are decayed

    def __post_init__(self):
        super().__post_init__()
        within(self, "[0, inf)", "rel_pos_rate", most=1000)


@dataclass(frozen=True)
class UnitMasks(Settings):
    """Random squares of pixels, larger than patches, that are hidden (SimMIM's masks)."""

    mask_ratio: float = 0.6  # share of the units that is hidden, rounded up
    mask_unit: int | None = None  # side of a unit in pixels; None: a quarter of the image's

    def __post_init__(self):
        super().__post_init__()
        within(self, "(0, 1)", "mask_ratio")
        within(self, "[1, inf)", "mask_unit")

    def unit(self, image_size: int) -> int:
        """Side of a mask unit in pixels."""
        return image_size // 4 if self.mask_unit is None else self.mask_unit

    def check(self, image_size: int, model) -> None:
        unit, patch = self.unit(image_size), model.patch_size
        if unit < 1 or image_size % unit or unit % patch:
            raise ValueError(
                f"mask_unit: found {unit} pixels, expected a multiple of model.patch_size {patch} "
                f"that divides image_size {image_size}"
            )
        unit_count((image_size // unit) ** 2, self.mask_ratio)


@dataclass(frozen=True)
class TokenPrediction(Optimiser, Crop, BeitEncoder):
    """BEiT's student, which predicts a tokenizer's codes of hidden patches (kit/parts/beit.py)."""

    mask_ratio: float = 0.39  # share of the patches that is hidden: 25 of 64
    min_block: int = 4  # patches in the smallest block
    drop_path: float = 0.0
    jitter: float = 0.4  # of brightness, contrast and saturation
    min_lr: float = 1e-5
    clip: float | None = 3.0

    def __post_init__(self):
        super().__post_init__()
        within(self, "(0, 1)", "mask_ratio")
        within(self, "[1, inf)", "min_block")
        within(self, "[0, inf)", "jitter", most=1000)
        within(self, "[0, 1)", "drop_path")

    def check(self, image_size: int, model) -> None:
        count = hidden_count(model.grid(image_size) ** 2, self.mask_ratio)
        if self.min_block > count:
            raise ValueError(
                f"min_block: found {self.min_block}, expected at most the {count} hidden patches"
            )


@dataclass(frozen=True)
class Codes(Settings):
    """A tokenizer's codes, and when they are not fit to be predicted (kit/parts/codes.py)."""

    codes: int = 512
    min_usage: float = 0.2  # of the codes, over the validation images; below, the stage fails
    min_perplexity: float = 0.05  # as a share of the codes
    gate: bool = True  # codes no better than chance (kit/parts/tokens.py) fail the stage

    def __post_init__(self):
        super().__post_init__()
        within(self, "[2, inf)", "codes")
        within(self, "[0, 1]", "min_usage", "min_perplexity")


@dataclass(frozen=True)
class Parts(Settings):
    """Parts of an image as codes of its patches, and when they are none (kit/parts/segments.py)."""

    min_parts: float = 1.5  # perplexity of the parts over all patches; below, the stage fails
    min_in_image: float = 1.2  # mean perplexity of the parts of an image
    gate: bool = True  # parts no better than chance (kit/parts/tokens.py) fail the stage

    def __post_init__(self):
        super().__post_init__()
        within(self, "[0, inf)", "min_parts", "min_in_image", most=10**7)


@dataclass(frozen=True)
class LearntCodes(Codes):
    """Codes that are moved while their tokenizer trains (kit/parts/quantize.py)."""

    code_dim: int = 16
    decay: float = 0.99  # of the codes' moving average
    kmeans: bool = True  # start from k-means of the first vectors
    kmeans_after: float = 0.2  # share of the training before k-means, without quantisation
    vectors_per_code: int = 10  # that k-means waits for
    reseed: int = 0  # steps without a hit after which a code restarts; 0: never, as published

    def __post_init__(self):
        super().__post_init__()
        within(self, "[2, inf)", "code_dim")
        within(self, "[1, inf)", "vectors_per_code")
        within(self, "[0, inf)", "reseed")
        within(self, "[0, 1)", "decay")
        within(self, "[0, 1]", "kmeans_after")


@dataclass(frozen=True)
class SelfDistillation(Optimiser):
    """DINO's student, teacher, head and crops (kit/parts/selfdistil.py), and its optimiser.

    Where defaults differ from the papers' they are those of the short trainings that learned most,
    by docs/results-dino.md: 600 to 1,500 steps of 32 images of 32 pixels. Longer trainings can have
    more prototypes and a higher momentum.
    """

    prototypes: int = 256
    hidden: int = 512  # width of the head
    bottleneck: int = 128  # width before the prototypes
    norm_last: bool = True  # the last layer's gains stay at 1
    freeze_last_layer: float = 1.0  # epochs in which the last layer rests
    student_temp: float = 0.1
    teacher_temp: float = 0.03
    teacher_temp_end: float | None = None  # reached linearly; None: constant
    teacher_temp_warmup: float = 0.1  # share of the training until teacher_temp_end
    # against one prototype for all: a running mean, or DINOv2's Sinkhorn-Knopp over each batch,
    # which then cannot be cut into micro batches
    centring: Literal["centre", "sinkhorn"] = "sinkhorn"
    centre_momentum: float = 0.9
    # of the teacher; rises to 1 as a cosine. Trainings of many steps need a higher one
    momentum: float = 0.95
    drop_path: float = 0.0  # of the student
    n_local: int = 6  # local crops
    local_size: float = 0.5  # side of a local crop, share of the image's, rounded to whole patches
    global_scale: tuple[float, float] = (0.4, 1.0)  # share of the area
    local_scale: tuple[float, float] = (0.1, 0.4)
    flip: float = 0.5
    # of brightness, contrast, saturation, hue
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grey: float = 0.2
    solarise: float = 0.2  # of the second global view
    # in the first global view always, in a tenth of the second ones, in half of the local ones;
    # never below 64 pixels
    blur: bool = True
    # least mutual information of prototypes and images, as a share of ln(prototypes); a training
    # that stays below it for long is stopped
    min_information: float = 0.01
    lr: float = 2e-3
    min_lr: float = 1e-6
    warmup: float = 0.15
    weight_decay: float = 0.04
    weight_decay_end: float | None = 0.4
    clip: float | None = 3.0
    clip_mode: Literal["global", "tensor"] = "tensor"

    def doubt(self, steps: int, batch_size: int) -> str | None:
        """Why a training of so many steps will hardly learn, if it hardly will.

        docs/results.md and docs/results-dino.md have the trainings behind these numbers. With a
        centre, 256 to 2,048 prototypes and batches of 32, those of up to 2,040 steps gained little
        over the untrained encoder, one of 5,610 did; with Sinkhorn one of 225 did and no shorter
        one was tried. The largest number of prototypes for which somebody reports success had 29
        images each (65,536 prototypes, 14,800 steps of 128).
        """
        enough, shared = LEAST_STEPS[self.centring], IMAGES_PER_PROTOTYPE * self.prototypes
        least = max(enough, ceil(shared / batch_size))
        if steps >= least:
            return None
        fewer = ["fewer prototypes"] if least > enough else []
        helps = self.centring == "centre" and steps * batch_size >= shared
        other = ["centring: sinkhorn"] if helps and steps >= LEAST_STEPS["sinkhorn"] else []
        return (
            f"{steps:,} steps of {batch_size} images for {self.prototypes:,} prototypes; such "
            f"teachers are not known to learn much below about {least:,} steps: use "
            f"{' or '.join([*fewer, *other, 'more epochs'])}"
        )

    @property
    def views_per_image(self) -> float:
        """Crops that a step learns from, in areas of a large one; effective epochs count them."""
        return 2 + self.n_local * self.local_size**2

    def __post_init__(self):
        super().__post_init__()
        within(self, "[2, inf)", "prototypes", most=10**7)
        within(self, "[1, inf)", "hidden", "bottleneck", most=MOST_WIDTH)
        within(self, "[0, inf)", "n_local", "jitter", most=100)
        within(self, "[0, inf)", "freeze_last_layer")
        within(self, "(0, inf)", "student_temp", "teacher_temp", "teacher_temp_end")
        within(self, "[0, 1]", "centre_momentum", "momentum", "min_information", "drop_path")
        within(self, "[0, 1]", "teacher_temp_warmup", "flip", "jitter_p", "grey", "solarise")
        within(self, "(0, 1]", "local_size")
        spans(self, "global_scale", "local_scale")


@dataclass(frozen=True)
class MaskedSelfDistillation(SelfDistillation):
    """Self-distillation that hides patches of the global views, as iBOT (kit/parts/ibot.py)."""

    mask_share: float = 0.5  # of the global views that are masked, on average
    mask_ratio: tuple[float, float] = (0.1, 0.5)  # of the patches of those views, uniform in it
    cls_weight: float = 1.0  # of the loss between class tokens, DINO's
    # of the loss at hidden patches, published 1, which drowns the other in short trainings
    # (docs/results-attmask.md)
    patch_weight: float = 0.1
    shared_head: bool = True  # False: patches have prototypes of their own
    patch_temp_end: float | None = None  # for patches, which also start at teacher_temp

    def __post_init__(self):
        super().__post_init__()
        within(self, "[0, 1]", "mask_share")
        within(self, "[0, inf)", "cls_weight", "patch_weight")
        within(self, "(0, inf)", "patch_temp_end")
        spans(self, "mask_ratio")

    def check(self, image_size: int, model) -> None:
        patches = model.grid(image_size) ** 2
        if int(patches * self.mask_ratio[1]) < 1:
            raise ValueError(
                f"mask_ratio: {self.mask_ratio[1]} of {patches} patches never hides one"
            )


@dataclass(frozen=True)
class MomentumContrast(Optimiser, Crop):
    """MoCo v3's queries, keys and views (kit/parts/contrast.py), and its optimiser.

    Where defaults differ from the paper's they are for short trainings on small images.
    """

    hidden: int = 512  # width of projector and predictor
    dim: int = 128  # of queries and keys
    temperature: float = 0.2
    # of the keys; rises to 1 as a cosine. Trainings of many steps need a higher one
    momentum: float = 0.95
    freeze_patches: bool = True  # the patch projection stays as it was drawn
    # of brightness, contrast, saturation, hue
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grey: float = 0.2
    solarise: float = 0.2  # of the second view
    blur: bool = True  # the first view always, a tenth of the second ones; never below 64 pixels
    # least that queries must tell of their keys, as a share of ln(batch size); a training that
    # stays below it for long is stopped
    min_information: float = 0.01
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.1

    @property
    def views_per_image(self) -> float:
        """Crops that a step learns from."""
        return 2.0

    def check(self, image_size: int, model) -> None:
        sincos(model)

    def __post_init__(self):
        super().__post_init__()
        within(self, "[1, inf)", "hidden", "dim", most=MOST_WIDTH)
        within(self, "(0, inf)", "temperature", most=1000)
        within(self, "[0, 1]", "momentum", "min_information", "jitter_p", "grey", "solarise")
        within(self, "[0, inf)", "jitter", most=100)


@dataclass(frozen=True)
class Encoder(Settings):
    """Sizes of an encoder of square images, as the files of stages/encoders extend them.

    A family adds `depth` and `num_heads`, whose form is its own.
    """

    name: str = "vit_tiny_patch16_224"  # a timm model; the other settings set its sizes
    patch_size: int = 16  # side in pixels
    embed_dim: int = 192  # width
    mlp_ratio: float = 4.0
    args: dict[str, Any] = field(default_factory=dict)  # more arguments for timm.create_model

    def __post_init__(self):
        super().__post_init__()
        within(self, "[1, inf)", "patch_size", most=MOST_PIXELS)
        within(self, "[1, inf)", "embed_dim", most=MOST_WIDTH)
        within(self, "(0, inf)", "mlp_ratio", most=100)

    @property
    def styles(self) -> tuple[str, ...]:
        """What `encoders.create` may be asked for."""
        return ("timm", "sincos", "beit")

    @property
    def stride(self) -> int:
        """Side in pixels of a token that the encoder gives."""
        return self.patch_size

    def grid(self, image_size: int) -> int:
        """Tokens along a side that the encoder gives for images of `image_size` pixels."""
        return image_size // self.stride

    @property
    def follow(self) -> tuple[str, ...]:
        """Settings that grow and shrink with the images."""
        return ()

    def at(self, image_size: int, other: int) -> Encoder:
        """The same for images of `other` pixels, if this is for images of `image_size`."""
        found = {key: scaled(getattr(self, key), image_size, other) for key in self.follow}
        return replace(self, **found) if found else self

    def check(self, image_size: int) -> None:
        """ValueError unless there can be such an encoder for images of `image_size` pixels."""
        if image_size % self.stride:
            raise ValueError(
                f"patch_size: found {self.patch_size}, which makes tokens of {self.stride} pixels, "
                f"expected a divisor of image_size {image_size}"
            )


def scaled(number: int, old: int, new: int) -> int:
    """number * new / old, or the number where that is not whole."""
    found, rest = divmod(number * new, old)
    return found if found and not rest else number


# --- checks of single settings ------------------------------------------------------------------


def within(config, interval: str, *keys: str, most: float = 1e9) -> None:
    """Each of the settings `keys` is a number in `interval`, such as "(0, 1]" or "[1, inf)".

    Every entry of a list counts. None is always allowed. `most` ends an interval that has no end:
    what is beyond reason.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for key in keys:
        found = getattr(config, key)
        for number in found if isinstance(found, list | tuple) else [found]:
            if number is None:
                continue
            above = number > low or (interval[0] == "[" and number == low)
            below = number < high or (interval[-1] == "]" and number == high)
            if not (above and below):
                raise ValueError(f"{key}: found {found}, expected {_words(interval, low, high)}")
            if number > most:
                raise ValueError(f"{key}: found {found}, expected at most {most:,.0f}")


def _words(interval: str, low: float, high: float) -> str:
    if high < inf:
        return f"a number in {interval}"
    return f"{low:g} or more" if interval[0] == "[" else f"a number above {low:g}"


def spans(config, *keys: str) -> None:
    """Each of the settings `keys` is a pair (low, high) of shares with 0 < low <= high <= 1."""
    for key in keys:
        low, high = getattr(config, key)
        if not 0 < low <= high <= 1:
            raise ValueError(f"{key}: found {low}, {high}, expected 0 < low <= high <= 1")


def quarters(config, key: str) -> None:
    """The setting `key` is a width that sin-cos positions can have."""
    if getattr(config, key) % 4:
        raise ValueError(
            f"{key}: found {getattr(config, key)}, expected a multiple of 4 (for sin-cos positions)"
        )


def sincos(model: Encoder) -> None:
    """An encoder of this model can have sin-cos positions."""
    if model.embed_dim % 4:
        raise ValueError(
            f"model.embed_dim: found {model.embed_dim}, expected a multiple of 4 (for sin-cos "
            "positions)"
        )


def keep_count(patches: int, ratio: float, what: str = "patches") -> int:
    """Patches that stay visible: patches * (1 - ratio) cut to an integer, exact for the decimal
    `ratio`.

    In floats 10 * (1 - 0.9) is 0.9999..., which would keep nothing. At least one patch must stay
    visible and one be hidden; `what` names them in the message.
    """
    keep = int(patches * (1 - Fraction(str(ratio))))
    _both(patches, ratio, patches - keep, what)
    return keep


def unit_count(units: int, ratio: float) -> int:
    """Mask units to hide: units * ratio rounded up, exact for the decimal `ratio` (SimMIM, arXiv
    2111.09886); not all.
    """
    count = ceil(units * Fraction(str(ratio)))
    _both(units, ratio, count, "units")
    return count


def hidden_count(patches: int, ratio: float) -> int:
    """Patches to hide: patches * ratio rounded to the nearest; at least one, and not all."""
    count = round(patches * ratio)
    _both(patches, ratio, count)
    return count


def _both(patches: int, ratio: float, hidden: int, what: str = "patches") -> None:
    if not (0 < ratio < 1 and 0 < hidden < patches):
        raise ValueError(
            f"mask_ratio: found {ratio}, which hides {hidden} of {patches} {what}, expected at "
            "least one hidden and one visible"
        )
