# make demo    trains a small language model on real text and leaves runs/demo/
# make test    runs the whole test suite
# make docs    builds the documentation into site/; open site/index.html
# make setup-full   also installs every package whose kernels can be used; without them their tests are skipped
#
# demo and test first make a virtual environment in .venv and install into it; the second time that is skipped. Overridable:
#   PYTHON=python3.12   the interpreter to start from (3.10 or newer)
#   VENV=folder         another place for the environment
#   TORCH=torch==2.11.0 another torch; options of pip may follow, such as --index-url
#   PYTEST_ARGS="..."   more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: demo test lint docs setup setup-dev setup-full clean
.DELETE_ON_ERROR:

demo: setup
	$(PY) -m fnattn demo

test: setup-dev
	$(PY) -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: setup-dev
	$(PY) -m ruff check .

docs: setup
	@$(PY) -c 'import pdoc' 2>/dev/null || $(PIP) install $(KEEP_TORCH) -e '.[docs]'
	$(PY) docs/build.py

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev
setup-full: $(VENV)/.installed-full

# torch comes first and on its own, and nothing that follows may choose another one. A CUDA build brings the Triton that it goes
# with; a CPU build brings none, and gets TRITON for the interpreter's tests.
KEEP_TORCH = --constraint $(VENV)/torch.txt
$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "fnattn needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PY) -c 'import importlib.metadata as m; has = {d.name for d in m.distributions()}; print("torch==" + m.version("torch"), "triton==" + m.version("triton") if "triton" in has else "$(TRITON)", sep="\n")' > $(VENV)/torch.txt
	$(PIP) install $(KEEP_TORCH) -e .
	@touch $@

# The upstream packages that parity tests compare with, and curvlinops. Those without their dependencies ask for a great deal that
# is not needed here, such as a torchvision that brings another torch.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install $(KEEP_TORCH) -e '.[dev]'
	$(PIP) install --no-deps dalle-pytorch==1.6.6 axial_positional_embedding
	$(PIP) install opt-einsum tqdm jaxtyping mpmath
	$(PIP) install --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einconv==0.1.0 unfoldNd==0.2.3 linear_operator
	@touch $@

# Every package whose kernels can be used. pytorch-fast-transformers is compiled against the installed torch: a C++ compiler
# and about four minutes. Its build, and DeepSpeed's, take an nvcc on the PATH for a sign of a CUDA torch, so nvcc is hidden;
# KEEP_NVCC=1 shows it (with a CUDA 13 also NVCC_APPEND_FLAGS=-arch=sm_90 or the like: the package names one that is gone).
$(VENV)/.installed-full: $(VENV)/.installed-dev
	@set -e; hidden=$(abspath $(VENV))/without-nvcc; rm -rf $$hidden; mkdir $$hidden; path=$$hidden; \
	IFS=:; for folder in $$PATH; do \
	  if [ -z "$(KEEP_NVCC)" ] && [ -x "$$folder/nvcc" ]; then \
	    for tool in "$$folder"/*; do case $$tool in */nvcc) ;; *) ln -sf "$$tool" $$hidden/ ;; esac; done; \
	  else path=$$path:$$folder; fi; done; unset IFS; \
	export PATH=$$path DS_BUILD_OPS=0 CFLAGS="-O3 $$CFLAGS -g0"; \
	$(PIP) install $(KEEP_TORCH) -e '.[colt5,deepspeed,triton]'; \
	echo "building pytorch-fast-transformers (about four minutes)"; \
	$(PIP) install $(KEEP_TORCH) --no-build-isolation pytorch-fast-transformers==0.4.0
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
