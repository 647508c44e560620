# make setup        .venv with everything in requirements.txt
# make quickstart   four arms on the embedded digits: grids, convergence.png, table of speedups
# make distill      few-step students of the quickstart's residual arm: {residual, DAR} x {1, 4 steps}
# make test         all tests
# make study        the study as it is meant: CIFAR-10 on the GPUs of this machine, all of them side by side
# make study-pilots short runs before it, from which to choose its LR= and DEPTH=
# make study-cpu    the present form of docs/older-studies.md: digits, and CIFAR-10 at a small width
#
# Without a network, they take CIFAR10=path/to/train.parquet, and the first two ENCODER=FOLDER in place of DINOv2 and
# JUDGE=FOLDER in place of Inception. STEPS says how long each run of the first is.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DIGITS := data/digits
RUNS := runs/quickstart
CIFAR10 ?= uoft-cs/cifar10
CIFAR := data/cifar10
ENCODER ?= dinov2-vit-b
JUDGE ?= inception
METRIC := $(if $(filter inception,$(JUDGE)),fid,frechet_distance)
STEPS ?= 20000
TEACHER := $(RUNS)/routing=residual,alignment=none,seed=0/last.pt
DISTILLED := runs/distilled
LR ?= 1e-4
DEPTH ?= 12
STUDY := runs/study

# At shapes that a CPU can train, more threads mostly wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: setup quickstart distill test digits cifar10 study study-pilots study-cpu
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --requirement requirements.txt
	touch $@

digits: setup
	$(RUN) -m dataset.prepare digits --out $(DIGITS)
	$(RUN) -m dataset.standin_encoder $(DIGITS) --epochs 10 --lr 2e-3 --kind convnet --out $(DIGITS)/judge & \
	$(RUN) -m dataset.standin_encoder $(DIGITS) --epochs 10 --lr 2e-3 --out $(DIGITS)/encoder && wait $$!
	$(RUN) -m dataset.prepare digits --out $(DIGITS) --encoder $(DIGITS)/encoder

quickstart: digits
	$(RUN) sweep.py --config digits --eval-every 100 --out $(RUNS) --routing residual dar --alignment none repa
	$(RUN) -m analysis.convergence $(RUNS)/*/ --reference residual --out $(RUNS)/convergence

$(TEACHER): | digits
	$(RUN) train_repa_dar.py --config digits --out $(@D)

# One student on each of two cores. Then all of them against the teacher's samples, with those of its own four steps.
distill: $(TEACHER)
	for steps in 1 4; do \
		$(RUN) distill.py --config digits --student-steps $$steps --out $(DISTILLED)/residual-$$steps & \
		$(RUN) distill.py --config digits --student-steps $$steps --routing dar --chunk-summary sum --retrofit-steps 20 \
			--out $(DISTILLED)/dar-$$steps && wait $$! || exit 1; \
	done
	for name in residual-1 residual-4 dar-1 dar-4; do \
		$(RUN) -m eval.sample $(DISTILLED)/$$name/last.pt --seed 1 --num-samples 1000 --out $(DISTILLED)/samples/$$name || exit 1; \
	done
	$(RUN) -m eval.sample $(TEACHER) --sampler euler --steps 4 --seed 1 --num-samples 1000 --out $(DISTILLED)/samples/euler-4
	$(RUN) -m eval.sample $(TEACHER) --sampler euler --steps 16 --num-samples 1000 --out $(DISTILLED)/teacher
	$(RUN) -m eval.metrics $(DISTILLED)/samples/*/*.npz --judge $(DIGITS)/judge --reference $(DISTILLED)/teacher/teacher.npz
	$(RUN) -m analysis.spectrum $(DISTILLED)/samples/*/*.npz --out $(DISTILLED)/spectrum \
		--reference $(DIGITS) $(DISTILLED)/teacher/teacher.npz

cifar10: setup
	$(RUN) -m dataset.prepare $(CIFAR10) --out $(CIFAR) --resolution 32

study-pilots: cifar10
	$(RUN) sweep.py --config cifar10 --encoder $(ENCODER) --eval-encoder $(JUDGE) --metric $(METRIC) --max-steps 2000 --out $(STUDY)/cifar10-pilots \
		--routing residual dar --depth 12 28 --lr 1e-4 3e-4 1e-3 --seeds 0

study: cifar10
	$(RUN) sweep.py --config cifar10 --encoder $(ENCODER) --eval-encoder $(JUDGE) --metric $(METRIC) --lr $(LR) --depth $(DEPTH) --max-steps $(STEPS) \
		--eval-every 1000 --out $(STUDY)/cifar10 \
		--routing residual dar --query timestep dynamic --alignment none repa --seeds 0 1 2
	$(RUN) sweep.py --config cifar10 --encoder $(ENCODER) --eval-encoder $(JUDGE) --metric $(METRIC) --lr $(LR) --depth $(DEPTH) --max-steps $(STEPS) \
		--eval-every 1000 --out $(STUDY)/cifar10-depth-chunk \
		--routing dar --alignment repa --align-depth 2 4 6 8 --chunk-size 1 2 4 8 --seeds 0 1
	$(RUN) -m analysis.convergence $(STUDY)/cifar10/*/ --metric $(METRIC) --reference residual --out $(STUDY)/cifar10

study-cpu: digits cifar10
	$(RUN) -m dataset.standin_encoder $(CIFAR) --out $(CIFAR)/encoder --patch-size 4 --epochs 5 --batch-size 128
	$(RUN) -m dataset.standin_encoder $(CIFAR) --kind convnet --out $(CIFAR)/judge --epochs 5 --batch-size 128
	$(RUN) -m dataset.prepare $(CIFAR10) --out $(CIFAR) --resolution 32 --encoder $(CIFAR)/encoder --token-grid 8
	$(RUN) sweep.py --config digits --out $(STUDY)/digits \
		--routing residual dar attnres unet --query timestep static dynamic --alignment none repa --seeds 0 1
	$(RUN) sweep.py --config digits --out $(STUDY)/digits-depth-chunk \
		--routing dar --alignment repa --align-depth 2 4 6 --chunk-size 1 2 4 8 --seeds 0 1
	$(RUN) sweep.py --config cifar10_cpu --out $(STUDY)/cifar10-cpu \
		--routing residual dar --chunk-size 1 4 --alignment none repa --seeds 0 1
	$(RUN) -m analysis.convergence $(STUDY)/digits/*/ --reference residual --out $(STUDY)/digits
	$(RUN) -m analysis.convergence $(STUDY)/cifar10-cpu/*/ --reference residual --targets 30 20 10 7 5 \
		--out $(STUDY)/cifar10-cpu

test: setup
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15 tests
