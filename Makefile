.PHONY: help install test test-fast test-gpu test-gpu-plan gpu gpu-model wheels test-long test-pretend test-faults test-fuzz test-browser lint format bench compiled bench-kernels bench-gpu bench-gpu-model results screenshot metrics memory tour wheel ci clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: ## editable install with the development tools
	python -m pip install -e '.[dev,alfworld]'

test: ## every test that this machine can run
	python -m pytest

test-fast: ## without the tests that train
	python -m pytest -m 'not slow and not long'

test-gpu: ## the Triton kernels' tests on a GPU, then what needs one; test-gpu-plan: 7B shapes, minutes
	python -m pytest -n 8 -m 'not long' -k triton tests/kernels
	python -m pytest -n 8 -m 'gpu and not long' tests/turbo

test-gpu-plan: ## whether the memory planner is right within a tenth, for a model of 7B
	python -m pytest -n 0 -s -m 'gpu and long' --timeout 0

test-long: ## what takes minutes, but for make test-faults
	python -m pytest -m long --timeout 0 --ignore tests/reliability

test-pretend: ## runs and benchmarks on a GPU that is not there, with the Triton kernels: minutes
	python -m pytest -m 'long or not long' --timeout 0 tests/turbo/test_pretend_gpu.py tests/bench/test_pretend_bench.py

test-faults: ## a run is killed 40 times; 200 updates are watched: minutes
	python -m pytest -n 0 -s -m long --timeout 0 tests/reliability

test-fuzz: ## 40,000 hostile inputs
	python -m pytest -m fuzz --timeout 0 --hypothesis-profile fuzz

test-browser: ## the page of turbo.view in Chromium (apt-get install chromium chromium-driver)
	python -m pytest -n 0 -rs -s tests/turbo/test_view_browser.py

lint: ## ruff: rules and format, changing nothing
	ruff check .
	ruff format --check .

format: ## ruff: apply the fixes and the format
	ruff check --fix .
	ruff format .

bench: ## the speed of training updates, beside the published recipe's, and of ALFWorld
	python -m bench.train_step
	python -m bench.alfworld

compiled: ## what Triton's compiler makes of the kernels for GPUs, into kernels/README.md; no GPU
	python -m pytest -n 0 -m 'long or not long' tests/bench/test_compiled.py
	python -m bench.compiled --write

bench-kernels: ## the kernels against their rivals, into bench/results/ and kernels/README.md
	for what in ties ema nf4 policy_head; do python -m bench.$$what; done
	python -m bench.report --write

bench-gpu: ## all kernels and their tests on a GPU, within 25 minutes; a part that fails stops no other
	python -m bench.gpu --what kernels --minutes 25
	-python -m bench.report --write

# For a GPU that is at hand for a quarter of an hour
gpu: ## the same within 9 minutes: the rows that decide come first
	-python -m bench.gpu --what kernels --minutes 9
	-python -m bench.report --write

gpu-model: ## whole updates of a model of 7B, without and with decode graphs, within 9 minutes
	python -m bench.gpu --what model --minutes 9

bench-gpu-model: ## the same, and beside the published recipe, whose two models take some 80 GB: 16 minutes
	python -m bench.gpu --what model recipe --minutes 16

# Of another machine, which has no network: its Python, and what torch and transformers do not bring
FOR = 3.12
WHEELS = tyro docstring-parser typeguard gymnasium farama-notifications bitsandbytes
WHEELS += liger-kernel cut-cross-entropy

wheels: ## what the benchmarks need, into .whl/, for a machine with torch, transformers and no network
	python -m pip download -q --no-deps --only-binary=:all: --python-version $(FOR) --implementation cp \
	    $(foreach n,2_28 2_27 2_24 2_17,--platform manylinux_$(n)_x86_64) --platform manylinux2014_x86_64 \
	    -d .whl $(WHEELS)

results: ## train what the README shows and is not on record, draw it, into docs/results/; resumes
	@set -e; for what in points24 ezpoints collapse; do python -m bench.learn --what $$what; done

# Four times the usual learning rate, held to the end: without a teacher the policy is ruined
HARSH = --learning-rate 0.0028 --final-learning-rate 0.0028 --steps-per-update 2048 --updates 20
HARSH += --eval-episodes 200 --eval-every 5

screenshot: ## docs/view.png, of two runs that are trained for it where they are not there; Chromium
	test -d runs/with-teacher || python -m turbo.train points24 --out runs/with-teacher $(HARSH)
	test -d runs/without-teacher || \
	    python -m turbo.train points24 --out runs/without-teacher --guidance none $(HARSH)
	python -m turbo.view runs/with-teacher runs/without-teacher --out runs/both.html
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1660,2020 \
	    --virtual-time-budget=3000 --screenshot=docs/view.png "file://$(CURDIR)/runs/both.html#19/54/1"

metrics: ## write docs/metrics.md
	python -m bench.metrics_page

tour: ## put the lines right that the docs link to
	python -m bench.tour_links

memory: ## write docs/results/memory.md and its table in README.md, from the planner
	python -m bench.memory_page

wheel: ## sdist and wheel into dist/
	python -m build

ci: ## what CI runs, on the last commit
	bash .ci/run

clean: ## remove what builds and tests leave
	rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
