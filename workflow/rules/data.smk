rule data:
    input:
        "stages/data.py",
    output:
        shown(f"{RESULTS}/data/{{data}}/manifest.json", "data/{data}"),
    log:
        f"{LOGS}/data/{{data}}.log",
    benchmark:
        f"{LOGS}/benchmarks/data/{{data}}.tsv"
    conda:
        "../envs/mimlab.yaml"
    threads: 2
    resources:
        mem_mb=asked(limits.memory, "data/{data}"),
        runtime=asked(limits.minutes, "data/{data}"),
    params:
        python=PYTHON,
        files=FILES,
    shell:
        "{params.python:q} -m stages.data --name {wildcards.data} {params.files:q} 2> {log:q}"
