PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: check static format lint types spelling docs docs-serve notebooks pictures test oldest

check: static test

static: format lint types spelling docs

format:
	$(PYTHON) -m ruff format --check .

lint:
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

spelling:
	$(PYTHON) -m codespell_lib

# Warnings are errors: a broken link, an unknown name and a broken formula are told with file and line.
docs:
	@$(PYTHON) -c "import furo, latex2mathml, myst_nb, sphinx_copybutton, sphinx_design" 2> /dev/null \
		|| { echo "make docs needs packages that are not installed; run pip install -e '.[docs]'." >&2; exit 1; }
	$(PYTHON) -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/site

docs-serve: docs
	$(PYTHON) -m http.server --directory build/site

# What is stored and read without being run: outputs of the notebooks, and pictures of the README and the site.
notebooks:
	$(PYTHON) notebooks/execute.py

pictures:
	$(PYTHON) docs/pictures.py

test:
	$(PYTHON) -m pytest -n auto

# The contract with the oldest versions that pyproject.toml allows, on the oldest Python found here (or PYTHON=...).
oldest: PYTHON = $(shell for p in python3.10 python3.11 python3.12 python3; do $$p -c "" 2> /dev/null && echo $$p && break; done)
oldest:
	$(PYTHON) -m venv .venv-oldest
	sed -nE 's/^ *"([a-z-]+)(\[[a-z]+\])?>=([0-9.]+)".*/\1==\3/p' pyproject.toml > .venv-oldest/bounds.txt
	.venv-oldest/bin/pip install -c .venv-oldest/bounds.txt -e '.[dev]'
	.venv-oldest/bin/python -m pytest -n auto tests/contract
