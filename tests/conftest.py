"""Tiny settings for every test: `tiny_params` writes a complete params file that trains in a
second.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MIMLAB_TRACKING"] = "off"  # tests of tracking turn it on for themselves
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)

TINY = {
    "experiment": "tiny",
    "data": {"source": "shapes", "image_size": 16, "options": {"train": 48, "val": 16, "test": 16}},
    "model": {
        "name": "vit_tiny_patch16_224",
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
    },
    "train": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
    "targets": {"teacher": {"kind": "dino"}, "vqkd": {"kind": "vqkd", "upstream": "teacher"}},
    "methods": {
        "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
        "beitv2": {"min_block": 1},
        "random": {},
        "supervised": {},
    },
    "tasks": {
        "knn": {"k": [3]},
        "linear": {"epochs": 2},
        "finetune": {"epochs": 1, "batch_size": 16},
    },
    "grid": {
        "seeds": [0],
        "runs": {
            "mae": {"method": "mae"},
            "beitv2": {"method": "beitv2", "target": "vqkd"},
            "random": {"method": "random"},
            "supervised": {"method": "supervised"},
        },
    },
    "compute": {"device": "cpu", "workers": 0, "threads": 1, "tracking": False},
}


def tiny_content(**changes) -> dict:
    """A complete tiny params file as a dict. A change is a dotted key with __ for dots, or a whole
    section to merge into: `tiny_content(methods__mae__mask_ratio=0.5, train={"epochs": 2})`; None
    as a section's value stays None.
    """
    content = copy.deepcopy(TINY)
    for key, value in changes.items():
        *path, last = key.split("__")
        at = content
        for part in path:
            at = at.setdefault(part, {})
        if isinstance(value, dict) and isinstance(at.get(last), dict):
            at[last].update(value)
        else:
            at[last] = value
    return content


def write_params(folder: Path, content: dict) -> Path:
    """Write `content` as folder/params.yaml; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def tiny_params():
    """`tiny_params(tmp_path, **changes)` -> path of a written params.yaml; results belong into
    tmp_path / "results".
    """
    return lambda folder, **changes: write_params(Path(folder), tiny_content(**changes))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Two test processes on two cores: more threads would only wait for each other."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
