# make digits: the whole pipeline on a laptop. make test: the test suite. Both set up .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: digits test setup lint hand-to-dvc hand-to-snakemake clean

digits: $(READY)
	$(VENV)/bin/snakemake --cores all reports/digits_fid.json
	@echo
	@echo "report    reports/digits_fid.json"
	@echo "samples   samples/digits/grid.png  (all of them: samples/digits/samples.npz)"
	@echo "figures   reports/digits_fid_*.png"
	@echo "compare   $(VENV)/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db"

test: $(READY)
	$(VENV)/bin/python -m pytest

setup: $(READY)

# pip's own variables choose where packages come from, e.g. PIP_INDEX_URL for a CPU build of torch.
$(READY): envs/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else f"error: Python >= 3.11 is needed, this is {v}; choose another with PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --requirement envs/requirements.txt
	$(VENV)/bin/python -m pip install --no-deps --editable .
	touch $(READY)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/snakefmt --check Snakefile
	$(VENV)/bin/codespell
	$(VENV)/bin/snakemake --lint

# What Snakemake has made counts as made for DVC, and the other way round.
hand-to-dvc: $(READY)
	$(VENV)/bin/dvc commit --force --quiet
	$(VENV)/bin/dvc status

hand-to-snakemake: $(READY)
	$(VENV)/bin/snakemake --touch --forceall --cores 1 --quiet all
	$(VENV)/bin/snakemake --dry-run

clean:
	rm -rf data models samples reports checkpoints logs .snakemake mlflow.db* mlruns mlartifacts
