# Every command of this project. `make` alone prints them.
RECIPE ?= imdb
RUNS   ?= runs
# empty: the recipe's own seed
SEED   ?=
# more dials for a stage (ARGS="--learning_rate 1e-5"), or options of pytest for `make test` (ARGS="-k losses")
ARGS   ?=
# processes that tests run in
WORKERS ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
# several processes: LAUNCH="accelerate launch --config_file configs/accelerate/ddp.yaml"
LAUNCH ?= $(BIN)/python
# the first Python that is new enough; looked up only where an environment is created
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

STAGES := pretrain sft reward ppo merge evaluate
STAMP  := $(VENV)/.installed
MIN    := .venv-min
# --no-compile: byte code is written at first import, so only for what is used; hence the unexport below
INSTALL := -m pip -qq --disable-pip-version-check install --no-compile --no-build-isolation

export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONDONTWRITEBYTECODE
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help venv install data lint types test test-all test-min mutants $(STAGES) chat run evidence clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  variables: RECIPE=$(RECIPE) RUNS=$(RUNS) SEED=$(SEED) ARGS=$(ARGS) LAUNCH=$(LAUNCH)"

venv: $(BIN)/python ## create .venv, empty: install a torch build of your own choice into it before `make install`
install: $(STAMP) ## install requirements.lock and this project into .venv; keeps a torch of the same version
data: install ## fetch and write data/imdb, unless it is complete
	@$(BIN)/python stages/data.py

lint: install ## ruff: rules and format
	@echo "lint: ruff check, ruff format --check"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
types: install ## mypy on pipeline and stages
	@echo "types: mypy"
	@$(BIN)/mypy
test: install data ## the tests that CI runs; of what two processes do, what each strategy alone may break
	@echo "test: pytest -n $(WORKERS) $(ARGS)"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
test-all: install data ## every test: all stages on two processes under every strategy
	@echo "test-all: pytest -n $(WORKERS) $(ARGS)"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "every or not every" $(ARGS)
test-min: data $(MIN)/.installed ## the smoke chain with the oldest supported packages, in .venv-min
	@echo "test-min: pytest tests/chain/test_stages.py with requirements-min.txt"
	@$(MIN)/bin/python -m pytest tests/chain/test_stages.py -q $(ARGS)

mutants: install data ## plant bugs one at a time and see whether the tests notice (an hour)
	@echo "mutants: tests/mutants.py $(ARGS)"
	@$(BIN)/python tests/mutants.py $(ARGS)

pretrain: ## stage 1: raw text -> language model
sft:      ## stage 2: demonstrations -> supervised policy
reward:   ## stage 3: preferences -> reward model
ppo:      ## stage 4: prompts + reward model -> aligned policy
merge:    ## adapters -> one plain checkpoint
evaluate: ## compare the stages on held-out prompts
chat:     ## talk to the aligned policy
$(STAGES) chat: install data
	@echo "$@: configs/$(RECIPE)/$@.yaml -> $(RUNS)"
	@$(LAUNCH) stages/$@.py --config configs/$(RECIPE)/$@.yaml --runs $(RUNS) $(if $(SEED),--seed $(SEED)) $(ARGS)
run: $(STAGES) ## the whole recipe, from raw text to the table of results; finished stages are skipped
evidence: install data ## the whole recipe with seeds 1, 2 and 3
	@echo "evidence: benchmarks/seeds.py"
	@$(BIN)/python benchmarks/seeds.py --seeds 1 2 3 $(ARGS)

clean: ## remove caches and build leftovers; never .venv, data/ or runs/
	@find . \( -path ./.git -o -path './.venv*' -o -path ./data -o -path ./runs \) -prune -o \
		-name __pycache__ -type d -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

$(VENV)/bin/python $(MIN)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is needed and none is on PATH; say PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
		f"make: Python 3.11 or newer is needed; $(PYTHON) is {v[0]}.{v[1]}: say PYTHON=/path/to/python")'
	@echo "venv: $(@D:/bin=)"
	@"$(PYTHON)" -m venv $(@D:/bin=) || { rm -rf $(@D:/bin=); exit 1; }

$(STAMP): requirements.lock pyproject.toml
$(MIN)/.installed: requirements-min.txt pyproject.toml
# setuptools comes first: it builds deepspeed and this project. The import proves the install and writes its byte code.
$(STAMP) $(MIN)/.installed: %/.installed: | %/bin/python
	@echo "install: $< into $* (a minute, or as long as torch takes to download)"
	@$*/bin/python $(INSTALL) "$$(grep '^setuptools==' $<)"
	@$*/bin/python $(INSTALL) -r $<
	@$*/bin/python $(INSTALL) --no-deps -e .
	@$*/bin/python -W ignore -c 'import peft, sklearn.linear_model, wandb; from trl import RewardTrainer, SFTTrainer'
	@touch $@
