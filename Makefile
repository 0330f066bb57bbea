# Every target sets up what it needs: on a fresh machine `make demo` or `make test` is the first command.
# One environment, .venv, serves them all: the demo needs only the extras node and tools, but what dev adds
# to torch and transformers is small, and two environments would hold those twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FOLDERS := node protocol tools training

.PHONY: install demo test browser check links constraints launch screenshots clean

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/onlooker demo

# Two at a time: half of a test's time is often waiting, and each of them imports torch by itself.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The page of `onlooker web` in a real browser: a minute in which nothing else should run. Needs Chromium and its driver.
browser: $(STAMP)
	$(BIN)/python -m pytest -m browser tests/test_web_browser.py

check: $(STAMP) links
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

constraints: $(STAMP)
	sed -n '/^#/p' constraints.txt > constraints.new
	$(BIN)/pip freeze --all --exclude onlooker --exclude pip | sed 's/+cpu$$//' >> constraints.new
	mv constraints.new constraints.txt

# What is written by a command from what the code says, for those who only read the repository.
launch: $(STAMP)
	$(BIN)/onlooker node --print-config > launch/node.toml
	$(BIN)/onlooker metrics --dashboard > launch/grafana/onlooker.json
	$(BIN)/onlooker metrics --rules > launch/prometheus/alerts.yml

# The same, keeping what the browser shows.
screenshots: $(STAMP)
	SCREENSHOTS=docs $(BIN)/python -m pytest -m browser tests/test_web_browser.py

clean:
	rm -rf $(VENV) build dist typings *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(FOLDERS) tests -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "onlooker needs Python 3.11 or newer; \"$(PYTHON)\" is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Pyright reads the folders at the root as they are; what says onlooker.node, as the tests do, needs links.
links:
	mkdir -p typings/onlooker
	for folder in $(FOLDERS); do ln -sfn ../../$$folder typings/onlooker/$$folder; done
