"""The autoencoder trained."""


rule vae:
    input:
        "results/galaxies/galaxies.zarr/zarr.json",
    output:
        "results/vae/vae.safetensors",
        "results/vae/training.csv",
    log:
        "results/logs/vae.log",
    benchmark:
        "results/benchmarks/vae.tsv"
    conda:
        environment
    threads: 8
    resources:
        mem_mb=4000,
        runtime=720,
    params:
        settings=sections("vae"),
    shell:
        "python -m lenspipe vae --config {params.settings:q} > {log} 2>&1"
