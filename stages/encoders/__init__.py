"""Families of encoders, one file each; the file's name is the `kind` of an entry under `models`.

A family has: a docstring, `CAN` (what its encoders can do), `NAMES` (a regular expression of the
timm models that are of it) and `CLASSES` (what timm calls them), a dataclass `Config` (the settings
of an entry under `models`), and functions that stages/kit/nets/encoders.py calls for everybody:

    create(spec, style, *, drop_path=0.0, layer_scale=None, **kw) -> the encoder, a timm model
    visible(encoder, images, ids, ...)    where it CAN "drop"
    masked(encoder, images, mask, ...)    where it CAN "mask"
    attention(encoder, images)            where it CAN "attention"
    fusion(encoder)                       optional: modules that pretraining adds and nobody exports
    resized(args, size)                   optional: arguments of timm for images of another size
    start(encoder, init)                  optional: other weights of style "beit" than the published

Abilities in `CAN`:

    "drop"        hidden patches can be dropped before the first layer
    "mask"        hidden patches can be replaced by a mask token
    "cls"         it has a class token
    "taps"        it gives the states after its blocks
    "attention"   each token may see every other, which gives one map of all tokens
    "sizes"       images of several sizes in one training (style "timm" or "sincos")
    "plain"       one width, any patch size: a tokenizer's decoder can be built from it

`style` is what a method asks for: "timm" (timm's own initial weights), "sincos" (MAE's), "beit"
(BEiT's relative positions and weights). A family that has one kind of encoder gives that one.
"""
