rule target:
    input:
        target_inputs,
    output:
        shown(f"{RESULTS}/target/{{target}}/manifest.json", "target/{target}"),
    log:
        f"{LOGS}/target/{{target}}.log",
    benchmark:
        f"{LOGS}/benchmarks/target/{{target}}.tsv"
    priority: 20
    conda:
        "../envs/mimlab.yaml"
    threads: THREADS
    resources:
        gpu=lambda wildcards: training_gpus(f"target/{wildcards.target}"),
        mem_mb=asked(limits.memory, "target/{target}"),
        runtime=asked(limits.minutes, "target/{target}"),
    params:
        python=PYTHON,
        files=FILES,
    shell:
        "{params.python:q} -m stages.target --name {wildcards.target} {params.files:q} 2> {log:q}"
