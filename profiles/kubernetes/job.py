"""Submits a job of Snakemake to Kubernetes, tells its state, cancels it; by kubectl.

python job.py submit --image IMAGE --claim CLAIM --mount PATH ... SCRIPT    prints the job's name
python job.py status NAME                                                   running, success, failed
python job.py cancel NAME ...
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import uuid

GRACE_S = 120  # from SIGTERM to SIGKILL: a job writes its checkpoint meanwhile
KEPT_S = 86400  # for which a finished job can be looked at


def manifest(args: argparse.Namespace, name: str) -> dict:
    """The Kubernetes Job that runs a script of Snakemake's on the volume of the project."""
    size = {"cpu": str(args.cpus), "memory": f"{args.memory}M"}
    gpus = {"nvidia.com/gpu": str(args.gpus)} if args.gpus else {}
    container = {
        "name": "job",
        "image": args.image,
        "command": ["/bin/bash", args.script],
        "workingDir": os.getcwd(),
        "resources": {"requests": size | gpus, "limits": {"memory": size["memory"]} | gpus},
        "volumeMounts": [
            {"name": "lab", "mountPath": args.mount},
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # of several processes
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "containers": [container],
        "volumes": [
            {"name": "lab", "persistentVolumeClaim": {"claimName": args.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    labels = {"app": "mimlab", "rule": args.rule}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "backoffLimit": 0,  # Snakemake itself starts a job again, with more memory and time
            "activeDeadlineSeconds": 60 * args.minutes,
            "ttlSecondsAfterFinished": KEPT_S,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def submit(args: argparse.Namespace) -> int:
    name = f"mimlab-{args.rule}-{uuid.uuid4().hex[:12]}"
    text = json.dumps(manifest(args, name))
    done = subprocess.run(["kubectl", "create", "-f", "-"], input=text, text=True, stdout=2)
    if not done.returncode:
        print(name)
    return done.returncode


def status(args: argparse.Namespace) -> int:
    """A question without an answer is no answer: the job counts as running."""
    asked = ["kubectl", "get", "job", args.names[0], "-o", "json", "--ignore-not-found"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
    found = json.loads(done.stdout.strip() or "{}") if not done.returncode else {"status": {}}
    ends = {
        c["type"] for c in found.get("status", {}).get("conditions", ()) if c["status"] == "True"
    }
    gone = not found  # somebody deleted it
    print("success" if "Complete" in ends else "failed" if gone or "Failed" in ends else "running")
    return 0


def cancel(args: argparse.Namespace) -> int:
    asked = ["kubectl", "delete", "job", "--ignore-not-found", "--wait=false", *args.names]
    return subprocess.run(asked, stdout=2).returncode


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("submit")
    one.set_defaults(work=submit)
    for name in ("image", "claim", "mount", "rule"):
        one.add_argument(f"--{name}", required=True)
    for name in ("cpus", "memory", "minutes", "gpus"):
        one.add_argument(f"--{name}", required=True, type=int)
    one.add_argument("script")
    for work in (status, cancel):
        other = commands.add_parser(work.__name__)
        other.set_defaults(work=work)
        other.add_argument("names", nargs="+")
    args = parser.parse_args(argv)
    return args.work(args)


if __name__ == "__main__":
    sys.exit(main())
