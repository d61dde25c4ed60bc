"""Mock lenses made from test galaxies."""


rule mocks:
    input:
        mock_inputs(),
    output:
        "results/mocks/lenses.csv",
        "results/mocks/provenance.json",
    log:
        "results/logs/mocks.log",
    benchmark:
        "results/benchmarks/mocks.tsv"
    conda:
        environment
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        settings=sections("mocks", "lens", "priors", "deflection_table"),
    shell:
        "python -m lenspipe mocks --config {params.settings:q} > {log} 2>&1"
