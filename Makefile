PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help run test check bench clean

help:
	@echo "make run     serve examples/hello with two workers (installs into $(VENV) first)"
	@echo "make test    install what the tests need, then run all of them"
	@echo "make check   ruff, mypy --strict, import-linter"
	@echo "make bench   reloads under load, beside other servers; the balancer beside haproxy and nginx; rollouts"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/test.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

$(VENV)/check.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,check]"
	@touch $@

$(VENV)/bench.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	@touch $@

run: $(VENV)/run.stamp
	@echo
	@echo "Serving examples/hello with two workers on http://127.0.0.1:8000 (Ctrl-C stops it). In another terminal:"
	@echo
	@echo "    curl -i http://127.0.0.1:8000/"
	@echo "    \$$EDITOR examples/hello/main.py      # change the text"
	@echo "    $(BIN)/handoff reload --name hello"
	@echo "    $(BIN)/handoff status --name hello"
	@echo
	@exec $(BIN)/handoff run main:app --chdir examples/hello --name hello --workers 2

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

check: $(VENV)/check.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/bench.stamp
	$(BIN)/python -m bench.instructions
	$(BIN)/python -m bench.steady
	$(BIN)/python -m bench.listen_modes
	$(BIN)/python -m bench.boot
	$(BIN)/python -m bench.moves
	$(BIN)/python -m bench.lb
	$(BIN)/python -m bench.rollout
	$(BIN)/python -m bench.lb_moves
	$(BIN)/python -m bench.reload $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
