.PHONY: help install test test-fast test-gpu gpu gpu-model test-long test-pretend test-faults test-fuzz test-browser lint format bench compiled bench-kernels bench-gpu bench-gpu-model results screenshot metrics memory tour wheel ci clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: ## editable install with the development tools
	python -m pip install -e '.[dev,alfworld]'

test: ## every test that this machine can run
	python -m pytest

test-fast: ## without the tests that train
	python -m pytest -m 'not slow and not long'

test-gpu: ## the tests that need a CUDA device, in one process
	python -m pytest -n 0 -m gpu

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

bench-gpu: ## all that needs a GPU, within 25 minutes; a part that fails stops no other
	-timeout 360 python -m bench.ties
	-timeout 120 python -m bench.ema
	-timeout 120 python -m bench.nf4
	-timeout 840 python -m bench.policy_head
	-python -m bench.report --write

# For a GPU that is at hand for a quarter of an hour
gpu: ## the kernels' tests and the rows that decide, within 9 minutes
	-timeout 120 python -m pytest -q -n 0 -m gpu tests/kernels
	-timeout 130 python -m bench.ties --repeats 3
	-timeout 60 python -m bench.ema --repeats 3
	-timeout 200 python -m bench.policy_head --widths 3584 --rows 1024 8192 --chunks 8388608 134217728
	-timeout 30 python -m bench.nf4 --repeats 3
	-python -m bench.report --write

LARGE = --model qwen2.5-vl-7b --random-weights --only kl --no-memory
LARGE += --envs 64 --max-new-tokens 100 --updates 2

gpu-model: ## whole updates of a model of 7B, without and with decode graphs, within 9 minutes
	-timeout 260 python -m bench.train_step $(LARGE) --steps 64 --recipe-steps 0
	-timeout 260 python -m bench.train_step $(LARGE) --steps 64 --recipe-steps 0 --decode-graphs

# The last line holds the published recipe's two models beside ours: some 80 GB
bench-gpu-model: ## whole updates of a model of 7B, also beside the published recipe: 22 minutes
	-timeout 440 python -m bench.train_step $(LARGE) --steps 128 --recipe-steps 0
	-timeout 440 python -m bench.train_step $(LARGE) --steps 128 --recipe-steps 0 --decode-graphs
	-timeout 440 python -m bench.train_step $(LARGE) --steps 128 --recipe-steps 4

results: ## train and draw what the README shows, into docs/results/; resumes
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
