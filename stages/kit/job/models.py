"""Encoders as MLflow's logged models, in the form that its registry takes and loads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from stages.kit.job.told import read


def log(client, experiment: str, run, note: dict, folder: Path) -> None:
    """Makes the encoder of a run a logged model: tasks give it scores, a person may register it.

    folder: timm's, as exported. It lies in the model alone, as it may be large. A note in MLflow's
    form, MLmodel, says how it is loaded (nets/served.py).
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    number = run.info.run_id
    if client.get_run(number).outputs.model_outputs:
        return  # that is said last, so all of it has arrived
    model = newest(client, experiment, note["tags"]["group"], number)
    if model is None:
        tags = {key: note["tags"][key] for key in ("group", "fingerprint") if key in note["tags"]}
        shown = {key: str(value)[:5000] for key, value in note["group"].get("params", {}).items()}
        model = client.create_logged_model(
            experiment, note["group"]["name"], number, tags, shown, model_type="encoder"
        )
    with tempfile.TemporaryDirectory() as beside:
        _described(model, read(folder / "config.json")).save(f"{beside}/MLmodel")
        client.log_model_artifacts(model.model_id, beside)
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(number, [LoggedModelOutput(model.model_id, 0)])


def _described(model, config: dict):
    """The MLmodel of an exported encoder, with the shapes of what goes in and comes out."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    shapes = config.get("pretrained_cfg", {}).get("input_size"), config.get("num_features")
    signature = None
    if all(shapes):
        ends = (-1, *shapes[0]), (-1, shapes[1])
        images, features = (Schema([TensorSpec(np.dtype(np.float32), end)]) for end in ends)
        signature = ModelSignature(images, features)
    made = Model(run_id=model.source_run_id, signature=signature, model_id=model.model_id)
    return made.add_flavor("python_function", loader_module="stages.kit.nets.served")


def newest(client, experiment: str, group: str, run: str | None = None):
    """The newest logged model of a group, or that of one run; None if there is none."""
    order = [{"field_name": "creation_time", "ascending": False}]
    where = f"tags.group = '{group}'" + (f" AND source_run_id = '{run}'" if run else "")
    found = client.search_logged_models([experiment], where, max_results=1, order_by=order)
    return found[0] if found else None
