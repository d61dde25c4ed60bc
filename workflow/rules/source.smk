"""The autoencoder trained, and the source prior made from it."""


rule source:
    input:
        "results/galaxies/galaxies.zarr/zarr.json",
    output:
        "results/source/source_prior.safetensors",
        "results/source/training.csv",
    log:
        "results/logs/source.log",
    benchmark:
        "results/benchmarks/source.tsv"
    conda:
        environment
    threads: 8
    resources:
        mem_mb=4000,
        runtime=720,
    params:
        settings=sections("source"),
    shell:
        "python -m lenspipe source --config {params.settings:q} > {log} 2>&1"
