"""Where MLflow's page shows something: addresses that start at the page of an experiment."""

from __future__ import annotations

from urllib.parse import quote

# MLflow's page has a switch between language models and training, and this sets it.
KIND = "workflowType=machine_learning"
VIEW = "mimlab"


def search(where: str) -> str:
    """The runs that a filter finds."""
    return f"runs?{KIND}&searchFilter={quote(where)}"


def job(fingerprint: str) -> str:
    """A job's run. It is searched for, since runs may be deleted and delivered again."""
    return search(f"tags.fingerprint = '{fingerprint}'")


def rows() -> str:
    """A row for each pretraining, with scores and cost (kit/job/rows.py)."""
    return f"runs?{KIND}&viewStateShareKey={VIEW}"
