"""The page of the run."""


rule report:
    input:
        report_inputs(),
        "results/source/source_prior.safetensors",
        table_inputs(),
        "results/summary/lenses.csv",
    output:
        "results/report/report.html",
    log:
        "results/logs/report.log",
    benchmark:
        "results/benchmarks/report.tsv"
    conda:
        environment
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        settings=sections("report"),
    shell:
        "python -m lenspipe report --config {params.settings:q} > {log} 2>&1"
