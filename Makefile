# make demo    set up and search the bundled model
# make demo-cluster  the same over REST, with Redis, PostgreSQL and two workers
# make test    set up and run every check
# make faults  set up and break a running service part by part
# make faults-storm  the same, twenty times each
# make kernels-compile  set up and compile every kernel for sm_90: minutes, and no GPU
#
# PYTHON chooses the interpreter (3.11 to 3.13), WORKERS the number of test processes, TESTS what pytest runs.

PYTHON ?= python3
WORKERS ?= 3
TESTS ?= tests

# Bytecode saves seconds at every start of a process; an inherited variable must not switch it off.
export PYTHONDONTWRITEBYTECODE :=

BIN := .venv/bin
STAMP := .venv/installed
UV := uv==0.13.8

# pip reads PIP_FIND_LINKS by itself, uv does not.
INSTALL := pip install $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} -c constraints.txt -e '.[dev]'

# $(call timed,NAME,COMMAND): runs COMMAND and prints how long it took.
define timed
	@echo "== $(1)"; since=$$(date +%s); { $(2); } && echo "== $(1): $$(( $$(date +%s) - since )) s"
endef

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations 10
FAULTS := tests/search/test_faults.py

.PHONY: demo demo-cluster env faults faults-storm kernels-compile lint test types

demo: env
	@mkdir -p runs
	$(BIN)/autoeff search demo --knobs bits,skip,width --limit 'avg_bits<=3.5' --trials 120 --windows 8 --eval-windows 16 --seed 0 --out "runs/demo-$$(date +%Y%m%d-%H%M%S)"

# A cluster that lives for one search: Redis, PostgreSQL, the API, a coordinator, two Celery workers.
demo-cluster: env
	$(BIN)/python benchmarks/demo_cluster.py

# Breaks every part of a running service, three times each, and audits what is left.
faults: env
	$(BIN)/python benchmarks/faults.py --moments 3

# Twenty times each, which takes most of an hour, and keeps what it saw.
faults-storm: env
	$(BIN)/python benchmarks/faults.py --moments 20 --out benchmarks/results/faults.json

kernels-compile: env
	$(BIN)/autoeff kernels compile --target sm_90

# One thread in each process, and more processes than two cores: many tests wait for servers and workers. The round of faults comes first,
# with the machine for itself, as its service has seven processes of its own.
test: lint types
	@echo "== tests"
	$(if $(filter tests,$(TESTS)),$(PYTEST) $(FAULTS))
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(filter tests,$(TESTS)),--ignore=$(FAULTS)) $(TESTS)

lint: env
	$(call timed,lint,$(BIN)/ruff check . && $(BIN)/ruff format --check .)

types: env
	$(call timed,types,$(BIN)/python -m mypy -n $(WORKERS))

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else f"Python 3.11 to 3.13 is needed, $(PYTHON) is {sys.version.split()[0]}; set PYTHON")'
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv .venv
	$(call timed,install,if $(BIN)/python -m pip install --quiet $(UV); then $(BIN)/uv $(INSTALL) --quiet --python $(BIN)/python; else $(BIN)/python -m $(INSTALL) --quiet; fi)
	@touch $@
