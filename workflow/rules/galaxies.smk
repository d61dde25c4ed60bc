"""Galaxies read, cut and split."""


rule galaxies:
    input:
        galaxy_inputs(),
    output:
        "results/galaxies/galaxies.zarr/zarr.json",
        "results/galaxies/cuts.csv",
    log:
        "results/logs/galaxies.log",
    benchmark:
        "results/benchmarks/galaxies.tsv"
    conda:
        environment
    threads: 8
    resources:
        mem_mb=lambda wildcards, threads: 400 + 200 * threads,
        runtime=120,
    params:
        settings=sections("galaxies"),
    shell:
        "python -m lenspipe galaxies --workers {threads} --config {params.settings:q} > {log} 2>&1"
