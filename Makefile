# The two commands of the README are `make demo` and `make test`; both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# compiled files are kept also where containers say no: each of the many processes would compile everything again
PYTEST := $(THREADS) PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-all test-kernels check bench ui docs golden clean

demo: $(STAMP)  ## compare five strategies on embedded digits and write the report
	$(BIN)/cl compare stream=permuted_digits strategies=naive,joint,replay,derpp,ewc seeds=5 +experiment=demo out=runs/demo
	@echo
	@echo "report:  runs/demo/report/report.html   (open it in a browser)"
	@echo "MLflow:  $(BIN)/cl ui                   (prints the link to the forgetting curves)"

test: $(STAMP)  ## the tests, without the slow ones
	$(PYTEST) -m "not slow and not gpu and not network"

test-slow: $(STAMP)  ## the slow tests that CI runs besides
	$(PYTEST) -m "slow and not grid and not gpu and not network"

test-all: $(STAMP)  ## everything, with the rest of the grids that CI runs a cover of
	$(PYTEST) -m "not gpu and not network"

test-kernels: $(STAMP)  ## all of the kernels alone: oracles, interpreter, mistakes put in, the compiler's table
	$(PYTEST) -m "not gpu and not network" tests/kernels

check: $(STAMP)  ## lint, format, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell cl strategies streams kernels configs tests docs benchmarks README.md CHANGELOG.md CONTRIBUTING.md

bench: $(STAMP)  ## throughput against a plain loop and Avalanche, as ratios in one run; MNIST below CL_DATA_ROOT
	$(BIN)/python benchmarks/throughput.py --data $(CL_DATA_ROOT)

ui: $(STAMP)  ## MLflow on the demo's store
	$(BIN)/cl ui

docs: $(STAMP)  ## the tables in docs/ that are made from the code
	$(BIN)/python docs/make_tables.py

golden: $(STAMP)  ## rewrite the recorded losses and show what changed
	$(BIN)/python tests/golden/rewrite.py

clean:
	rm -rf $(VENV) runs mlruns.db mlartifacts

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
