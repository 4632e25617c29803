# The project's commands, each one line to a person. `make` alone lists them.
#
# Everything runs from .venv, which the first target to need it makes: `make demo` installs what
# running takes and then the tools for development. Nothing else is installed by hand.
#
#   PYTHON=python3.12          the interpreter .venv is made with (3.11 or later)
#   TORCH_INDEX=URL            also look for torch there: the address that pytorch.org's install page
#                              gives for the CPU build, on a machine without a GPU (the default build
#                              for Linux brings several GB of CUDA libraries)
#   TORCH=torch==2.13.0        what `make pins` asks for, where the newest torch is not the wanted one
#   ARGS='--rounds 5'          passed on by demo and bench
#   PYTEST_ARGS='-k round'     passed on by the test targets

PYTHON ?= python3
TORCH_INDEX ?=
TORCH ?=
ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
NAME ?= rounds

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN_STAMP := .venv/.stamp-run
DEV_STAMP := .venv/.stamp-dev
PINS_VENV := build/pins

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-fast test-slow compose-test lint audit format type bench docs stubs pins dist clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | \
		while IFS="$$(printf '\t')" read -r name what; do printf '  %-13s %s\n' "$$name" "$$what"; done

# --- the virtual environment -------------------------------------------------------------------

$(RUN_STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: no '$(PYTHON)' on PATH; name a Python 3.11 or later with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: seqfed needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
			"name another with PYTHON=..." >&2; exit 1; }
	@echo "installing into .venv at the versions in constraints.txt (the first time takes some minutes)"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) --upgrade pip hatchling
	@$(INSTALL) --no-build-isolation --editable '.[demo]'
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "adding the development tools to .venv"
	@$(INSTALL) --group dev
	@touch $@

venv: $(DEV_STAMP) ## make .venv with everything for development

# --- using it ----------------------------------------------------------------------------------

demo: $(DEV_STAMP) ## train on five clients on this machine; ARGS='--help' tells its options
	@$(BIN)/seqfed demo $(ARGS)

# --- checking it -------------------------------------------------------------------------------

# worksteal: the integration tests are few and long, so an even split up front would leave a core idle.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test: $(DEV_STAMP) ## the default suite: all but the tests marked slow, large or compose
	@$(PYTEST)

test-fast: $(DEV_STAMP) ## the default suite without the integration tests
	@$(PYTEST) --ignore tests/integration

test-slow: $(DEV_STAMP) ## the tests marked slow
	@$(PYTEST) -m 'slow and not large and not compose' || \
		{ status=$$?; [ $$status -eq 5 ] && echo "no test is marked slow" || exit $$status; }

compose-test: $(DEV_STAMP) ## a whole training in containers; skipped where no engine answers
	@$(BIN)/python -m pytest -m compose $(PYTEST_ARGS)

lint: $(DEV_STAMP) ## ruff, both type checkers, the import contracts, the stubs, no secrets
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(MAKE) --no-print-directory type
	@$(BIN)/lint-imports
	@$(BIN)/python protos/generate.py --check
	@$(BIN)/python .ci/audit.py

audit: $(DEV_STAMP) ## secrets in files and pins that are not exact; with pip-audit and a network also known vulnerabilities
	@$(BIN)/python .ci/audit.py --online

type: $(DEV_STAMP) ## mypy and pyright
	@$(BIN)/mypy
	@$(BIN)/pyright

format: $(DEV_STAMP) ## rewrite the code as ruff would have it
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(DEV_STAMP) ## measure: NAME=rounds|memory|startup|training|quality|chaos|fleet|fuzz|masking|prg|dp|compression, ARGS='--help' tells its options
	@$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

# --- making things from it ---------------------------------------------------------------------

docs: $(DEV_STAMP) ## the API reference from the docstrings, as HTML in build/docs
	@$(BIN)/pdoc --docformat google --output-directory build/docs \
		seqfed.common seqfed.server seqfed.client
	@echo "build/docs/index.html"

stubs: $(DEV_STAMP) ## generate common/seqfed/v1 anew from protos/
	@$(BIN)/python protos/generate.py

dist: $(DEV_STAMP) ## the sdist and the wheel, in dist/
	@$(BIN)/python -m build --no-isolation

# The CPU build's local version (+cpu) is dropped, so that a pin also fits the default build. setuptools
# is kept because grpcio-tools needs it at run time.
pins: ## resolve every pin in constraints.txt anew
	@rm -rf $(PINS_VENV)
	@$(PYTHON) -m venv $(PINS_VENV)
	@$(PINS_VENV)/bin/pip install --quiet --upgrade pip
	@$(PINS_VENV)/bin/pip install --quiet --upgrade \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH) \
		--editable '.[demo]' --group dev --group fuzz
	@sed -n '/^#/p' constraints.txt > build/constraints.txt
	@$(PINS_VENV)/bin/pip freeze --all --exclude-editable | grep -v '^#' | sed 's/+cpu$$//' \
		>> build/constraints.txt
	@mv build/constraints.txt constraints.txt

clean: ## remove .venv and everything made
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
