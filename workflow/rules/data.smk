rule data:
    input:
        "stages/data.py",
    output:
        f"{RESULTS}/data/{{data}}/manifest.json",
    log:
        f"{LOGS}/data/{{data}}.log",
    benchmark:
        f"{LOGS}/benchmarks/data/{{data}}.tsv"
    conda:
        "../envs/mimlab.yaml"
    threads: 2
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        python=PYTHON,
        files=FILES,
    shell:
        "{params.python:q} -m stages.data --name {wildcards.data} {params.files:q} 2> {log:q}"
