# Two commands on a fresh machine: `make run` and `make test`. Each makes its own .venv.
PYTHON ?= python3
BIN := .venv/bin
SNAKEMAKE = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake

.PHONY: run test test-all lint report clean

# A killed run leaves Snakemake's lock behind; it is taken away where no Snakemake runs on this machine.
run: .venv/installed
	@if [ -n "$$(ls .snakemake/locks 2>/dev/null)" ] && command -v pgrep >/dev/null && ! pgrep -f '[b]in/snakemake' >/dev/null; \
	then $(BIN)/python -m snakemake --cores 1 --unlock; fi
	$(SNAKEMAKE) --profile workflow/profiles/local
	@echo "report: $(CURDIR)/results/report/report.html"

test: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m "not statistical and not cluster"

test-all: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow
	$(SNAKEMAKE) --lint

report: .venv/installed
	$(SNAKEMAKE) --profile workflow/profiles/local results/report/report.html --forcerun report

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lenspipe needs Python 3.11 or later; try make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,cluster]"
	touch $@

clean:
	find results -mindepth 1 ! -name README.md -delete
	rm -rf .snakemake
