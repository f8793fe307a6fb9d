# `make demo` shows what it does; `make test` runs the whole suite. Both set up what they need in .venv.
VENV ?= .venv
NEWEST_VENV ?= .venv-newest
OFFLINE = HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1
# Two files at a time; tiny models gain nothing from more threads.
RUN_TESTS = $(OFFLINE) OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST)
PYTEST ?=

.PHONY: demo test test-newest compatibility lint clean

demo: $(VENV)/.with-demo
	$(OFFLINE) $(VENV)/bin/salora demo

test: $(VENV)/.with-axolotl
	$(call RUN_TESTS,$(VENV))

# Axolotl pins TRL and Transformers; this runs everything but its tests against the newest releases.
test-newest: $(NEWEST_VENV)/.with-test
	$(call RUN_TESTS,$(NEWEST_VENV)) --compatibility-table loose

# Writes the table of docs/compatibility.md from the tests that stand for its rows.
compatibility: $(VENV)/.with-axolotl
	$(call RUN_TESTS,$(VENV)) -m compatibility --compatibility-table write

# Style, format, types, and which module may import which.
lint: $(VENV)/.with-axolotl
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	tools/check_types.sh $(VENV)
	$(OFFLINE) $(VENV)/bin/python -m pytest -q -p no:cacheprovider tests/test_architecture.py -k "not first"

# An environment made for the tests can run the demo, too; it is not made twice.
$(VENV)/.with-demo: pyproject.toml tools/setup_environment.sh
	@test -e $(VENV)/.with-axolotl || tools/setup_environment.sh $(VENV) demo
	@touch $@

$(VENV)/.with-axolotl: pyproject.toml tools/setup_environment.sh
	tools/setup_environment.sh $(VENV) axolotl,test
	@touch $@

$(NEWEST_VENV)/.with-test: pyproject.toml tools/setup_environment.sh
	tools/setup_environment.sh $(NEWEST_VENV) test
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST_VENV) build dist *.egg-info demo-results
