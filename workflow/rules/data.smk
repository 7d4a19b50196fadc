rule data:
    input:
        "stages/data.py",
    output:
        f"{RESULTS}/data/manifest.json",
    log:
        f"{LOGS}/data.log",
    benchmark:
        f"{LOGS}/benchmarks/data.tsv"
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
        "{params.python} -m stages.data {params.files} 2> {log}"
