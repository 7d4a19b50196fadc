# make demo | test | ui | lint | bench | clean. Everything lives in .venv, installed once per pyproject.toml and constraints.txt.
SHELL := /bin/bash
VENV := .venv
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# The commands of both engines say plain `python`: it has to be this one.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
CORES ?= all

.PHONY: help install demo test ui lint bench clean
help:
	@sed -n '1s/^# //p' Makefile

install: $(STAMP)
	@$(VENV)/bin/python -m workflow.relocate $(VENV)

$(STAMP):
	@found=; for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found=$$python; break; fi; done; \
	if [ -z "$$found" ]; then echo "mimlab needs Python 3.11 or newer with venv; none of python3.11 ... python3.14, python3 on PATH is." >&2; exit 1; fi; \
	if [ -x $(VENV)/bin/python ]; then :; else echo "creating $(VENV) with $$found"; $$found -m venv $(VENV); fi
	@echo "installing into $(VENV) (once; several GB with CUDA libraries)"
	@$(VENV)/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(VENV)/requirements.txt
	@rm -f $(VENV)/installed-*; touch $@

demo: install
	@python -m workflow.watch --cost -- python -m snakemake --cores $(CORES)

test: install
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python -m pytest -n 2

ui: install
	-@python -m stages.kit.job.courier --replay --page http://127.0.0.1:5000
	@echo "MLflow at http://127.0.0.1:5000 (Ctrl-C ends it)"
	@MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1 python -m mlflow server --host 127.0.0.1 --port 5000 --workers 1 --backend-store-uri sqlite:///mlflow.db

lint: install
	python -m ruff check .
	python -m ruff format --check .
	snakefmt --check Snakefile workflow
	python -m snakemake --lint

bench: install
	@for file in benchmarks/[a-z]*.py; do echo "$$file"; python "$$file" || exit 1; done

clean:
	rm -rf results work logs mlruns mlflow.db dvc_plots .snakemake .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
