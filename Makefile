# make demo    trains a small language model on real text and leaves runs/demo/
# make test    runs the whole test suite
#
# Both first make a virtual environment in .venv and install into it; the second time that is skipped. Overridable:
#   PYTHON=python3.12   the interpreter to start from (3.10 or newer)
#   VENV=folder         another place for the environment
#   TORCH=torch==2.11.0 another torch; options of pip may follow, such as --index-url
#   PYTEST_ARGS="..."   more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: demo test lint setup setup-dev setup-full clean
.DELETE_ON_ERROR:

demo: setup
	$(PY) -m fnattn demo

test: setup-dev
	$(PY) -m pytest -n 2 $(PYTEST_ARGS)

lint: setup-dev
	$(PY) -m ruff check .

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

# torch comes first and on its own: nothing that follows may choose another one.
$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "fnattn needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -e .
	@touch $@

# The upstream packages that parity tests compare with. This one asks for a great deal that its attentions do not need.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -e '.[dev]'
	$(PIP) install --no-deps dalle-pytorch==1.6.6 axial_positional_embedding
	@touch $@

# pytorch-fast-transformers is compiled against the installed torch: a C++ compiler and about four minutes. Its build
# takes an nvcc on the PATH for a sign of a CUDA torch, so nvcc is hidden; KEEP_NVCC=1 shows it.
setup-full: setup-dev
	@set -e; hidden=$(abspath $(VENV))/without-nvcc; rm -rf $$hidden; mkdir $$hidden; path=$$hidden; \
	IFS=:; for folder in $$PATH; do \
	  if [ -z "$(KEEP_NVCC)" ] && [ -x "$$folder/nvcc" ]; then \
	    for tool in "$$folder"/*; do case $$tool in */nvcc) ;; *) ln -sf "$$tool" $$hidden/ ;; esac; done; \
	  else path=$$path:$$folder; fi; done; unset IFS; \
	echo "building pytorch-fast-transformers (about four minutes)"; \
	PATH=$$path $(PIP) install --no-build-isolation pytorch-fast-transformers==0.4.0

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
