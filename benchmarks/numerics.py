"""Whether every public function computes rightly on this CPU: a wide comparison with float64.

    python benchmarks/numerics.py [--quick] [--seed N] [--settings NAME ...] [--nets NAME ...]
        [--out DIR]

Every public function (values, and gradients where there are any) runs on the cases of
benchmarks/numerics_cases.py under these settings:

    float64        in float64 without XLA's YNNPACK kernels: what the others are compared with
    empty          XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=
    default        XLA_FLAGS left empty
    shipped        what dd_jax.xla.set_flags() chooses; where that is one of the two above, it is
                   not run twice
    without jit    operation by operation (jax.disable_jit), the small cases alone

Each setting has a process of its own. A case that ends its process, or takes longer than --limit
seconds, is noted, and a new process goes on behind it. A result is wrong where

    - it is not finite, and that of float64 is;
    - an attack says "success" and the logits that NumPy computes in float64 deny it, or the other
      way round, by more than rounding;
    - a perturbation leaves its bounds or its ball by more than rounding;
    - the median over the examples of the relative error, or the relative error of the gradient of
      half of the parameter arrays, is above 1e-3 (the median of three examples or fewer: 0.1, as
      one component whose sign flips near zero is more than 1e-3 of a linf step);
    - more examples than near ties explain differ by more than that, or took another number of
      steps: 0.2 % and three of them, 3 % of C&W's, which counts its steps to the best iterate; or
      most of the rows behind 32,768.

Prints the progress and tables, and writes all figures as JSON. The exit status is 1 where the
shipped setting is wrong. Times are in benchmarks/numerics.md.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import numerics_cases  # noqa: E402
import numpy as np  # noqa: E402
from numerics_cases import Arrays, Case, Setup  # noqa: E402

from dd_jax.xla import flags as xla_flags  # noqa: E402

EMPTY = f"{xla_flags.FLAG}="
ARBITER, SHIPPED, WITHOUT_JIT = "float64", "shipped", "without jit"
SETTINGS = {ARBITER: EMPTY, "empty": EMPTY, "default": "", SHIPPED: None, WITHOUT_JIT: ""}
"""XLA_FLAGS by setting."""
NETS = (*numerics_cases.SMALL_NETS, numerics_cases.QUADRATIC, *numerics_cases.PAPER_NETS)
MOST_WITHOUT_JIT = {"affine": 7, "smooth": 7, "mlp": 3, "lenet": 1}  # batch, by net
TOLERANCE = 1e-3
TOLERANCE_OF_FEW = 0.1  # One sign that flips near zero is 0.04 of a linf step of 3072 components.
FLOOR = 1e-2  # An array's error is relative to no less than this share of its median size.
LEAD = 1e-5  # of the largest logit of a batch: what rounding may hide of which class leads
NEAR_TIES = {"carlini_wagner_l2": 3e-2}  # the share of examples that may differ, by function
OTHER_NEAR_TIES, FEW = 2e-3, 3  # of the other functions, and how many may anyway
FIRST_LATE_ROW = 32768  # From here on, jaxlib 0.10.2 is known to go wrong (dd_jax.xla.canary).
SLACK = 1e-5  # by which rounding may leave bounds and balls
START_SECONDS = 120.0  # for a process to begin its first case, or the next one
CLEARED_EVERY = 20  # cases: the compiled programs of all would fill the memory


class Outcome(NamedTuple):
    """What became of a case: its seconds, and what went wrong before there was a result."""

    seconds: float
    complaint: str | None


class Verdict(NamedTuple):
    """How a result compares with float64's. Errors are relative."""

    reasons: list[str]  # why it is wrong; none where it is right
    largest: float  # of the examples that took the same path
    median: float  # of all examples
    differing: int  # examples off by more than TOLERANCE, or on another path
    examples: int
    success: float | None  # the share of examples that the attack fooled
    parameters: float | None  # the largest error of a parameter array's gradient
    where: list[int]  # the first and the last example that differs


# What runs in a process of its own.


def work(setting: str, indices: list[int], arguments: argparse.Namespace) -> None:
    """Computes cases and writes what they give; says on stdout where it is."""
    if setting == ARBITER:
        jax.config.update("jax_enable_x64", True)
    cases = numerics_cases.all_cases(arguments.quick)
    for index in indices:
        print("begin", index, flush=True)
        complaint = ""
        try:
            found = computed(cases[index], setting, arguments.seed)
            np.savez(result_file(arguments.out, setting, index), **found)
        except Exception as error:
            complaint = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        if index % CLEARED_EVERY == 0:
            jax.clear_caches()
        print("end", index, complaint, flush=True)


def computed(case: Case, setting: str, seed: int) -> dict[str, np.ndarray]:
    """The result of a case under a setting."""
    dtype = np.float64 if setting == ARBITER else np.float32
    params = numerics_cases.parameters(case.net, case.width, seed)
    params = jax.tree.map(lambda array: array.astype(dtype), params)
    setup = numerics_cases.setup(case, seed)

    def run(params: Any, inputs: jax.Array, labels: jax.Array) -> Arrays:
        here = setup._replace(inputs=inputs, labels=labels)
        return numerics_cases.call(case, params, here)

    arguments = jax.tree.map(jax.numpy.asarray, (params, setup.inputs.astype(dtype), setup.labels))
    plain = setting == WITHOUT_JIT
    with jax.disable_jit() if plain else contextlib.nullcontext():
        found = (run if plain else jax.jit(run))(*arguments)
    return {name.replace("/", "."): np.asarray(array) for name, array in found.items()}


def result_file(out: pathlib.Path, setting: str, index: int) -> pathlib.Path:
    """Where the result of a case lies."""
    return out / setting.replace(" ", "_") / f"{index}.npz"


# What starts these processes.


def run_setting(
    setting: str, flags: str, indices: list[int], arguments: argparse.Namespace
) -> Iterator[tuple[int, Outcome]]:
    """Computes cases under a setting, in as many processes as it takes."""
    folder = result_file(arguments.out, setting, 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.npz"):
        file.unlink()
    left = list(indices)
    while left:
        for index, outcome in _run_process(setting, flags, left, arguments):
            left = [i for i in left if i != index]
            yield index, outcome


def _run_process(
    setting: str, flags: str, indices: list[int], arguments: argparse.Namespace
) -> Iterator[tuple[int, Outcome]]:
    """Computes cases until all are done, or the process ends at one of them or has to be ended."""
    process, lines = _start(setting, flags, indices, arguments)
    current, since, limit = None, time.perf_counter(), START_SECONDS
    while True:
        try:
            now, line = lines.get(timeout=max(0.0, since + limit - time.perf_counter()))
        except queue.Empty:
            process.kill()
            now, line = time.perf_counter(), None
        seconds = now - since
        word, _, rest = (line or "").partition(" ")
        if word == "begin":
            current, since, limit = int(rest), now, arguments.limit
        elif word == "end":
            yield current, Outcome(seconds, rest.partition(" ")[2].strip() or None)
            current, since, limit = None, now, START_SECONDS
        elif line is None:
            break
    status = process.wait()
    if current is not None:
        late = seconds >= limit
        why = f"no end within {limit:.0f} s" if late else f"ended the process (status {status})"
        yield current, Outcome(seconds, why)
    elif status:
        raise RuntimeError(f"The process for {setting!r} ended with status {status}; see above.")


def _start(
    setting: str, flags: str, indices: list[int], arguments: argparse.Namespace
) -> tuple[subprocess.Popen, "queue.Queue[tuple[float, str | None]]"]:
    command = [sys.executable, __file__, "--seed", str(arguments.seed), "--out", str(arguments.out)]
    command += ["--quick"] * arguments.quick + ["--work", setting, json.dumps(indices)]
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment(flags)}
    process = subprocess.Popen(command, **options)
    lines: queue.Queue[tuple[float, str | None]] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put((time.perf_counter(), line.rstrip("\n")))
        lines.put((time.perf_counter(), None))

    threading.Thread(target=read, daemon=True).start()
    return process, lines


def environment(flags: str) -> dict[str, str]:
    """This environment with these XLA_FLAGS and none of JAX's own settings, on the CPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return kept | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "DD_JAX_CANARY": "0"}


def shipped_flags() -> str:
    """The XLA_FLAGS that dd_jax.xla.set_flags() chooses on this machine."""
    program = "import os; from dd_jax import xla; xla.set_flags(); print(os.environ['XLA_FLAGS'])"
    options = {"capture_output": True, "text": True, "check": True, "cwd": ROOT}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment(""), **options
    ).stdout.strip()


# What compares the results.


def compared(case: Case, setup: Setup, logits_at: Any, found: Arrays, exact: Arrays) -> Verdict:
    """How the result of a case compares with float64's. `logits_at`: the net in NumPy."""
    same_path = np.ones(case.batch, bool)
    for name in ("num_steps", "success"):
        if name in exact:
            same_path &= found[name] == exact[name]
    arrays = [name for name in exact if not name.startswith("parameters")]
    arrays = [name for name in arrays if name not in ("num_steps", "success")]
    errors = np.max([example_errors(found[name], exact[name]) for name in arrays], axis=0)
    leaves = [name for name in exact if name.startswith("parameters")]
    of_parameters = [array_error(found[name], exact[name]) for name in leaves]
    differs = ~same_path | (errors > TOLERANCE)
    where = np.flatnonzero(differs)
    verdict = Verdict(
        [],
        float(np.max(errors[same_path], initial=0.0)),
        float(np.median(errors)),
        int(differs.sum()),
        case.batch,
        float(np.mean(found["success"])) if "success" in found else None,
        max(of_parameters, default=None),
        [int(where[0]), int(where[-1])] if len(where) else [],
    )
    if not all(np.isfinite(found[name]).all() for name in exact if np.isfinite(exact[name]).all()):
        verdict.reasons.append("not finite")
    if verdict.median > (TOLERANCE if case.batch > FEW else TOLERANCE_OF_FEW):
        verdict.reasons.append(f"median error {verdict.median:.1e}")
    late = differs[FIRST_LATE_ROW:]
    allowed = NEAR_TIES.get(case.function.name, OTHER_NEAR_TIES) * case.batch + FEW
    if verdict.differing > allowed or (len(late) and late.mean() > 0.5):
        verdict.reasons.append(
            f"{verdict.differing} examples differ, of the rows from {FIRST_LATE_ROW} on {late.sum()}"
        )
    if of_parameters and np.median(of_parameters) > TOLERANCE:
        verdict.reasons.append(f"gradients of parameters off by {max(of_parameters):.1e}")
    if "perturbation" in found:
        verdict.reasons.extend(broken_promises(case, setup, logits_at, found))
    return verdict


def example_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """||found - exact|| / ||exact||, example by example."""
    flat = lambda array: array.reshape(len(array), -1).astype(np.float64)
    size = np.linalg.norm(flat(exact), axis=1)
    error = np.linalg.norm(flat(found) - flat(exact), axis=1)
    least = max(FLOOR * np.median(size), np.finfo(np.float32).tiny)
    return np.where(error == 0, 0, error / np.maximum(size, least))


def array_error(found: np.ndarray, exact: np.ndarray) -> float:
    """The same for an array as a whole."""
    return float(
        np.linalg.norm(found - exact) / max(np.linalg.norm(exact), np.finfo(np.float32).tiny)
    )


def broken_promises(case: Case, setup: Setup, logits_at: Any, found: Arrays) -> list[str]:
    """Where an attack's result is not what it says: success, bounds, size; by NumPy in float64."""
    perturbation = np.float64(found["perturbation"])
    moved, rows = setup.inputs + perturbation, np.arange(case.batch)
    logits = logits_at(moved)
    of_label = logits[rows, setup.labels].copy()
    logits[rows, setup.labels] = -np.inf
    lead = of_label - logits.max(axis=1)
    rounding = LEAD * max(np.abs(of_label).max(), np.abs(lead).max())
    counts = {
        "successes denied": found["success"] & (lead > rounding),
        "successes missed": ~found["success"] & (lead < -rounding),
    }
    axes = tuple(range(1, perturbation.ndim))
    if setup.bounds is not None:
        lower, upper = setup.bounds
        counts["out of bounds"] = np.any((moved < lower - SLACK) | (moved > upper + SLACK), axes)
    if case.function.name in ("fgsm", "pgd"):
        flat = perturbation.reshape(case.batch, -1)
        size = np.linalg.norm(flat, ord=2 if case.function.norm == "l2" else np.inf, axis=1)
        counts["larger than epsilon"] = size > setup.epsilon * (1 + SLACK)
    return [f"{count.sum()} {what}" for what, count in counts.items() if count.any()]


# What tells of it.


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all settings and compares them; the report."""
    cases = numerics_cases.all_cases(arguments.quick)
    flags = SETTINGS | {SHIPPED: shipped_flags()}
    equal = [name for name in ("empty", "default") if flags[name] == flags[SHIPPED]]
    names = [name for name in SETTINGS if name in (ARBITER, *arguments.settings)]
    same_as = equal[0] if equal and equal[0] in names else None
    names = [name for name in names if name != SHIPPED or same_as is None]
    plan = {name: _indices(name, cases, arguments.nets) for name in names}
    rows, progress = [], Progress(sum(map(len, plan.values())))
    waiting = collections.defaultdict(list)  # by case: results that float64's is missing for
    finished = set()
    for name, index, outcome in _outcomes(plan, flags, arguments):
        waiting[index].append((name, outcome))
        if name == ARBITER:
            finished.add(index)
        for name, outcome in waiting.pop(index) if index in finished else ():
            rows.append(judged(cases[index], index, name, outcome, arguments))
            progress.tell(name, rows[-1], outcome)
    return {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "numpy")},
        "python": platform.python_version(),
        "device": device(),
        "seed": arguments.seed,
        "quick": arguments.quick,
        "flags": {name: flags[name] for name in SETTINGS},
        "shipped_same_as": same_as,
        "seconds": progress.seconds(),
        "cases": rows,
    }


def _outcomes(
    plan: dict[str, list[int]], flags: dict[str, str], arguments: argparse.Namespace
) -> Iterator[tuple[str, int, Outcome]]:
    """Runs the settings, --processes of them at a time, and gives what comes of each case."""
    outcomes: queue.Queue[tuple[str, int, Outcome] | None] = queue.Queue()

    def run(name: str) -> None:
        try:
            for index, outcome in run_setting(name, flags[name], plan[name], arguments):
                outcomes.put((name, index, outcome))
        finally:
            outcomes.put(None)

    with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        runs = [pool.submit(run, name) for name in plan]
        for _ in runs:
            yield from iter(outcomes.get, None)
    for done in runs:
        done.result()


def _indices(setting: str, cases: list[Case], nets: list[str]) -> list[int]:
    most = lambda case: MOST_WITHOUT_JIT.get(case.net, 0)
    is_small = lambda case: setting != WITHOUT_JIT or case.batch <= most(case)
    return [i for i, case in enumerate(cases) if case.net in nets and is_small(case)]


def judged(
    case: Case, index: int, setting: str, outcome: Outcome, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A row of the report."""
    row = {"index": index, "case": str(case), "function": str(case.function), "net": case.net}
    row |= {"batch": case.batch, "width": case.width, "setting": setting}
    row |= {"seconds": round(outcome.seconds, 2), "reasons": [outcome.complaint]}
    if outcome.complaint is not None:
        return row
    exact = result_file(arguments.out, ARBITER, index)
    if not exact.exists():
        return row | {"reasons": ["nothing to compare with"]}
    with np.load(exact) as right, np.load(result_file(arguments.out, setting, index)) as found:
        params = numerics_cases.parameters(case.net, case.width, arguments.seed)
        logits_at = lambda x: numerics_cases.forward(case.net, params, x)
        setup = numerics_cases.setup(case, arguments.seed)
        return row | compared(case, setup, logits_at, dict(found), dict(right))._asdict()


class Progress:
    """Says what is done, what was wrong, and how much time is left."""

    def __init__(self, total: int) -> None:
        self._begun, self._total, self._done = time.perf_counter(), total, 0

    def seconds(self) -> float:
        """Since the beginning."""
        return round(time.perf_counter() - self._begun, 1)

    def tell(self, setting: str, row: dict[str, Any], outcome: Outcome) -> None:
        """One more case is done."""
        self._done += 1
        left = self.seconds() * (self._total / self._done - 1)
        wrong = f"  WRONG: {', '.join(row['reasons'])}" if row["reasons"] else ""
        if wrong or self._done % 20 == 0 or outcome.seconds > 10:
            head = f"{self._done}/{self._total}, about {left / 60:.1f} min left"
            print(f"[{head}] {setting}: {row['case']}, {outcome.seconds:.1f} s{wrong}", flush=True)


def device() -> str:
    """The CPU and how many cores this process may use."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "CPU")
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def table(report: dict[str, Any]) -> str:
    """Markdown: a row per function, a column per setting: wrong cases of all, the largest error of
    examples on the same path, and the share of examples that differ.
    """
    settings = list(dict.fromkeys(row["setting"] for row in report["cases"]))
    lines = [f"| | {' | '.join(settings)} |", "| --- |" + " --- |" * len(settings)]
    for function in dict.fromkeys(row["function"] for row in report["cases"]):
        rows = [row for row in report["cases"] if row["function"] == function]
        cells = [_cell([row for row in rows if row["setting"] == name]) for name in settings]
        lines.append(f"| {function} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    compared_rows = [row for row in rows if "largest" in row]
    wrong = sum(bool(row["reasons"]) for row in rows)
    text = f"{wrong} of {len(rows)} wrong" if wrong else f"{len(rows)} right"
    if compared_rows:
        right = [row for row in compared_rows if not row["reasons"]] or compared_rows
        examples = sum(row["examples"] for row in right)
        share = sum(row["differing"] for row in right) / examples
        text += f", {max(row['median'] for row in right):.0e}, {share:.2%}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--limit", type=float, default=40.0, help="seconds for one case")
    version = importlib.metadata.version("jax")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs/numerics" / version)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work[0], json.loads(arguments.work[1]), arguments)
        return
    report = measure(arguments)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1))
    print(table(report))
    for row in report["cases"]:
        if row["reasons"]:
            print(f"wrong: {row['setting']}: {row['case']}: {', '.join(row['reasons'])}")
    print(f"{report['seconds']:.0f} s; written to {arguments.out / 'report.json'}")
    shipped = report["shipped_same_as"] or SHIPPED
    sys.exit(any(row["reasons"] for row in report["cases"] if row["setting"] == shipped))


if __name__ == "__main__":
    main()
