# `make demo` shows what it does; `make test` runs the whole suite. Both set up what they need in .venv.
VENV ?= .venv
NEWEST_VENV ?= .venv-newest
LOWEST_VENV ?= .venv-lowest
OFFLINE = HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1
# Two files at a time, in the order of tests/conftest.py; tiny models gain nothing from more threads.
RUN_TESTS = $(OFFLINE) OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)
PYTEST ?=
TAG ?=

.PHONY: demo test test-newest test-lowest compatibility reference docs lint dist clean

demo: $(VENV)/.with-demo
	$(OFFLINE) $(VENV)/bin/salora demo

test: $(VENV)/.with-axolotl
	$(call RUN_TESTS,$(VENV))

# Axolotl pins TRL and Transformers; this runs everything but its tests against the newest releases.
test-newest: $(NEWEST_VENV)/.with-test
	$(call RUN_TESTS,$(NEWEST_VENV)) --compatibility-table loose

# The same against the lowest releases that pyproject.toml allows; a test compares the two.
test-lowest: $(LOWEST_VENV)/.with-test
	SALORA_LOWEST=1 $(call RUN_TESTS,$(LOWEST_VENV)) --compatibility-table loose

# Writes the table of docs/compatibility.md from the tests that stand for its rows.
compatibility: $(VENV)/.with-axolotl
	$(call RUN_TESTS,$(VENV)) -m compatibility --compatibility-table write

# Writes docs/reference/ from the code.
reference: $(VENV)/.with-axolotl
	$(VENV)/bin/python tools/write_reference.py

# Builds the pages into build/docs, without a network; Material's notice about MkDocs' next version is not shown.
docs: $(VENV)/.with-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

# Style, format, types, and which module may import which.
lint: $(VENV)/.with-axolotl
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	tools/check_types.sh $(VENV)
	$(OFFLINE) $(VENV)/bin/python -m pytest -q -p no:cacheprovider tests/test_architecture.py -k "not first"

# Source distribution and wheel into dist/, checked, and the release notes; TAG=v1.2.3 where it is the release itself.
dist: $(VENV)/.with-release
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation --outdir dist
	$(VENV)/bin/twine check --strict dist/*
	SALORA_DISTRIBUTIONS=$(CURDIR)/dist $(OFFLINE) $(VENV)/bin/python -m pytest -q tests/test_distribution.py
	$(VENV)/bin/python tools/write_release_notes.py dist/RELEASE_NOTES.md --tag "$(TAG)"

# An environment made for the tests can run the demo, too; it is not made twice.
$(VENV)/.with-demo: pyproject.toml tools/setup_environment.sh
	@test -e $(VENV)/.with-axolotl || tools/setup_environment.sh $(VENV) demo
	@touch $@

$(VENV)/.with-axolotl: pyproject.toml tools/setup_environment.sh
	tools/setup_environment.sh $(VENV) axolotl,test
	@touch $@

$(VENV)/.with-docs: $(VENV)/.with-axolotl
	tools/setup_environment.sh $(VENV) docs
	@touch $@

$(VENV)/.with-release: $(VENV)/.with-axolotl
	tools/setup_environment.sh $(VENV) release
	@touch $@

$(NEWEST_VENV)/.with-test: pyproject.toml tools/setup_environment.sh
	tools/setup_environment.sh $(NEWEST_VENV) test
	@touch $@

$(LOWEST_VENV)/.with-test: pyproject.toml tools/setup_environment.sh
	tools/setup_environment.sh $(LOWEST_VENV) test lowest
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST_VENV) $(LOWEST_VENV) build dist *.egg-info demo-results
