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
    threads: 8
    resources:
        mem_mb=lambda wildcards, threads: 1000 + 700 * threads,
        runtime=60,
    params:
        settings=sections("summary"),
    shell:
        "python -m lenspipe summary --workers {threads} --config {params.settings:q} > {log} 2>&1"
