# The two commands of the README are `make demo` and `make test`; both set up all they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint clean

demo: .venv/runtime
	$(BIN)/python decode/benchmark.py --config=configs/bench/demo.py

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m ""

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"error: Python {v[0]}.{v[1]} is too old; specjax needs 3.11.")'
	$(PYTHON) -m venv .venv

.venv/runtime: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/runtime

clean:
	rm -rf .venv runs
