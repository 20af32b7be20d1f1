# make demo, make test: each makes what it needs in .venv first, once.
# A fresh machine needs Python >= 3.10, make and a package index.

PYTHON      ?= python3
VENV        ?= .venv
TORCH       := 2.13.0
# where pip finds a CPU build of torch: an index only used for that one wheel; empty for pip's own
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip install -q --no-compile

.PHONY: demo test lint types tests py310 clean

demo: $(VENV)/.installed
	$(BIN)/refedge demo

test: lint types tests py310

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed .mypath/refedge
	$(BIN)/mypy

tests: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

# the runtime again on the oldest Python and NumPy it supports, where that interpreter is found
py310: $(VENV)/.installed
	@$(BIN)/python tests/py310.py

# a CPU build of torch first, so that nothing pulls the CUDA one; then the package itself
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "torch==$(TORCH)+cpu" --extra-index-url "$(TORCH_INDEX)" --retries 1 || $(PIP) "torch==$(TORCH)"
	$(PIP) -e ".[dev]"
	touch $@

# mypy finds the package under its own name through this link (an editable install hides it)
.mypath/refedge:
	mkdir -p .mypath
	ln -sfn .. $@

clean:
	rm -rf $(VENV) .mypath build dist out *.egg-info
