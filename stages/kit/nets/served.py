"""An exported encoder as MLflow loads it, in the folder of the project:

encoder = mlflow.pyfunc.load_model("models:/NAME/1")
features = encoder.predict(images)
"""

from __future__ import annotations

import numpy as np
import torch

from stages.kit.nets import encoders


class Served:
    """The encoder of a timm folder, on the CPU."""

    def __init__(self, folder: str):
        self.encoder = encoders.load(folder).eval()
        shown = self.encoder.pretrained_cfg
        self.mean, self.std = (torch.tensor(shown[key])[:, None, None] for key in ("mean", "std"))

    @torch.inference_mode()
    def predict(self, images: np.ndarray, params: dict | None = None) -> np.ndarray:
        """(B,3,H,W) float in [0,1] -> (B,D) float32, pooled as timm does. params: unused."""
        seen = (torch.from_numpy(images) - self.mean) / self.std
        return self.encoder(seen).numpy()


def _load_pyfunc(path: str) -> Served:
    return Served(path)  # the name is MLflow's
