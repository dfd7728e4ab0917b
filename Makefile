PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN ?= runs/bench
MNIST ?= data/mnist
ANALYSED := drsl standard at trades mart probscut_trades drsl_at sensible at_apd

.PHONY: help demo picture analyses study interop docs tour test processors slow check bench bench-gpu bench-growth bench-scale bench-verdict clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed ## train, attack and compare on scikit-learn's digits; ends with runs/demo/report.html
	$(BIN)/unmoved demo

picture: demo ## README's picture of the demo, as its report draws it
	cp runs/demo/report-figures/tradeoff.svg docs/images/demo-tradeoff.svg

analyses: .venv/installed ## what docs/analyses says of MNIST: 17 small models, four analyses; MNIST=folder
	$(BIN)/unmoved compare mnist/study_at --sweep attack.eps.to=0,0.1,0.2,0.3 --splits 2 --attacks quick --set data.path=$(MNIST) --out runs/analyses/eps
	$(BIN)/unmoved compare $(ANALYSED:%=mnist/%) --attacks quick --set data.path=$(MNIST) --set training.epochs=3 --set model.width=8 --set evaluation.n=1000 --set 'training.part={of=2,number=0}' --out runs/analyses/methods
	for what in softmax 'corruption --no-deep --n 500' tradeoff; do $(BIN)/unmoved analyze $$what $$(dirname runs/analyses/*/*/*/recipe.toml) --out runs/analyses/analysis || exit 1; done
	$(BIN)/unmoved analyze corruption --n 500 runs/analyses/methods/mnist-at/seed0 --out runs/analyses/analysis-of-at
	$(BIN)/unmoved analyze bias-variance $$(dirname runs/analyses/eps/*/*/recipe.toml) --eps 0,0.1,0.2,0.3 --modes own,shared,joint --out runs/analyses/analysis

study: .venv/installed ## the study of docs/studies/protocol.md and its page, going on where it stands: days; MNIST=folder, CIFAR10=folder, GPU=1
	$(BIN)/python benchmarks/study.py digits
	$(BIN)/python benchmarks/study.py mnist --data $(MNIST)
	$(BIN)/python benchmarks/study.py mnist-l2 --data $(MNIST)
	$(if $(CIFAR10),$(BIN)/python benchmarks/study.py cifar10$(if $(GPU),-gpu) --data $(CIFAR10))
	$(BIN)/python benchmarks/results.py

interop: .venv/installed-dev ## libraries that the tests of interop need, without what they pin
	$(PIP) --no-deps torchattacks requests idna urllib3 certifi charset-normalizer tqdm
	echo 'setuptools<81' > .venv/constraints && PIP_CONSTRAINT=.venv/constraints $(PIP) --no-deps adv-lib
	$(PIP) transformers

docs: .venv/installed-dev ## serve the documentation and open it; nothing of it is fetched from elsewhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --open

tour: .venv/installed-dev ## run docs/tour.ipynb anew, and make its page docs/tour.md of it
	OMP_NUM_THREADS=1 $(BIN)/python -m nbconvert --log-level WARN --to notebook --execute --inplace docs/tour.ipynb
	$(BIN)/python -m nbconvert --log-level WARN --to markdown docs/tour.ipynb

bench: .venv/installed ## speeds: steps against a plain reference, what methods add, analyses, verdicts against a peer
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/corruption.py
	$(BIN)/python benchmarks/softmax.py
	$(MAKE) bench-verdict

bench-gpu: .venv/installed ## seconds an epoch on a GPU, against the reference on the same card
	$(BIN)/python benchmarks/gpu.py

bench-scale: .venv/installed ## how costs grow with attack steps, passes, image size and processes
	$(BIN)/python benchmarks/scale.py

bench-growth: .venv/installed ## how time, memory and bytes grow with classes, images, runs, epochs and parameters
	$(BIN)/python benchmarks/growth.py

bench-verdict: .venv/installed $(RUN) ## verdicts alone; RUN=runs/mine for a run of yours, AUTOATTACK=path for the reference
	$(PIP) --no-deps torchattacks requests idna urllib3 certifi charset-normalizer tqdm
	$(BIN)/python benchmarks/verdict.py speed $(RUN)

runs/bench: | .venv/installed
	$(BIN)/unmoved train digits/trades --out runs/bench

test: .venv/installed-dev ## the whole suite
	$(BIN)/python -m pytest

processors: .venv/installed-dev ## the suite as an older processor computes: with AVX2, and with SSE4.1 alone
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest

slow: .venv/installed-dev ## what takes minutes: kills at many moments, fuzzing, the GPU bench in miniature
	$(BIN)/python -m pytest -m slow tests/slow tests/cli/test_interrupts.py

check: .venv/installed-dev ## lint, formatting, types, then the suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

clean: ## remove the virtual environment and caches; runs stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build src/*.egg-info
