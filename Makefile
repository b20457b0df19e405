PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run in so many processes, file by file; in the order of collection, so that the long ones come first.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install demo test coverage lint bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/caltrain demo

test: install
	$(PYTEST)

# The trusted part: branch coverage of at least 95 %.
coverage: install
	$(PYTEST) -q tests/unit --cov=caltrain.enclave --cov=caltrain.boundary --cov=caltrain.crypto \
	  --cov=caltrain.records --cov-branch --cov-report=term:skip-covered --cov-fail-under=95

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/caltrain bench sealing

clean:
	rm -rf $(VENV) caltrain-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
