rule transfer:
    input:
        transfer_inputs,
    output:
        shown(f"{RESULTS}/transfer/{{run}}/{{task}}/manifest.json", "transfer/{run}/{task}"),
    log:
        f"{LOGS}/transfer/{{run}}/{{task}}.log",
    benchmark:
        f"{LOGS}/benchmarks/transfer/{{run}}/{{task}}.tsv"
    conda:
        "../envs/mimlab.yaml"
    threads: THREADS
    resources:
        gpu=lambda wildcards: training_gpus(f"transfer/{wildcards.run}/{wildcards.task}"),
        mem_mb=asked(limits.memory, "transfer/{run}/{task}"),
        runtime=asked(limits.minutes, "transfer/{run}/{task}"),
    params:
        python=PYTHON,
        files=FILES,
    shell:
        "{params.python:q} -m stages.transfer --run {wildcards.run} --task {wildcards.task} {params.files:q} 2> {log:q}"
