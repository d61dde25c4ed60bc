"""One row a lens, with flags."""


rule summary:
    input:
        "results/catalogue/lenses.csv",
        expand("results/fit/shard-{shard}.csv", shard=shards),
    output:
        "results/summary/lenses.csv",
        "results/summary/lenses.fits",
        "results/summary/lenses.parquet",
    log:
        "results/logs/summary.log",
    benchmark:
        "results/benchmarks/summary.tsv"
    conda:
        environment
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        settings=sections("summary"),
    shell:
        "python -m lenspipe summary --config {params.settings:q} > {log} 2>&1"
