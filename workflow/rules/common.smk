# The plan and what the rules share. No science here: params.yaml says what, workflow/plan how it hangs together.
import warnings
from pathlib import Path

from workflow import expected
from workflow.engines import exhibits
from workflow.engines.dvc import follow, record
from workflow.engines.limits import Limits
from workflow.engines.snakemake import own, reconcile
from workflow.machine import gpus, gpus_here, threads
from workflow.plan import load
from workflow.plan.kept import set_aside
from workflow.plan.owner import check
from workflow.plugins import ParamsError

PARAMS, RESULTS, PYTHON = config["params"], config["results"], sys.executable
LOGS = (Path(RESULTS).parent / "logs").as_posix()
DEFAULT = (PARAMS, RESULTS) == ("params.yaml", "results")
# The command of a job is the same under both engines; other files than the default ones are named.
FILES = [] if DEFAULT else [f"--params={PARAMS}", f"--results={RESULTS}"]
if set("{}") & set(RESULTS):  # Snakemake would take them for wildcards
    raise WorkflowError(f"results: found {RESULTS!r}, expected a name without braces")

# Snakemake runs its files without a name, and Python drops the warnings of code that has none.
__name__ = "Snakefile"
warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
try:
    plan = load(PARAMS, RESULTS)
    if workflow.is_main_process:
        check(plan)
except ParamsError as error:
    raise WorkflowError(str(error)) from None

limits = Limits(plan)
config["about"] = exhibits.about(plan)  # for workflow/report/workflow.rst
if workflow.is_main_process:
    OWNED = own(Path(".snakemake"))  # held until this process ends
    reconcile(plan)
    set_aside(plan)
    for text in plan.doubts():
        print(f"warning: {text}", file=sys.stderr)
    if DEFAULT:
        follow(plan)
    if workflow.nodes is not None:  # a cluster
        if plan.compute["device"] == "auto" and not gpus_here():
            warnings.warn(
                "no GPU here, so that jobs on the cluster get none; compute.device: cuda asks for them"
            )
        if unknown := limits.unknown():
            warnings.warn(
                f"the cost of {len(unknown)} jobs is not known, such as {unknown[0]}: they ask for the longest times; "
                f"python -m stages.cost --params {PARAMS} --results {RESULTS} --json {expected.file(plan)} tells it"
            )
    elif "gpu" not in workflow.global_resources:
        # Snakemake counts no GPUs by itself; --resources gpu=N lets jobs have fewer
        workflow.register_resource("gpu", max(1, gpus_here()))

# On a cluster Snakemake knows no number of cores (asking for it ends the run), nor for --report, --dag and the like; on
# a cluster the profile says how many a job gets.
CORES = None if workflow.nodes is not None else workflow.global_resources["_cores"].value
THREADS = threads(plan.compute["threads"], CORES or 4)


def training_gpus(id):
    """How many GPUs a job takes: one for each of its processes, if any."""
    return gpus(plan.compute["device"]) * plan.processes(id)


def asked(what, id):
    """A resource of the jobs of a rule: `what` the job takes that `id` names with its wildcards."""
    return lambda wildcards, attempt: what(id.format(**dict(wildcards.items())), attempt)


def shown(path, id):
    """An output that stands in Snakemake's report as the record of its job, by stage and method or task."""

    def job(wildcards):
        return id.format(**dict(wildcards.items()))

    return report(
        path,
        caption="../report/record.rst",
        category=exhibits.CATEGORIES[id.partition("/")[0]],
        subcategory=lambda wildcards: exhibits.subcategory(plan, job(wildcards)),
        labels=lambda wildcards: exhibits.labels(plan, job(wildcards)),
    )


wildcard_constraints:
    data=r"[a-z0-9][a-z0-9_-]*",
    target=r"[a-z0-9][a-z0-9_-]*",
    run=r"[a-z0-9][a-z0-9_-]*-s\d+",
    task=r"[a-z0-9][a-z0-9_-]*",


def manifests(id):
    """The manifests that a job of the plan reads."""
    if id not in plan.jobs:
        raise WorkflowError(f"{PARAMS} has no job {id!r}; `python -m workflow.plan` lists the jobs")
    return [plan.jobs[name].manifest for name in plan.jobs[id].inputs.values()]


def target_inputs(wildcards):
    return manifests(f"target/{wildcards.target}")


def pretrain_inputs(wildcards):
    return manifests(f"pretrain/{wildcards.run}")


def transfer_inputs(wildcards):
    return manifests(f"transfer/{wildcards.run}/{wildcards.task}")


def record_in_dvc():
    """dvc.lock follows what Snakemake made, so that `dvc status` is clean."""
    if str(config["dvc"]).lower() == "true" and DEFAULT:
        record(plan)
