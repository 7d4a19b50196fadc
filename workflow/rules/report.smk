rule report:
    input:
        manifests("report"),
    output:
        manifest=f"{RESULTS}/report/manifest.json",
        page=report(
            f"{RESULTS}/report/index.html",
            caption="../report/index.rst",
            category="Report",
            labels={"what": "report"},
        ),
        summary=report(
            f"{RESULTS}/report/summary.md",
            caption="../report/summary.rst",
            category="Report",
            labels={"what": "table"},
        ),
        table=f"{RESULTS}/report/summary.csv",
    log:
        f"{LOGS}/report.log",
    benchmark:
        f"{LOGS}/benchmarks/report.tsv"
    conda:
        "../envs/mimlab.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        python=PYTHON,
        files=FILES,
    shell:
        "{params.python:q} -m stages.report {params.files:q} 2> {log:q}"
