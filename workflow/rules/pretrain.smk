rule pretrain:
    input:
        pretrain_inputs,
    output:
        shown(f"{RESULTS}/pretrain/{{run}}/manifest.json", "pretrain/{run}"),
    log:
        f"{LOGS}/pretrain/{{run}}.log",
    benchmark:
        f"{LOGS}/benchmarks/pretrain/{{run}}.tsv"
    priority: 10
    conda:
        "../envs/mimlab.yaml"
    threads: THREADS
    resources:
        gpu=lambda wildcards: training_gpus(f"pretrain/{wildcards.run}"),
        mem_mb=asked(limits.memory, "pretrain/{run}"),
        runtime=asked(limits.minutes, "pretrain/{run}"),
    params:
        python=PYTHON,
        files=FILES,
    shell:
        "{params.python:q} -m stages.pretrain --run {wildcards.run} {params.files:q} 2> {log:q}"
