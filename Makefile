# make train     from a fresh clone to a tiny MPT that is trained, exported and generates; again: resumes, or says it is complete
# make twins     the same, and then: the tiny model learns to answer questions about Python's library, and to chat
# make storywriter  the tiny model goes on learning, in windows of 65,536 tokens
# make test      the tests that CI runs
# make test-long the others: minutes each, or another case of what those show
# make test-pip  the fast tests in the second environment: plain pip, torch 2.7.0
PYTHON   ?= python3
VENV     ?= .venv
VENV_PIP ?= .venv-pip
BIN      := $(VENV)/bin
RANKS    ?= 2
TEST     ?=
# Of the recipes of train and twins, for a quick look: make train OVERRIDES=max_duration=100ba
OVERRIDES ?=
WORKERS  ?= 4

# Many container images set it. Each process would compile torch and Composer anew then: 40 seconds instead of 14.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup train twins storywriter test test-long test-pip audit lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "setup       $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install -e '.[dev]' --constraint constraints.txt
	@touch $@

# Every step below knows by itself whether it is done, and says so in one line.
train: setup
	$(BIN)/llmtrain prep data_prep/tiny.yaml
	@echo "train       starting $(RANKS) ranks; they import for half a minute"
	$(BIN)/composer -n $(RANKS) train.py yamls/mpt-tiny.yaml $(OVERRIDES)
	$(BIN)/llmtrain export runs/mpt-tiny runs/mpt-tiny/export --overwrite
	$(BIN)/llmtrain generate runs/mpt-tiny/export --prompt 'def __init__(self' --prompt 'The "with" statement' --prompt 'import os' --max-new-tokens 48 --temperature 0.6
	@echo "loss curve  runs/mpt-tiny/loss.png"

# base -> instruct -> chat, the CPU twins of MPT-7B's fine-tuning runs
twins: train
	$(BIN)/llmtrain prep data_prep/tiny-instruct.yaml
	$(BIN)/composer -n $(RANKS) train.py yamls/mpt-tiny-instruct.yaml $(OVERRIDES)
	$(BIN)/llmtrain export runs/mpt-tiny-instruct runs/mpt-tiny-instruct/export --overwrite
	$(BIN)/llmtrain prep data_prep/tiny-chat.yaml
	$(BIN)/composer -n $(RANKS) train.py yamls/mpt-tiny-chat.yaml $(OVERRIDES)
	$(BIN)/llmtrain export runs/mpt-tiny-chat runs/mpt-tiny-chat/export --overwrite
	printf '%s\n' 'What is `argparse.ArgumentParser`?' '>>> 2 + 3' | $(BIN)/llmtrain chat runs/mpt-tiny-chat/export --temperature 0 --max-new-tokens 48
	@echo "loss curves runs/mpt-tiny-instruct/loss.png runs/mpt-tiny-chat/loss.png"

# The CPU twin of MPT-7B-StoryWriter. LONG=16384 is a quick look at the same: rows are cut, and the run has another name.
LONG     ?= 65536
STORY    := mpt-tiny-storywriter$(if $(filter-out 65536,$(LONG)),-$(LONG))
storywriter: train
	$(BIN)/llmtrain prep data_prep/tiny-storywriter.yaml
	$(BIN)/composer -n $(RANKS) train.py yamls/mpt-tiny-storywriter.yaml max_seq_len=$(LONG) run_name=$(STORY)
	@echo "by position runs/$(STORY)/loss_by_position.png"

# More workers than two cores: many tests wait for ranks that start, or for one another. Modules in the order of
# tests/conftest.py, the longest first.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "mypy and the audit, and on the other core: compiling what the tests import, which each worker would do"
	@$(BIN)/python -m pytest -q --collect-only $(TEST) > /dev/null & $(BIN)/python scripts/audit.py & audit=$$!; \
		$(BIN)/mypy; code=$$?; wait $$audit || code=1; wait; exit $$code
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m 'not long' $(TEST)

test-long: setup
	$(BIN)/python -m pytest -n 2 --dist loadscope -m long $(TEST)

$(VENV_PIP)/.ready: pyproject.toml
	@test -x $(VENV_PIP)/bin/python || $(PYTHON) -m venv $(VENV_PIP)
	$(VENV_PIP)/bin/python -m pip install --disable-pip-version-check '.[peft,tensorboard,mlflow]' pytest hypothesis
	@touch $@

# PYTHONSAFEPATH: what is installed is tested, not the checkout that stands in the working directory.
test-pip: $(VENV_PIP)/.ready
	$(VENV_PIP)/bin/python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall .
	PYTHONSAFEPATH=1 $(VENV_PIP)/bin/pytest -m 'not slow' $(TEST)

# Known vulnerabilities of what is installed, where the service can be asked.
audit: setup
	$(BIN)/python scripts/audit.py

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV_PIP) data runs
