# Both targets need only python3, pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

QUICK := tests/test_borders.py tests/test_swap.py tests/cost/test_count.py tests/layers/test_factors.py tests/layers/test_phantom.py \
	tests/plan/test_plan.py tests/plan/test_structure.py tests/plan/test_unfit.py tests/checkpoints/test_format.py

.PHONY: demo check test lint style types pytest docs coverage package clean

demo: $(VENV)/.installed-demo  ## train the digits on two ranks by DDP and by phantom, and show what each took
	$(BIN)/lightning-phantom fit --config examples/digits.yaml --config examples/digits_ddp.yaml
	$(BIN)/lightning-phantom fit --config examples/digits.yaml

check: lint  ## format, lint, types and the quick tests, for whoever changes a line
	$(BIN)/python -m pytest -q -m "not program" -k "not several_ranks and not huge" $(QUICK)

test: style  ## the whole gate: format, lint, types, docs, tests, the last three side by side
	$(MAKE) --jobs types docs pytest

lint: style types

style: $(VENV)/.installed-test
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

types: $(VENV)/.installed-test
	$(BIN)/python -m mypy

pytest: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses 3

docs: $(VENV)/.installed-test  ## the site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

coverage: $(VENV)/.installed-test  ## the tests once more, with what they do not reach, ranks included
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

package: $(VENV)/.installed-package  ## wheel and sdist in dist/, checked, and the demo run from the wheel in an empty environment
	rm -rf dist build/empty
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls "$(CURDIR)"/dist/*.whl)[demo]"
	cp -r examples build/empty/ && cd build/empty && bin/lightning-phantom fit --config examples/digits.yaml

# One stamp per extra: a second call installs nothing, a changed dependency list installs again.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV)
