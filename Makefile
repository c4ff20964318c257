# Two commands for a fresh machine: `make demo` and `make test`. Both set up `.venv` through `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test lint clean

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

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n logical --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info
