"""The embedded synthetic galaxy survey, in the RealGalaxyCatalog layout."""


rule survey:
    output:
        "results/survey/provenance.json",
        "results/survey/real_galaxy_catalog_synthetic.fits",
    log:
        "results/logs/survey.log",
    benchmark:
        "results/benchmarks/survey.tsv"
    conda:
        environment
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        settings=sections("survey"),
    shell:
        "python -m lenspipe survey --config {params.settings:q} > {log} 2>&1"
