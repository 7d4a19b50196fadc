"""Masked-image-modelling methods, one file each; the file's name is its kind in params.yaml.

A method module has: a docstring (paper, idea, every departure), a frozen dataclass `Config`,
`PUBLISHED` (the paper's recipe), `TARGET` (what it needs of its target), `NEEDS` (of its encoder),
`LABELS`, `TRAINS`, `views(config, spec)` and `class Method(nn.Module)`. docs/adding-a-method.md
tells how to write one; the tests sweep this folder.
"""
