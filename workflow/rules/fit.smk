"""MAP and posterior of every lens of one shard of the catalogue.

The store `shard-0000.zarr` beside the manifest is no output that Snakemake knows, which would remove it before a rerun: what
is in it and still stands is kept. `lenses.csv` has the hash of every lens: `zarr.json` may be the same where an image has
changed, and Snakemake goes by the contents of small files.
"""


rule fit:
    input:
        "results/catalogue/catalogue.zarr/zarr.json",
        "results/catalogue/lenses.csv",
        "results/source/source_prior.safetensors",
        table_inputs(),
    output:
        "results/fit/shard-{shard}.csv",
    log:
        "results/logs/fit-{shard}.log",
    benchmark:
        "results/benchmarks/fit-{shard}.tsv"
    localrule: fitted_elsewhere
    conda:
        environment
    threads: 1 if fitted_elsewhere else 8
    resources:
        mem_mb=lambda wildcards, threads: 1000 + 1300 * threads,
        runtime=720,
    params:
        settings=sections("lens", "priors", "deflection_table", "fit"),
    shell:
        "python -m lenspipe fit --shard {wildcards.shard} --workers {threads} "
        "--config {params.settings:q} > {log} 2>&1"
