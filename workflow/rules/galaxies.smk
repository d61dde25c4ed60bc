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
    resources:
        mem_mb=2000,
        runtime=120,
    params:
        settings=sections("galaxies"),
    shell:
        "python -m lenspipe galaxies --config {params.settings:q} > {log} 2>&1"
