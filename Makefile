# make install makes .venv, with what a run needs
# make train   fine-tunes Gemma 3 270M federatedly on real chats
# make test    runs the tests; make check the linters; make golden the goldens
# make test-all  also runs the heavy tests, an hour; one of them downloads SmolLM2
# make mutations  breaks lines of the rules, one at a time; a test must notice each
# make chaos   kills TRIALS=30 runs at random moments and compares what they end with
# make report-check  looks at a page of launch.report with Chromium and axe
# make bench   times us against peers and the machine, into benchmarks/results/
# make figures puts what is in benchmarks/results/ into README.md and docs/
# make accelerator  says how the check on a GPU is run
# make study   runs what is missing of docs/results.md, hours; kill and repeat at will
# make docs    builds the documentation into site/; make docs-serve shows it
# make package-check  builds wheel and sdist, and trains with the wheel elsewhere
# make test-versions  a few tests (FULL=1: all) with Python 3.12 and 3.13, newest releases
# make test-minimum   the same with 3.11 and the oldest releases that setup.py allows
# Each makes .venv when it is missing and needs only python3 with pip.
PYTHON ?= python3
CONFIG ?= configs/chitchat_gemma3.py
TRIALS ?= 30
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install study train test test-all mutations check golden chaos report-check bench \
  figures accelerator clean \
  docs docs-serve package-check test-versions test-minimum

install: $(VENV)/train

train: $(VENV)/train
	$(BIN)/python -m launch.train --config=$(CONFIG) --workdir=$(WORKDIR) $(FLAGS)

test: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q $(FLAGS)

test-all: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m 'slow or not slow' $(FLAGS)

mutations: $(VENV)/test
	$(BIN)/python -m tests.mutations $(WORDS)

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

golden: $(VENV)/test
	$(BIN)/python -m tests.make_golden

chaos: $(VENV)/test
	$(BIN)/python -m tests.chaos $(TRIALS)

report-check: $(VENV)/test
	$(BIN)/python -m pytest -q -s -rs -m slow tests/report_browser_test.py

bench: $(VENV)/train $(VENV)-bench/done
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.peers --config=configs/chitchat_smollm2.py --result=benchmarks/results/peers_smollm2.json
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit; done
	$(BIN)/python -m benchmarks.evaluation --config=configs/study.py:chat

BENCHMARKS := limit start growth generation client_step levers grid resume

figures: $(VENV)/train
	$(BIN)/python -m benchmarks.figures

accelerator:
	@sed -n '/^"""/,/^"""/p' benchmarks/accelerator.py | tr -d '"'

study: $(VENV)/train
	$(BIN)/python -m benchmarks.study
	$(BIN)/python -m benchmarks.study_report

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

package-check: $(VENV)/dev
	$(BIN)/python -m tests.package_check

# Interpreters that pyenv may have beside the one that is python3.
VERSIONS ?= 3.12 3.13
interpreter = $(firstword $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python) python$(1))
A_FEW := $(addprefix tests/,rounds_test.py rules_test.py decoder_test.py \
  kernels_test.py config_test.py cohorts_test.py experiment_test.py \
  tutorial_test.py)
TESTS = $(if $(FULL),,$(A_FEW))

test-versions: $(addprefix test-,$(VERSIONS))

$(addprefix test-,$(VERSIONS)): test-%: $(VENV)-%/test
	$(VENV)-$*/bin/python -m pytest -n 1 -q $(TESTS) $(FLAGS)

$(VENV)-3.%/test: setup.py
	$(call interpreter,3.$*) -m venv $(VENV)-3.$*
	$(VENV)-3.$*/bin/python -m pip install --quiet --editable '.[gemma,chat,test]'
	touch $@

# Old releases meet newer ones of what they need, which may deprecate their calls.
test-minimum: $(VENV)-minimum/test
	HETLORA_CACHE=$(CURDIR)/$(VENV)-minimum/cache $(VENV)-minimum/bin/python \
	  -m pytest -n 1 -q -W ignore::DeprecationWarning $(TESTS) $(FLAGS)

$(VENV)-minimum/test: setup.py tests/minimum.py
	$(call interpreter,3.11) -m venv $(VENV)-minimum
	$(PYTHON) -m tests.minimum > $(VENV)-minimum/constraints.txt
	$(VENV)-minimum/bin/python -m pip install --quiet --editable '.[gemma,chat,test]' \
	  --constraint $(VENV)-minimum/constraints.txt
	touch $@

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
$(VENV)/docs: setup.py
	$(call install,docs)

, := ,
define install
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --editable '.[$(1)]'
touch $@
endef

clean:
	rm -rf $(VENV) $(VENV)-* runs site
