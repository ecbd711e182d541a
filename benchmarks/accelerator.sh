#!/usr/bin/env bash
# All that a machine with an accelerator has to say, in one command of less than ten minutes.
#
#   bash benchmarks/accelerator.sh            there, in the project's root: the canary, benchmarks/speed.py, the authors' step
#                                             through PyTorch on the same card, the tests; what they print goes to $OUT
#   bash benchmarks/accelerator.sh wheels     before that, where there is a network: what that machine lacks, into runs/wheels
#
# Every part has a time limit of its own. A part that fails is named, and the next one begins; the exit code is the number of
# parts that failed. The nets are those of runs/weights (`python benchmarks/nets.py --data_dir DIR --export runs/weights
# --num_images 200`, which are 15 MB), or else untrained ones on noise. runs/weights and runs/wheels are not part of the checkout:
# bring them along. speed.py runs in JAX's default precision, which on NVIDIA rounds the factors of products to 10 bits, and in full
# float32; so does the authors' step (--tf32). The tests run in full float32; those that want two devices fail where there is one.
#
# Compilation takes most of the time (20 to 50 s for a step of Deep Defense on an H200), so that all programs are first compiled
# at the same time, into a cache that the timings read; what they say of compilation is then the time of that reading.
#
# Variables: OUT (runs/accelerator), PYTHON (python3), TORCH_PYTHON (PYTHON's), DEVICE (cuda; PyTorch's name for it), NETS, BATCHES,
# TESTS (tests; or files of it), WORKERS (6 processes of pytest, 0: one, without pytest-xdist), PERCENT (100; of the time limits).
# Run on a CPU with DEVICE=cpu to see that it works. benchmarks/README.md has what an H200 said.

cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
LACKING="ml-collections tensorflow-datasets array-record grain importlib-resources beartype tensorboardX immutabledict dm-tree
    simple-parsing docstring-parser tensorflow-metadata googleapis-common-protos termcolor toml portpicker"

if [ "$1" = wheels ]; then
    mkdir -p runs/wheels
    platforms=$(for n in 28 27 24 17 12 5; do echo "--platform manylinux_2_${n}_x86_64"; done)
    $PYTHON -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
        --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform any -d runs/wheels $LACKING || exit 1
    $PYTHON -m pip wheel -q --no-deps -w runs/wheels promise  # It comes as source alone; pure Python.
    exit
fi

export OUT=${OUT:-runs/accelerator} PYTHONUNBUFFERED=1
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && WORK=$(mktemp -d) || exit 1
TORCH_PYTHON=${TORCH_PYTHON:-$PYTHON} DEVICE=${DEVICE:-cuda} TESTS=${TESTS:-tests} WORKERS=${WORKERS:-6}
NETS=${NETS:-mlp lenet convnet nin} WEIGHTS=runs/weights
if ls runs/wheels/*.whl >/dev/null 2>&1; then
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$WORK/site" runs/wheels/*.whl &&
        export PYTHONPATH="$WORK/site:$PYTHONPATH"
fi
FAILED=()

# part NAME SECONDS COMMAND...: runs it into $OUT/NAME.log (a second part of that name is added to it).
part() {
    local name=$1 limit=$(($2 * ${PERCENT:-100} / 100)) code start=$SECONDS
    shift 2
    printf '\n$ %s\n' "$*" >>"$OUT/$name.log"
    timeout -s INT -k 10 "$limit" "$@" >>"$OUT/$name.log" 2>&1
    code=$?
    if [ $code = 0 ]; then
        say "$name: done in $((SECONDS - start)) s"
    else
        FAILED+=("$name")
        [ $code = 124 ] || [ $code = 137 ] && code="$code, stopped at its limit of $limit s,"
        say "$name: FAILED with $code after $((SECONDS - start)) s: $*"
    fi
    tail -n 25 "$OUT/$name.log"
}

say() { echo "== $*" | tee -a "$OUT/summary.log"; }

rm -f "$OUT"/{summary,environment,nets,canary,compile,speed,authors,tests}.log
part environment 20 $PYTHON -c "
import importlib.metadata as m, jax, platform, subprocess, sys
print(platform.python_version(), *(f'{p} {m.version(p)}' for p in ('jax', 'jaxlib', 'flax', 'numpy')), jax.devices())
print(*(d.metadata['Name'] for d in m.distributions() if 'cuda' in d.metadata['Name']))
sys.exit(0 if '$DEVICE' == 'cpu' or jax.default_backend() != 'cpu' else 'JAX sees no accelerator')"
command -v nvidia-smi >/dev/null && nvidia-smi >>"$OUT/environment.log"
part canary 45 env JAX_DEFAULT_MATMUL_PRECISION=highest $PYTHON -c "
import sys
from dd_jax import xla
from dd_jax.xla import canary
print('on the CPU:', settings := xla.set_flags())
import jax, numpy as np
wrong = list(settings.failures)
for name, program in canary.programs().items():  # On the first device, each by its largest error.
    error = np.max(np.abs(np.asarray(jax.jit(program.run)(*program.arguments), float) - program.right))
    print(jax.devices()[0].platform, name, error / np.max(np.abs(program.right)), flush=True)
    wrong += [name] * (not error <= canary.TOLERANCE * np.max(np.abs(program.right)))
sys.exit('wrong: ' + ', '.join(wrong) if wrong else 0)"
for net in $NETS; do
    [ -f "$WEIGHTS/$net.npz" ] && continue
    say "no $WEIGHTS/$net.npz: untrained nets on noise instead"
    WEIGHTS=$WORK/weights
    part nets 40 $PYTHON benchmarks/nets.py --random --export "$WEIGHTS" --nets $NETS
    break
done
chosen=(--weights "$WEIGHTS" ${BATCHES:+--batches $BATCHES})
export JAX_COMPILATION_CACHE_DIR=$WORK/cache
part compile 110 bash -c '
    for net in $2; do
        for precision in default highest; do
            with= parts="step deepfool"
            [ $precision = highest ] && with=JAX_DEFAULT_MATMUL_PRECISION=highest parts=step
            env XLA_PYTHON_CLIENT_PREALLOCATE=false $with $0 benchmarks/speed.py "${@:3}" --nets $net --parts $parts --seconds 0 \
                --out $1/first/$net-$precision.json &
        done
    done
    wait' "$PYTHON" "$WORK" "$NETS" "${chosen[@]}"
chosen+=(--nets $NETS --seconds 1)
part speed 90 $PYTHON benchmarks/speed.py "${chosen[@]}" --parts step deepfool --out "$WORK/speed.json"
part speed 60 env JAX_DEFAULT_MATMUL_PRECISION=highest \
    $PYTHON benchmarks/speed.py "${chosen[@]}" --parts step --out "$WORK/speed_float32.json"
for precision in "" --tf32; do
    part authors 30 $TORCH_PYTHON benchmarks/authors.py "${chosen[@]}" --device "$DEVICE" $precision \
        --out "$WORK/authors${precision/--/_}.json"
done
[ "$WORKERS" = 0 ] && workers=() || workers=(-n "$WORKERS")
part tests 160 env JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_PREALLOCATE=false \
    $PYTHON -m pytest "${workers[@]}" -p no:cacheprovider --tb=line -v $TESTS

$PYTHON - "$WORK" >"$OUT/results.json" <<'PYTHON'
import json, pathlib, sys
files = sorted(pathlib.Path(sys.argv[1]).glob("*.json"))
print(json.dumps({file.stem: json.loads(file.read_text()) for file in files}, indent=1))
PYTHON
rm -rf "$WORK"
say "${#FAILED[@]} parts failed: ${FAILED[*]:-none}; in $SECONDS s; see $OUT"
exit ${#FAILED[@]}
