# For a fresh machine: `make demo`, `make test`, `make test-all`. All set up `.venv` through `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-all lint clean

setup: $(VENV)/.setup

$(VENV)/.setup: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
	touch $@

# The test tools, on top of what the demo needs.
$(VENV)/.test: $(VENV)/.setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,test]"
	touch $@

demo: setup
	$(BIN)/compressft run banking77-edge --output runs/demo

# Compiled tests are kept, and no child's threads wait busily. One process per core.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	$(BIN)/python -m pytest -q -n logical --dist loadfile

# A share of every product of cases.
test: $(VENV)/.test
	$(PYTEST)

# Every case, those of `make test` too.
test-all: $(VENV)/.test
	$(PYTEST) --all

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info
