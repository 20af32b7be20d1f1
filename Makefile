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

.PHONY: demo methods parity cubins plugins stubs test lint types tests py310 gpu wheels kit-plugins clean

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

# what a GPU host without a package index may lack, for its Python 3.12; make gpu installs them there
wheels: $(VENV)/.installed
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
	  --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 -d .gpukit/wheels \
	  msgspec pycocotools

# our plugin library for the GPU kit's TensorRT 8.6.0: engines with and without it in make gpu
kit-plugins: $(VENV)/.installed
	mkdir -p .cache/tensorrt/v8.6.0
	test -d .cache/tensorrt/repo || \
	  git clone -q --bare --filter=blob:none "$(TENSORRT_REPO)" .cache/tensorrt/repo
	git -C .cache/tensorrt/repo archive v8.6.0 include | tar x -C .cache/tensorrt/v8.6.0
	rm -rf .gpukit/plugins
	$(BIN)/refedge plugin build -o .gpukit/plugins --headers .cache/tensorrt/v8.6.0/include

# everything that needs a GPU, on the host's own Python where there is no .venv; elsewhere dry checks
BUDGET     ?= 25
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: .mypath/refedge
	PYTHONPATH=.mypath $(GPU_PYTHON) -m refedge.benchmarks.gpu.run --budget $(BUDGET)

# the kernels of plugins/kernels for every architecture, without a GPU: a few minutes
CUDA12 := nvidia-cuda-nvrtc-cu12==12.6.* nvidia-cuda-runtime-cu12==12.6.* nvidia-cuda-nvcc-cu12==12.6.*
CUDA13 := nvidia-cuda-nvrtc==13.0.* nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.*
cubins: .mypath/refedge
	$(PYTHON) -m venv .cache/cuda
	.cache/cuda/bin/python -m pip install -q --no-compile $(foreach p,$(CUDA12) $(CUDA13),"$(p)")
	PYTHONPATH=.mypath .cache/cuda/bin/python -m refedge.plugins.compile

# the plugin library against the headers of each generation of TensorRT, and in the registry of its
# lean runtime; the ahead-of-time plugins in its Python bindings; needs g++, git and a clone of
# NVIDIA's TensorRT repository (TENSORRT_REPO)
TENSORRT_REPO ?= https://github.com/NVIDIA/TensorRT.git
TENSORRT_TAGS := v8.6.1 v10.0.0 v10.3.0 v10.13.0 v11.1
BINDINGS := 10.9=cu12-bindings==10.9.0.34 10.13=cu12-bindings==10.13.3.9 11.4=cu13-bindings==11.4.0.106
plugins: $(VENV)/.installed
	mkdir -p .cache/tensorrt
	test -d .cache/tensorrt/repo || \
	  git clone -q --bare --filter=blob:none "$(TENSORRT_REPO)" .cache/tensorrt/repo
	for tag in $(TENSORRT_TAGS); do mkdir -p .cache/tensorrt/$$tag; \
	  git -C .cache/tensorrt/repo archive $$tag include | tar x -C .cache/tensorrt/$$tag || exit 1; done
	$(PYTHON) -m venv .cache/lean
	.cache/lean/bin/python -m pip install -q --no-compile --no-deps "tensorrt-lean-cu13-libs==11.4.0.106"
	for b in $(BINDINGS); do $(PIP) --no-deps --upgrade --target .cache/bindings/$${b%%=*} \
	  "tensorrt-$${b#*=}" || exit 1; done
	REFEDGE_TENSORRT_HEADERS=$(CURDIR)/.cache/tensorrt \
	  REFEDGE_TENSORRT_BINDINGS=$(CURDIR)/.cache/bindings \
	  REFEDGE_TENSORRT_LEAN=$$(find $(CURDIR)/.cache/lean -name 'libnvinfer_lean.so.11') \
	  $(BIN)/python -m pytest -rs tests/plugins

# our TensorRT code against stubs of the real bindings, and the table of their names that the tests
# use; needs a C compiler, Python 3.10 or 3.11 (8.6 has wheels for no later one), a package index
# and, for the names of 8.6.0, the GPU kit unpacked
KIT := $(wildcard /tmp/gpukit/bin/python)
STUBBED := 8.6=tensorrt_bindings==8.6.1 10.3=tensorrt_cu12_bindings==10.3.0 \
  10.13=tensorrt_cu12_bindings==10.13.3.9 11.4=tensorrt_cu13_bindings==11.4.0.106
STUBS := .cache/stubs/bin/python
stubs:
	$(PYTHON) -m venv .cache/stubs
	$(STUBS) -m pip install -q --no-compile pybind11-stubgen mypy numpy
	rm -rf .cache/stubbed
	for b in $(STUBBED); do $(STUBS) -m pip install -q --no-compile --no-deps --only-binary=:all: \
	  --target ".cache/stubbed/$${b%%=*}/site" "$${b#*=}" || exit 1; done
	$(STUBS) tests/engines/check_types.py .cache/stubbed
	$(STUBS) tests/engines/make_names.py $(if $(KIT),"8.6.0=$(KIT)") $(foreach b,$(STUBBED),"$(firstword $(subst =, ,$(b)))=env \
	  LD_LIBRARY_PATH=.cache/stubbed/$(firstword $(subst =, ,$(b)))/lib \
	  PYTHONPATH=.cache/stubbed/$(firstword $(subst =, ,$(b)))/site $(STUBS)")

clean:
	rm -rf $(VENV) $(VENV)310 .mypath build dist out *.egg-info
