"""lenspipe: from galaxies and lens images to posteriors and a report. `snakemake --cores 2`."""

from snakemake.utils import min_version

min_version("9.0")

# --configfile FILE replaces the shipped settings; what FILE leaves out has its default
if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/config.yaml"


include: "workflow/rules/common.smk"


rule all:
    default_target: True
    input:
        "results/report/report.html",


include: "workflow/rules/survey.smk"
include: "workflow/rules/galaxies.smk"
include: "workflow/rules/vae.smk"
include: "workflow/rules/source.smk"
include: "workflow/rules/validation.smk"
include: "workflow/rules/deflection_table.smk"
include: "workflow/rules/mocks.smk"
include: "workflow/rules/catalogue.smk"
include: "workflow/rules/fit.smk"
include: "workflow/rules/summary.smk"
include: "workflow/rules/report.smk"
