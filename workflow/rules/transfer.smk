rule transfer:
    input:
        transfer_inputs,
    output:
        f"{RESULTS}/transfer/{{run}}/{{task}}/manifest.json",
    log:
        f"{LOGS}/transfer/{{run}}/{{task}}.log",
    benchmark:
        f"{LOGS}/benchmarks/transfer/{{run}}/{{task}}.tsv"
    conda:
        "../envs/mimlab.yaml"
    threads: THREADS
    resources:
        gpu=lambda wildcards: training_gpus(f"transfer/{wildcards.run}/{wildcards.task}"),
        mem_mb=8000,
        runtime=1440,
    params:
        python=PYTHON,
        files=FILES,
    shell:
        "{params.python:q} -m stages.transfer --run {wildcards.run} --task {wildcards.task} {params.files:q} 2> {log:q}"
