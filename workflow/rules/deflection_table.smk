"""Deflections of the elliptical power law on the unit circle."""


rule deflection_table:
    output:
        "results/deflection_table/deflection_table.safetensors",
    log:
        "results/logs/deflection_table.log",
    benchmark:
        "results/benchmarks/deflection_table.tsv"
    conda:
        environment
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        settings=sections("deflection_table"),
    shell:
        "python -m lenspipe deflection_table --config {params.settings:q} > {log} 2>&1"
