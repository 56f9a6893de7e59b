# make train   fine-tunes Gemma 3 270M federatedly on real chats
# make test    runs the tests; make check the linters; make golden the goldens
# make chaos   kills TRIALS=30 runs at random moments and compares what they end with
# make bench   times us against peers and the machine, into benchmarks/results/
# Each makes .venv when it is missing and needs only python3 with pip.
PYTHON ?= python3
CONFIG ?= configs/chitchat_gemma3.py
TRIALS ?= 30
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test test-slow check golden chaos bench clean

train: $(VENV)/train
	$(BIN)/python -m launch.train --config=$(CONFIG) --workdir=$(WORKDIR) $(FLAGS)

test: $(VENV)/test
	$(BIN)/python -m pytest -n 2 -q $(FLAGS)

test-slow: $(VENV)/test
	$(BIN)/python -m pytest -q -m slow $(FLAGS)

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

golden: $(VENV)/test
	$(BIN)/python -m tests.make_golden

chaos: $(VENV)/test
	$(BIN)/python -m tests.chaos $(TRIALS)

bench: $(VENV)/train $(VENV)-bench/done
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.peers --config=configs/chitchat_smollm2.py --out=benchmarks/results/peers_smollm2.json
	$(BIN)/python -m benchmarks.limit
	$(BIN)/python -m benchmarks.start
	$(BIN)/python -m benchmarks.growth

# The peers, in a virtual environment of their own.
$(VENV)-bench/done: setup.py
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet '.[bench]'
	touch $@

# One stamp a set of extras, so that `make train` installs no test tools.
$(VENV)/train: setup.py
	$(call install,gemma$(,)chat)
$(VENV)/test: setup.py
	$(call install,gemma$(,)chat$(,)test)
$(VENV)/dev: setup.py
	$(call install,gemma$(,)chat$(,)dev)

, := ,
define install
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --editable '.[$(1)]'
touch $@
endef

clean:
	rm -rf $(VENV) $(VENV)-bench runs
