rule report:
    input:
        manifests("report"),
    output:
        manifest=f"{RESULTS}/report/manifest.json",
        page=report(
            f"{RESULTS}/report/index.html",
            caption="../report/index.rst",
            category=exhibits.CATEGORIES["report"],
            subcategory="page",
            labels=exhibits.labelled("page"),
        ),
        summary=report(
            f"{RESULTS}/report/summary.md",
            caption="../report/summary.rst",
            category=exhibits.CATEGORIES["report"],
            subcategory="page",
            labels=exhibits.labelled("table"),
        ),
        table=f"{RESULTS}/report/summary.csv",
        exhibits=[
            report(
                each.path.as_posix(),
                caption=f"../report/{each.caption}.rst",
                category=each.category,
                subcategory=each.subcategory,
                labels=each.labels,
            )
            for each in exhibits.exhibits(plan)
        ],
    log:
        f"{LOGS}/report.log",
    benchmark:
        f"{LOGS}/benchmarks/report.tsv"
    conda:
        "../envs/mimlab.yaml"
    threads: 1
    resources:
        mem_mb=asked(limits.memory, "report"),
        runtime=asked(limits.minutes, "report"),
    params:
        python=PYTHON,
        files=FILES,
    shell:
        "{params.python:q} -m stages.report {params.files:q} 2> {log:q}"
