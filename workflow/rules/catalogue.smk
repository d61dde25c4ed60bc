"""Mocks and observed lenses in one format, each one checked."""


rule catalogue:
    input:
        catalogue_inputs(),
    output:
        "results/catalogue/catalogue.zarr/zarr.json",
        "results/catalogue/lenses.csv",
    log:
        "results/logs/catalogue.log",
    benchmark:
        "results/benchmarks/catalogue.tsv"
    conda:
        environment
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        settings=sections("catalogue", "mocks", lens={"psf_supersampling"}),
        files=files_of_tables,
    shell:
        "python -m lenspipe catalogue --config {params.settings:q} > {log} 2>&1"
