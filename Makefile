# Two commands do everything on a fresh machine with Python 3.11 and a C compiler:
#   make demo   virtual environment, install, the whole path on a real model
#   make test   virtual environment, install, tests
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint types bench bench-full integration test5 clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m integration.demo

test: $(VENV)/installed
	$(BIN)/python -m pytest tests

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed
	$(BIN)/mypy

check: lint types test

# The same on transformers 5, where Optimum cannot be installed: graphs are traced by torch alone.
$(VENV)-5/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-5
	$(VENV)-5/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-5/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)-5/bin/python -m pip install --quiet -c constraints.txt -e ".[dev,onnx5]" "transformers==5.23.0"
	touch $@

test5: $(VENV)-5/installed
	$(VENV)-5/bin/python -m pytest tests

integration: $(VENV)/installed
	$(BIN)/python -m pytest integration

bench: $(VENV)/installed
	$(BIN)/python -m integration.benchmarks --quick

bench-full: $(VENV)/installed
	$(BIN)/python -m integration.benchmarks --full

clean:
	rm -rf $(VENV) $(VENV)-5 build dist *.egg-info
