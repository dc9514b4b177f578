# The front door for people.  `make` or `make help` explains every target.
SHELL := /bin/sh
PY    := .venv/bin/python
VECTORS ?= ../shared/vectors
export VECTORS
# Nothing of the caller's Python may leak in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
BOOT  := python3 tools/bootstrap.py
JOBS  ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-pods test check format lint types imports unit bench again test-root \
        test-docker wheel-test proto docs tables requirements audit clean

help: ## Show this list
	@echo "spiffe-issuer: workload identity from a fresh clone.  Start with: make demo"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 22

setup: ## Only set up: what the tests and every page of docs/ need, in .venv and .venv-envoy
	@$(BOOT) dev

demo: ## Server, agent, two workloads in mutual TLS, a refusal, a renewal (JSON=1 for programs)
	@$(BOOT) run
	@$(PY) -m demo $(if $(JSON),--json)

demo-pods: ## The same with pods in real containers, and who tries to pass for one (root; JSON=1)
	@$(BOOT) dev
	@$(PY) tools/tiers.py docker
	@$(PY) -m demo.pods $(if $(JSON),--json)

test: ## The whole suite that needs pip alone (no root, no apt); JOBS=8 uses more cores
	@$(BOOT) dev
	@$(PY) tools/tiers.py
	$(PY) -m pytest -q -rs -n $(JOBS) --dist loadfile -m "not root and not docker"

check: ## Before every commit: format, lint, types, import rules, unit tests
	@$(BOOT) dev
	@$(MAKE) --no-print-directory format lint types imports unit

format: ## Is the code formatted?  (to format: .venv/bin/ruff format .)
	$(PY) -m ruff format --check .

lint: ## Ruff's rules, security ones among them
	$(PY) -m ruff check .

types: ## mypy, strict
	$(PY) -m mypy

imports: ## The borders between the packages
	.venv/bin/lint-imports --no-cache

unit: ## The quick tests: values, parsers, decisions, import rules
	$(PY) -m pytest -q -n $(JOBS) tests/unit tests/architecture

bench: ## Every performance claim, as a ratio measured in one run
	@$(BOOT) dev
	$(PY) -m bench

again: ## What failed in the last run of tests, once more by itself
	$(PY) -m pytest -q -rs --last-failed --last-failed-no-failures none

test-root: ## PID reuse, other uids, namespaces (needs root; says what it leaves out)
	@$(BOOT) dev
	@$(PY) tools/tiers.py root
	$(PY) -m pytest -q -rs -m "root or apt" tests

test-docker: ## Tests that need a container engine (says what it leaves out)
	@$(BOOT) dev
	@$(PY) tools/tiers.py docker
	$(PY) -m pytest -q -rs -m docker tests/docker

wheel-test: ## Build the wheel, install it in an empty environment, run and migrate
	@$(BOOT) dev
	$(PY) -m pytest -q tests/packaging

proto: ## Generate spiffe_wire/pb from proto/
	@$(BOOT) dev
	$(PY) tools/genproto.py

docs: ## Generate the reference pages and tables
	@$(BOOT) dev
	$(PY) tools/reference_docs.py
	$(PY) tools/rule_tables.py

tables: ## Generate the conformance and security tables alone
	$(PY) tools/rule_tables.py

requirements: ## Pin and hash the dependencies anew
	@$(BOOT) dev
	$(PY) tools/pin.py

audit: ## Known vulnerabilities in what is pinned
	@$(BOOT) dev
	$(PY) -m pip_audit --disable-pip --require-hashes -r requirements/dev.txt
	$(PY) -m pip_audit --disable-pip --require-hashes -r requirements/envoy.txt

clean: ## Remove what the targets made
	rm -rf .venv .venv-envoy .cache .mypy_cache .ruff_cache .hypothesis dist build .bootstrap.lock
