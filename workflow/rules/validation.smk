"""The source tried on galaxies that it was not made from."""


rule validation:
    input:
        source_inputs(),
        "results/source/source_prior.safetensors",
        "results/galaxies/galaxies.zarr/zarr.json",
    output:
        "results/validation/provenance.json",
    log:
        "results/logs/validation.log",
    benchmark:
        "results/benchmarks/validation.tsv"
    conda:
        environment
    threads: 8
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        settings=sections("validation"),
    shell:
        "python -m lenspipe validation --config {params.settings:q} > {log} 2>&1"
