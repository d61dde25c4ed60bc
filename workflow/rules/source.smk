"""The source prior that inference loads."""


rule source:
    input:
        source_inputs(),
    output:
        "results/source/source_prior.safetensors",
    log:
        "results/logs/source.log",
    benchmark:
        "results/benchmarks/source.tsv"
    conda:
        environment
    threads: 8
    resources:
        mem_mb=4000,
        runtime=120,
    params:
        settings=sections("source"),
    shell:
        "python -m lenspipe source --config {params.settings:q} > {log} 2>&1"
