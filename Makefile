# make demo, make test: each makes what it needs in .venv first, once.
# A fresh machine needs Python >= 3.10, make and a package index.

PYTHON      ?= python3
VENV        ?= .venv
MODEL       ?= slvit-tiny
TORCH       := 2.13.0
# plain 2.13.0 works everywhere: pip prefers a CPU build where it sees one, and takes the large CUDA
# build elsewhere; TORCH_INDEX=<index with CPU builds> shows it one, for this wheel alone
TORCH_INDEX ?=
BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip install -q --no-compile

.PHONY: demo methods parity test lint types tests py310 gpu clean

demo: $(VENV)/.installed
	$(BIN)/refedge demo $(MODEL)

test: lint types tests py310

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed .mypath/refedge
	$(BIN)/mypy

tests: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

# the runtime again on the oldest Python and NumPy it supports, where that interpreter is found
py310: tests
	$(BIN)/python tests/py310.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --no-deps "torch==$(TORCH)" $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
	$(PIP) -e ".[dev]"
	touch $@

# mypy finds the package under its own name through this link (an editable install hides it)
.mypath/refedge:
	mkdir -p .mypath
	ln -sfn .. $@

# what each calibration method gives (docs/quantization.md): about ten minutes
methods: $(VENV)/.installed
	mkdir -p out/methods
	$(BIN)/refedge export slvit-tiny -o out/methods/slvit-tiny.refedge
	for m in minmax percentile entropy mse; do \
	  $(BIN)/refedge quantize out/methods/slvit-tiny.refedge --data refshapes:calibration --method $$m && \
	  $(BIN)/refedge eval out/methods/slvit-tiny.refedge --limit 100 -o out/methods/$$m.json || exit 1; \
	done

# parity of every model at the size of its paper: minutes and up to 12 GB each
FAMILIES ?= slvit lts m3att cm_masksd step lavt
parity: $(VENV)/.installed
	mkdir -p out/parity
	failed=; for f in $(FAMILIES); do \
	  { $(BIN)/refedge export $$f:paper -o out/parity/$$f-paper.refedge && \
	    $(BIN)/python -m refedge.benchmarks.parity out/parity/$$f-paper.refedge; } || \
	    failed="$$failed $$f"; \
	  rm -rf out/parity/$$f-paper.refedge; \
	done; test -z "$$failed" || { echo "no parity:$$failed"; exit 1; }

# everything that needs a GPU, on the host's own Python where there is no .venv; elsewhere dry checks
BUDGET     ?= 25
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: .mypath/refedge
	PYTHONPATH=.mypath $(GPU_PYTHON) -m refedge.benchmarks.gpu.run --budget $(BUDGET)

clean:
	rm -rf $(VENV) $(VENV)310 .mypath build dist out *.egg-info
