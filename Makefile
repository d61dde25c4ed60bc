# Two commands on a fresh machine: `make run` and `make test`. Each makes its own .venv.
PYTHON ?= python3
BIN := .venv/bin
SNAKEMAKE = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake

.PHONY: run test test-all test-faults test-slurm lint report clean

# A killed run leaves Snakemake's lock behind; it is taken away where no Snakemake runs on this machine.
run: .venv/installed
	@if [ -n "$$(ls .snakemake/locks 2>/dev/null)" ] && command -v pgrep >/dev/null && ! pgrep -f '[b]in/snakemake' >/dev/null; \
	then $(BIN)/python -m snakemake --cores 1 --unlock; fi
	$(SNAKEMAKE) --profile workflow/profiles/local
	@echo "report: $(CURDIR)/results/report/report.html"

# Side by side, a file after the other on each processor.
test: .venv/installed
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m "not statistical and not cluster" --durations 15 \
	  -n logical --dist loadfile --no-loadscope-reorder tests

# Killed workers and jobs, doubled jobs, a full disk (root), a truncated image, too little memory.
test-faults: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest tests/cluster/test_faults.py

# On a SLURM of this machine, started and stopped for it (root or sudo, Debian or Ubuntu). SLURM_TESTS chooses, as pytest's -k.
SLURM_TESTS ?= test
test-slurm: .venv/installed
	@if tests/cluster/slurm.sh up; then \
	  eval "$$(tests/cluster/slurm.sh env)"; \
	  PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest tests/cluster/test_slurm.py -k "$(SLURM_TESTS)"; status=$$?; \
	  tests/cluster/slurm.sh down; exit $$status; \
	else echo "make test-slurm: no SLURM here (see above); its tests were not run"; fi

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
