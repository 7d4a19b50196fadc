# mimlab: from params.yaml to pretrained backbones and a report. `snakemake --cores all`
#   --config params=FILE results=FOLDER   another params file, another results folder
#   --config dvc=false                    do not record the results in dvc.lock afterwards
import os
import shlex
import sys

from snakemake.utils import min_version, validate

min_version("9.0")
sys.path.insert(0, workflow.basedir)

if not os.path.samefile(workflow.basedir, os.curdir):
    raise WorkflowError(
        f"found the working directory {os.getcwd()}, expected that of the Snakefile: add "
        f"--directory {shlex.quote(str(workflow.basedir))}"
    )

validate(config, "workflow/schemas/config.schema.json")


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/target.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/transfer.smk"
include: "workflow/rules/report.smk"


report: "workflow/report/workflow.rst"


localrules:
    all,


rule all:
    input:
        [path for job in plan.jobs.values() for path in job.files],


onsuccess:
    record_in_dvc()
