"""Linear probing of frozen features: many heads, one for each feature, normalisation and learning
rate, in one pass.

The head is MAE's (arXiv:2111.06377, facebookresearch/mae, main_linprobe.py): BatchNorm without
parameters (eps 1e-6) and a Linear with truncated normal weights (std 0.01) and no bias at first, D
* K + K parameters; beside it the plain Linear that DINO, iBOT and BEiT use. No weight decay; cosine
per step to 0; plain cross-entropy. All rates are trained at once on the same batches, as in DINOv2
(arXiv:2304.07193, eval/linear.py). BEiT v2 (arXiv:2208.06366) probes the class token of models with
patch aggregation and the mean patch of those without: both are swept, and reported beside the
better of them.

Departures. Features are extracted once (`passes` > 1: from that many random crops and flips, used
in turn) instead of anew in every epoch, which costs about 1-2 points at published sizes. SGD by
default, as MAE's LARS with its batch of 16384 is of no use on small sets (`optimizer: lars` gives
it, then choose rates of 0.1 to 30). Batches normalise by their own mean and variance in training as
in MAE, but in evaluation by those of all training features, of which MAE's running averages are an
estimate; below 64 images a batch they are used in training too. Feature, normalisation and rate are
chosen on the validation split (the papers choose on what they report), at the last epoch (MAE
reports the best one), then repeated for every head seed: reported is their mean on the test split.
The evaluation shows the whole centre square; officially the image is resized to 256 and cropped to
224 (`eval_crop: 0.875`). PUBLISHED is MAE's probe of ViT-B, with that crop.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

import torch

from stages.kit import dist, keyed
from stages.kit.train.lars import adapted
from stages.kit.train.schedule import warmup_cosine
from stages.tasks import Trial
from stages.tasks._classify import Labelled, accuracy, average, save, unseen
from stages.tasks._features import probed
from workflow import checks

HEADLINE = ("top1", "top-1 accuracy", "%")
NEEDS = {"labels"}
PUBLISHED = {
    "features": ["cls"],
    "norms": ["batchnorm"],
    "lrs": [6.4],
    "optimizer": "lars",
    "epochs": 90,
    "batch_size": 16384,
    "warmup": 0.1111,
    "crop_min": 0.08,
    "eval_crop": 0.875,
    "positions": "bicubic",
}
EPS = 1e-6  # of the BatchNorm
ON_DEVICE = 4 << 30  # bytes of features that a GPU holds as a whole; more are fetched by the batch


@dataclass(frozen=True)
class Config(checks.Evaluation):
    """features, norms, lrs: the sweep; lr is absolute, at the batch size; warmup: fraction of the
    steps; head_seeds: how often the chosen heads are trained, from other weights and in another
    order; passes: 1 = features of the evaluation transform, more = that many random crops (area
    from crop_min) and flips; precision: of the feature extraction; block: whose raw states are
    probed, 1 is the first; null: the last one's, after the final norm. SimMIM's authors probe the
    mean patch of the 8th of 12 blocks.
    """

    features: tuple[Literal["cls", "patch"], ...] = ("cls", "patch")
    norms: tuple[Literal["batchnorm", "none"], ...] = ("batchnorm", "none")
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    optimizer: Literal["sgd", "lars"] = "sgd"
    momentum: float = 0.9
    epochs: int = 100
    batch_size: int = 512
    warmup: float = 0.0
    head_seeds: int = 3
    passes: int = 1
    block: int | None = None
    crop_min: float = 0.5
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self):
        super().__post_init__()
        for name in ("features", "norms", "lrs"):
            if not getattr(self, name):
                raise ValueError(f"{name}: found [], expected at least one entry")
        checks.within(self, "(0, inf)", "lrs")
        checks.within(self, "[1, inf)", "epochs", "batch_size", "head_seeds", "passes", "block")
        checks.within(self, "[0, 1)", "momentum", "warmup")
        checks.within(self, "(0, 1]", "crop_min")


@dataclass(frozen=True)
class Head:
    """One point of the sweep."""

    feature: str
    norm: str
    lr: float

    def __str__(self) -> str:
        return f"{self.feature}/{self.norm}/lr={self.lr:g}"


@dataclass
class Stack:
    """Heads of one feature and norm; H heads, K classes, width D."""

    heads: list[Head]
    weight: torch.Tensor  # (H, K, D)
    bias: torch.Tensor  # (H, K)
    mean: torch.Tensor | None  # (D,), of the training features; None without BatchNorm
    var: torch.Tensor | None
    memory: list[torch.Tensor] = field(default_factory=list)  # momentum of weight and bias

    def whiten(self, x: torch.Tensor, own: bool = False) -> torch.Tensor:
        """(B, D) as the Linear sees it; own: normalised by the batch's own statistics."""
        if self.mean is None:
            return x
        x, var = x - self.mean, self.var
        if own:
            # products with a row of 1 / B: torch's reduction over the first dimension is 20 times
            # slower
            share = x.new_full((1, len(x)), 1 / len(x))
            mean = share @ x
            x, var = x.sub_(mean), (share @ (x * x)).clamp_min_(0)
        return x.mul_((var + EPS).rsqrt())

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Whitened (B, D) -> (H, K, B) by one product; images last, for a fast softmax over K."""
        flat = torch.addmm(self.bias.view(-1, 1), self.weight.flatten(0, 1), x.T)
        return flat.unflatten(0, self.bias.shape)


def train(
    tables: dict[str, torch.Tensor],
    labels: torch.Tensor,
    heads: list[Head],
    classes: int,
    config: Config,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[Stack]:
    """Trains all heads on the same batches; a pure function of its arguments.

    tables: features (P, N, D) by name, P passes; labels (N,) in 0..classes-1. The gradient of
    softmax cross-entropy is written out, (p - onehot) x / B: one product forward and one backward
    serve every head.
    """
    images = len(labels)
    batch = min(config.batch_size, images)
    steps = images // batch
    own = batch >= 64
    stacks = []
    for feature, norm in dict.fromkeys((head.feature, head.norm) for head in heads):
        same = [head for head in heads if (head.feature, head.norm) == (feature, norm)]
        width = tables[feature].shape[-1]
        start = torch.empty(classes, width)
        torch.nn.init.trunc_normal_(start, std=0.01, generator=keyed.generator(seed, "head"))
        weight = start.expand(len(same), -1, -1).to(device, copy=True).contiguous()
        bias = torch.zeros(len(same), classes, device=device)
        mean = var = None
        if norm == "batchnorm":
            mean, var = (x.to(device) for x in statistics(tables[feature]))
        memory = [torch.zeros_like(weight), torch.zeros_like(bias)]
        stacks.append(Stack(same, weight, bias, mean, var, memory))
    rates = [torch.tensor([head.lr for head in stack.heads], device=device) for stack in stacks]
    total, warm = config.epochs * steps, round(config.warmup * config.epochs * steps)
    for epoch in range(config.epochs):
        order = keyed.permutation(images, seed, "order", epoch)
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            target = (labels[rows] == torch.arange(classes)[:, None]).to(device, torch.float32)
            x = {
                name: rows_of(table[epoch % len(table)], rows).to(device)
                for name, table in tables.items()
            }
            now = warmup_cosine(epoch * steps + step, total, warm, 1.0)
            for stack, rate in zip(stacks, rates, strict=True):
                update(
                    stack, stack.whiten(x[stack.heads[0].feature], own), target, rate * now, config
                )
    return stacks


def update(
    stack: Stack, x: torch.Tensor, target: torch.Tensor, rate: torch.Tensor, config: Config
) -> None:
    """One step of every head in the stack: whitened x (B, D), one-hot target (K, B), rate (H,)."""
    slope = stack.logits(x).softmax(1)
    slope.sub_(target).div_(len(x))
    weight = (slope.flatten(0, 1) @ x).view_as(stack.weight)
    if config.optimizer == "lars":
        weight = adapted(stack.weight, weight)
    values = ((stack.weight, weight), (stack.bias, slope.sum(2)))
    for (value, gradient), memory in zip(values, stack.memory, strict=True):
        memory.mul_(config.momentum).add_(gradient)
        value.sub_(memory * rate.view(-1, *[1] * (value.ndim - 1)))


def rows_of(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a table, on the table's device."""
    return table.index_select(0, rows.to(table.device))


def statistics(table: torch.Tensor, chunk: int = 65536) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance (D,) of features (P, N, D), in float64 over chunks, returned in
    float32.
    """
    count = total = square = 0
    shift = table[0, :1].cpu().double()  # near the mean, so that the squares do not cancel
    for values in table:
        for part in values.split(chunk):
            part = part.cpu().double() - shift
            count, total, square = (
                count + len(part),
                total + part.sum(0),
                square + part.square().sum(0),
            )
    mean = total / count
    return (mean + shift[0]).float(), (square / count - mean.square()).clamp_min(0).float()


def scores(
    stacks: list[Stack], tables: dict[str, torch.Tensor], rows: torch.Tensor, chunk: int = 2048
) -> dict[Head, torch.Tensor]:
    """Class scores (n, K) of every head for the rows of features (N, D); on the CPU."""
    found = {head: [] for stack in stacks for head in stack.heads}
    for stack in stacks:
        table = tables[stack.heads[0].feature]
        for part in rows.split(chunk):
            logits = stack.logits(stack.whiten(rows_of(table, part).to(stack.weight.device))).cpu()
            for number, head in enumerate(stack.heads):
                found[head].append(logits[number].T)
    return {head: torch.cat(parts) for head, parts in found.items()}


@torch.no_grad()
def run(trial: Trial) -> dict:
    """Mean over head seeds on test of the head that val chose, and of the best of each feature.

    "val" has every validation accuracy (None where a head diverged). Writes scores.npz. Under
    torchrun the first process does it all; the others return {}.
    """
    if not dist.is_main():
        return {}
    config, device, images = trial.config, trial.run.device, Labelled(trial)
    rows, labels = images.rows, images.labels
    if (count := len(labels["train"])) < 2:
        raise trial.error(f"needs 2 or more labelled training images, found {count}")

    def features(split: str, augment=None) -> dict[str, torch.Tensor]:
        fit = {"crop": config.eval_crop, "positions": config.positions}
        how = {"precision": config.precision, "augment": augment, **fit}
        every = probed(trial, split, config.block, **how)
        return {name: every[name] for name in config.features}

    def fit(heads: list[Head], number: int) -> list[Stack]:
        base = keyed.key(trial.seed, "linear", number)
        return train(tables, labels["train"], heads, trial.spec.num_classes, config, base, device)

    if config.passes == 1:
        tables = {name: values[None] for name, values in features("train").items()}
    else:
        tables = features("train", (config.passes, config.crop_min, trial.seed))
    if count < next(iter(tables.values())).shape[1]:
        tables = {name: values[:, rows["train"]] for name, values in tables.items()}
    if sum(values.nbytes for values in tables.values()) < ON_DEVICE:
        tables = {name: values.to(device) for name, values in tables.items()}
    sweep = [Head(*point) for point in itertools.product(config.features, config.norms, config.lrs)]
    stacks = fit(sweep, 1)
    val = {}
    for head, each in scores(stacks, features("val"), rows["val"]).items():
        val[head] = accuracy(each, labels["val"])["top1"] if each.isfinite().all() else None
    best = chosen_on(val, config)
    if not best:
        raise trial.error(
            f"every head diverged at rates {list(config.lrs)}, expected one that does not: "
            "add lower ones",
            "lrs",
        )

    chosen = list(dict.fromkeys(best.values()))
    trained = [stacks, *(fit(chosen, number) for number in range(2, config.head_seeds + 1))]
    test = features("test")  # its one reading: every choice is made
    outcome = [scores(keep(each, chosen), test, rows["test"]) for each in trained]
    result = {head: [accuracy(each[head], labels["test"]) for each in outcome] for head in chosen}
    top = best[""]
    save(trial, images, torch.stack([each[top].argmax(1) for each in outcome]))
    top1 = torch.tensor([each["top1"] for each in result[top]], dtype=torch.float64)
    metrics = {
        **average(result[top]),
        "top1_seeds": top1.tolist(),
        "top1_sd": top1.std().item() if len(top1) > 1 else None,
        "n_test": len(labels["test"]),
        "protocol": "linear probe",
        "split": "test",
        "feature": top.feature,
        "block": config.block,
        "norm": top.norm,
        "lr": top.lr,
        "optimizer": config.optimizer,
        "epochs": config.epochs,
        "batch_size": min(config.batch_size, count),
        "passes": config.passes,
        "seed": trial.seed,
        "head_seeds": config.head_seeds,
        "precision": config.precision,
        "head": "Linear, {1} x {0} + {0} parameters".format(*stacks[0].weight.shape[1:]),
        "classes_unseen": unseen(trial, images),
        "val": {str(head): value for head, value in val.items()},
    }
    for name, head in best.items():
        if name:
            metrics[f"{name}_top1"] = average(result[head])["top1"]
            metrics |= {f"{name}_norm": head.norm, f"{name}_lr": head.lr}
    return metrics


def chosen_on(val: dict[Head, float | None], config: Config) -> dict[str, Head]:
    """{"": the best head on validation, "cls": the best of that feature, ...}; {} if all diverged.

    Of equal heads the first one is taken, which has the lower rate as the sweep is written.
    """
    alive = [head for head, value in val.items() if value is not None]
    if not alive:
        return {}
    best = {"": max(alive, key=val.get)}
    for name in config.features:
        if mine := [head for head in alive if head.feature == name]:
            best[name] = max(mine, key=val.get)
    return best


def keep(stacks: list[Stack], heads: list[Head]) -> list[Stack]:
    """The stacks with these heads alone."""
    found = []
    for stack in stacks:
        if at := [number for number, head in enumerate(stack.heads) if head in heads]:
            some = [stack.heads[number] for number in at]
            found.append(Stack(some, stack.weight[at], stack.bias[at], stack.mean, stack.var))
    return found
