# Everything happens in .venv; only Python 3.11+, make and pip have to be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-cluster test test-slow lint lint-terraform clean

# The stamp is newer than the pins as long as nothing has to be installed.
setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("raylaunch needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	touch $@

demo: setup
	$(BIN)/launch --data sample://digits

# The same on an emulated Kubernetes cluster; `make demo-cluster KEEP=1` leaves it running for your own commands.
demo-cluster: setup
	$(BIN)/python -m tests.kube.demo $(if $(KEEP),--keep)

test: setup
	$(BIN)/pytest -m "not slow"

test-slow: setup
	$(BIN)/pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What a security linter has against terraform/; what it may have is written beside what it is about.
lint-terraform: .venv/checkov/.installed
	.venv/checkov/bin/checkov --directory terraform --framework terraform --skip-download --compact --quiet

.venv/checkov/.installed: terraform/checkov-requirements.txt | setup
	$(PYTHON) -m venv .venv/checkov
	.venv/checkov/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
