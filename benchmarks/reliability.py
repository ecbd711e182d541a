"""What becomes of a run when everything goes wrong, counted.

    python -m benchmarks.reliability [--parts kill disk read_only damage processes fuzz]
        [--num_kills 50] [--num_files 1000] [--seed 0] [--out benchmarks/reliability.md]

- kill: a run (digits, a small MLP, benchmarks/reliability_run.py) is killed by SIGKILL: every
  second time at a random moment, otherwise before a random operation on a file of its directory.
  Then it is resumed. Both nets with their optimizers, metrics.jsonl and the figures of report.json
  must be bitwise those of a run that nothing disturbed.
- disk: the same run on a tmpfs that is too small, of several sizes. It must end with a sentence,
  and after the tmpfs has grown, end bitwise as the others.
- read_only: a new run, a resumed one and an evaluation on a tmpfs that is mounted read-only.
- damage: config.json, metrics.jsonl, report.json, preprocessing.npz and files of the latest
  checkpoint are cut short, overwritten with random bytes or emptied. A sentence each, and no other
  file is lost.
- processes: one of two processes is killed. The other must end within 60 seconds with a sentence,
  and the resumed run bitwise as two that nothing disturbed.
- fuzz: damaged and malicious files of weights and images, see benchmarks/reliability_fuzz.py.

The parts disk and read_only mount file systems: as root, on Linux.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from benchmarks import reliability_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "benchmarks/reliability_run.py"
PARTS = ("kill", "disk", "read_only", "damage", "processes", "fuzz")
MOST_SECONDS = 600
SECONDS_FOR_THE_OTHER = 60
# Of the full disk, in KiB: too small for the configuration, for a checkpoint, for several, ...
SIZES = (4, 8, 12, 3000, 4000, 6000, 8000, 11000, 13000, 15000)
DAMAGES = ("cut short", "random bytes", "empty")


class Ended(NamedTuple):
    """How a process ended, what it printed last and what it said."""

    code: int
    digest: dict[str, str] | None
    errors: str

    @property
    def sentence(self) -> str | None:
        """The error that it ended with, if that is one sentence and no traceback."""
        lines = self.errors.replace("\r", "\n").strip().splitlines()
        last = lines[-1] if lines else ""
        is_one = last.startswith("error: ") and "Traceback" not in self.errors
        return last if is_one and self.code == 1 else None


class Row(NamedTuple):
    """A row of the table: a case, how many were tried, how many went well, and what was seen."""

    case: str
    tried: int
    well: int
    seen: str


class Process:
    """A run in a process of its own, forked from this one, which has imported everything and has
    not started JAX: importing would take as long as the run.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        sys.stdout.flush()
        self.id = os.fork()
        if self.id == 0:
            self._run(arguments)

    def _run(self, arguments: Sequence[str]) -> None:
        code = 1
        try:
            for file, number in zip(self._files, (1, 2), strict=True):
                os.dup2(file.fileno(), number)
            sys.argv = [str(PROGRAM), *arguments]
            reliability_run.main(arguments)
            code = 0
        except SystemExit as ending:
            if isinstance(ending.code, str):
                print(ending.code, file=sys.stderr)
            code = ending.code if isinstance(ending.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            if jax.distributed.is_initialized():
                jax.distributed.shutdown()  # As at the end of Python.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.id, signal.SIGKILL)

    def wait(self, seconds: float) -> tuple[int, str, str]:
        """Its exit code, or minus a signal's number, and what it printed. One that hangs is killed,
        and that is said.
        """
        patience, status = time.monotonic() + seconds, None
        while status is None:
            done, found = os.waitpid(self.id, os.WNOHANG)
            status = found if done else None
            if status is None and time.monotonic() > patience:
                self.kill()
                self._files[1].write(f"\nkilled after {seconds} s")
            time.sleep(0.02)
        for file in self._files:
            file.seek(0)
        out, errors = (file.read() for file in self._files)
        return os.waitstatus_to_exitcode(status), out, errors


def start(workdir: pathlib.Path, *options: str) -> Process:
    """Starts a run, or resumes it."""
    return Process([str(workdir), *options])


def ended(process: Process, seconds: float = MOST_SECONDS) -> Ended:
    """Waits for its end."""
    code, out, errors = process.wait(seconds)
    printed = [line for line in out.splitlines() if line.startswith('{"reference"')]
    return Ended(code, json.loads(printed[0]) if printed else None, errors)


def run(workdir: pathlib.Path, *options: str) -> Ended:
    """A run to its end."""
    return ended(start(workdir, *options))


def undisturbed(
    folder: pathlib.Path, name: str = "", *options: str
) -> tuple[dict[str, str], list[str], float]:
    """The digest of an undisturbed run, its operations on files, and how long it took."""
    events, before = folder / f"events{name}.txt", time.monotonic()
    found = run(folder / f"undisturbed{name}", "--events", str(events), *options)
    if found.digest is None:
        raise SystemExit(f"The undisturbed run failed:\n{found.errors}")
    return found.digest, events.read_text().splitlines(), time.monotonic() - before


def what_is_written(path: str) -> str:
    """The part of a run directory that a path belongs to."""
    for name in ("checkpoints", "metrics", "report", "config", "preprocessing", "plots"):
        if name in path.rpartition("/undisturbed")[2]:
            return name
    return "the directory"


def doing(workdir: pathlib.Path) -> str:
    """What a killed run was doing, by what it left."""
    if not (workdir / "config.json").exists():
        return "starting"
    if list(workdir.glob("checkpoints/*/*orbax-checkpoint-tmp*")):
        return "saving"
    lines = (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").exists() else ""
    report = (workdir / "report.json").read_text() if (workdir / "report.json").exists() else ""
    if '"defended"' in lines:
        is_trained = '"stage": "defended", "step": 8, "epoch": 2.0, "test"' in lines
        return "measuring" if is_trained else "training"
    is_trained = '"stage": "reference", "step": 16, "epoch": 4.0, "test"' in lines
    return "measuring" if is_trained and '"measured"' not in report else "training"


def killed_at_a_moment(
    workdir: pathlib.Path, options: Sequence[str], seconds: float, chance: random.Random
) -> Ended:
    """A run that is killed at a random moment of about as many seconds, not near its beginning;
    tried again where it had ended before.
    """
    while True:
        process = start(workdir, *options)
        time.sleep(chance.uniform(0.2, 1.0) * seconds)
        process.kill()
        killed, seconds = ended(process), 0.8 * seconds
        if killed.code == -signal.SIGKILL:
            return killed
        shutil.rmtree(workdir)


def kill_part(folder: pathlib.Path, num_kills: int, chance: random.Random) -> list[Row]:
    """Runs that are killed and resumed."""
    kinds = {"": (), "_trained": ("--skip_evaluate",)}  # One in four is evaluated, too.
    undisturbed_runs = {name: undisturbed(folder, name, *more) for name, more in kinds.items()}
    places: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    well: Counter[str] = Counter()
    failed = []
    for i in range(num_kills):
        workdir, by_event, name = folder / f"kill_{i}", i % 2 == 1, "_trained" if i % 8 > 1 else ""
        wanted, events, seconds = undisturbed_runs[name]
        if by_event:
            number = chance.randrange(1, len(events) + 1)
            killed = run(workdir, "--kill_at", str(number), *kinds[name])
            where = what_is_written(events[number - 1])
        else:
            killed = killed_at_a_moment(workdir, kinds[name], seconds, chance)
            where = doing(workdir)
        was_killed = killed.code == -signal.SIGKILL
        resumed = run(workdir, *kinds[name])
        (places if by_event else moments)[where if was_killed else "after its end"] += 1
        is_well = resumed.digest == wanted and "Traceback" not in resumed.errors
        well["event" if by_event else "moment"] += is_well
        if is_well:
            shutil.rmtree(workdir, ignore_errors=True)
        else:
            failed.append(f"{workdir}: {resumed.errors[-1000:]}")
        print(f"kill {i}: {where}, {'well' if is_well else 'NOT WELL'}", flush=True)
    print("\n".join(failed))
    told = lambda found: ", ".join(f"{name} {count}" for name, count in found.most_common())
    text = "killed at a random moment and resumed: bitwise equal"
    rows = [Row(text, sum(moments.values()), well["moment"], f"while {told(moments)}")]
    text = "killed before a random operation on a file and resumed: bitwise equal"
    return [*rows, Row(text, sum(places.values()), well["event"], f"of {told(places)}")]


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
    """A tmpfs of that size."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> None:
    """Runs mount; CalledProcessError where it is not permitted."""
    subprocess.run(["mount", *arguments], check=True)


def disk_part(folder: pathlib.Path, sizes: Sequence[int] = SIZES) -> list[Row]:
    """Runs on disks that are too small, which then grow."""
    wanted, _, _ = undisturbed(folder, "", "--skip_evaluate")
    num_full, sentences, num_equal, seen = 0, 0, 0, Counter()
    for size in sizes:
        with small_disk(folder / f"disk_{size}", f"{size}k") as disk:
            first = run(disk / "run", "--skip_evaluate")
            if first.digest is not None:
                print(f"disk of {size} KiB: suffices", flush=True)
                continue
            num_full += 1
            sentences += first.sentence is not None
            seen[what_is_full(first)] += 1
            mount("-o", "remount,size=64m", str(disk))
            again = run(disk / "run", "--skip_evaluate")
            num_equal += again.digest == wanted
            print(f"disk of {size} KiB: {first.sentence or first.errors[-2000:]}", flush=True)
            if again.digest != wanted:
                print(f"    NOT WELL: {again.errors[-1500:]}", flush=True)
    told = ", ".join(f"{name} {count}" for name, count in seen.most_common())
    return [
        Row("full disk (tmpfs): one sentence", num_full, sentences, f"while writing {told}"),
        Row("resumed after the disk has grown: bitwise equal", num_full, num_equal, ""),
    ]


def what_is_full(first: Ended) -> str:
    """What could not be written, by the sentence."""
    sentence = first.sentence or ""
    if "heckpoint" in sentence:
        return "a checkpoint"
    for name in ("metrics", "report", "config", "preprocessing"):
        if name in sentence:
            return name
    return "other files"


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def partly_trained(folder: pathlib.Path, events: Sequence[str]) -> pathlib.Path:
    """A run that was killed in its fine-tuning, with two checkpoints of it."""
    saved = [i for i, line in enumerate(events, 1) if "checkpoints/defended/6" in line]
    run(folder / "part", "--kill_at", str(saved[-1] + 1), "--skip_evaluate")
    return folder / "part"


def read_only_part(folder: pathlib.Path) -> list[Row]:
    """A new run, a resumed one, and an evaluation where nothing can be written."""
    wanted, events, _ = undisturbed(folder, "", "--skip_evaluate")
    part, rows = partly_trained(folder, events), []
    with small_disk(folder / "disk", "64m") as disk:
        shutil.copytree(folder / "undisturbed", disk / "finished")
        shutil.copytree(part, disk / "part")
        mount("-o", "remount,ro", str(disk))
        before = contents(disk)
        ends = {
            "a new run": run(disk / "new", "--skip_evaluate"),
            "a run to resume": run(disk / "part", "--skip_evaluate"),
            "an evaluation": run(disk / "finished", "--skip_train"),
        }
        mount("-o", "remount,rw", str(disk))
        kept = contents(disk) == before
        again = run(disk / "part", "--skip_evaluate")
    for case, end in ends.items():
        print(f"read-only, {case}: {end.sentence or end.errors[-1500:]}", flush=True)
        seen = (end.sentence or "no sentence").replace(str(disk), "DIR")
        rows.append(Row(f"read-only directory, {case}", 1, int(end.sentence is not None), seen))
    well = int(kept and again.digest == wanted)
    return [*rows, Row("written again: nothing lost, resumed bitwise equal", 1, well, "")]


def damaged(content: bytes, how: str, chance: random.Random) -> bytes:
    """Content that is damaged in one of DAMAGES."""
    if how == "empty":
        return b""
    if how == "cut short":
        return content[: len(content) * 2 // 3]
    start, size = len(content) // 3, max(8, len(content) // 10)
    return content[:start] + chance.randbytes(size) + content[start + size :]


def files_to_damage(part: pathlib.Path) -> list[pathlib.Path]:
    """Of a partly trained run: what is at its top, and of its latest checkpoint."""
    latest = max((part / "checkpoints/defended").glob("[0-9]*"), key=lambda path: int(path.name))
    files = [path for path in latest.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    named = [path for path in files if path.name in ("_METADATA", "_CHECKPOINT_METADATA")]
    manifests = [path for path in files if path.name == "manifest.ocdbt"][:1]
    top = [part / name for name in ("config.json", "metrics.jsonl", "report.json")]
    return [*top, part / "preprocessing.npz", largest, *named, *manifests]


def damage_part(folder: pathlib.Path, chance: random.Random) -> list[Row]:
    """Every file damaged in every way, in a run that is then resumed."""
    wanted, events, _ = undisturbed(folder, "", "--skip_evaluate")
    part, rows = partly_trained(folder, events), []
    for path in files_to_damage(part):
        name = path.relative_to(part)
        ends = [damage_one(folder, part, name, how, wanted, chance) for how in DAMAGES]
        shown = f"checkpoint: {name.name}" if "checkpoints" in name.parts else str(name)
        if path.stat().st_size > 10**5:
            shown = "checkpoint: its largest file"
        sorts = ", ".join(f"{what}: {end}" for what, (_, end) in zip(DAMAGES, ends, strict=True))
        rows.append(Row(f"damaged {shown}", len(ends), sum(well for well, _ in ends), sorts))
    return rows


def damage_one(
    folder: pathlib.Path,
    part: pathlib.Path,
    name: pathlib.Path,
    how: str,
    wanted: dict[str, str],
    chance: random.Random,
) -> tuple[bool, str]:
    """Whether a damaged run ends well, and how: refused with a sentence and everything left as it
    was, or resumed to the same nets with a word about the damage.
    """
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(part, copy)
    spoilt = damaged((copy / name).read_bytes(), how, chance)
    (copy / name).write_bytes(spoilt)
    before = contents(copy)
    found = run(copy, "--skip_evaluate")
    is_quiet = "Traceback" not in found.errors
    if found.digest is None:
        well, end = found.sentence is not None and contents(copy) == before, "refused"
    else:
        same = {stage: found.digest[stage] == wanted[stage] for stage in ("reference", "defended")}
        # Of lines that are cut short, all but the rest of the last one are kept where they are.
        whole_lines = spoilt[: spoilt.rfind(b"\n") + 1] if name.suffix == ".jsonl" else spoilt
        kept = any(content.startswith(whole_lines) for content in contents(copy).values())
        is_whole = found.digest == wanted
        said = "damaged" in found.errors
        end = "set aside, resumed" if said else "not needed, resumed" if is_whole else "silent"
        well = is_quiet and all(same.values()) and (is_whole or (said and kept))
    print(f"{name}, {how}: {end}, {'well' if well else 'NOT WELL'}", flush=True)
    if not well or found.digest is None:
        print(f"    {found.sentence or found.errors[-1500:]}", flush=True)
    return well, end


def processes_part(folder: pathlib.Path, chance: random.Random, per_victim: int = 3) -> list[Row]:
    """One of two processes is killed at a random moment; then both are resumed."""
    before = time.monotonic()
    pair, wanted = [ended(process) for process in start_two(folder / "undisturbed")], None
    seconds, wanted = time.monotonic() - before, pair[0].digest
    if wanted is None:
        raise SystemExit(f"Two processes failed:\n{pair[0].errors}\n{pair[1].errors}")
    waits, sentences, num_equal, tried = [], 0, 0, 0
    for victim in [0, 1] * per_victim:
        workdir = folder / f"two_{tried}"
        processes = start_two(workdir)
        time.sleep(chance.uniform(0.45, 0.9) * seconds)
        processes[victim].kill()
        killed_at, tried = time.monotonic(), tried + 1
        other = ended(processes[1 - victim], 2 * SECONDS_FOR_THE_OTHER)
        waits.append(time.monotonic() - killed_at)
        ended(processes[victim])
        sentences += other.sentence is not None
        again = [ended(process) for process in start_two(workdir)]
        num_equal += again[0].digest == wanted
        print(
            f"process {victim} killed: {waits[-1]:.1f} s, {other.sentence or other.errors[-1500:]}"
        )
        if again[0].digest != wanted:
            print(f"    NOT WELL: {again[0].errors[-1500:]}", flush=True)
    in_time = sum(wait < SECONDS_FOR_THE_OTHER for wait in waits)
    seen = f"after {min(waits):.1f} to {max(waits):.1f} s"
    return [
        Row("one of two processes killed: the other ends within 60 s", tried, in_time, seen),
        Row("... with one sentence", tried, sentences, ""),
        Row("... and both, resumed: bitwise equal", tried, num_equal, ""),
    ]


def start_two(workdir: pathlib.Path) -> list[Process]:
    """The same run in two processes."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    both = ["--skip_evaluate", "--coordinator", address, "--num_processes", "2"]
    return [start(workdir, *both, "--process_id", str(i)) for i in range(2)]


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| | tried | well | seen |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {row.case} | {row.tried} | {row.well} | {row.seen} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--num_kills", type=int, default=50)
    parser.add_argument("--num_files", type=int, default=1000, help="of the part fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="where to append the table")
    chosen = parser.parse_args()
    rows: list[Row] = []
    reliability_run.load()
    with tempfile.TemporaryDirectory() as name:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{name}/cache")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        for part in chosen.parts:
            folder, chance = pathlib.Path(name) / part, random.Random(chosen.seed)
            folder.mkdir()
            if part == "fuzz":
                from benchmarks.reliability_fuzz import fuzz_part

                rows += [Row(*found) for found in fuzz_part(folder, chosen.num_files, chosen.seed)]
            elif part == "kill":
                rows += kill_part(folder, chosen.num_kills, chance)
            elif part in ("damage", "processes"):
                rows += {"damage": damage_part, "processes": processes_part}[part](folder, chance)
            else:
                rows += {"disk": disk_part, "read_only": read_only_part}[part](folder)
            print(table(rows), flush=True)
    if chosen.out:
        where = f"Python {platform.python_version()}, jax {jax.__version__}, {platform.system()}"
        command = f"`python -m benchmarks.reliability {' '.join(sys.argv[1:])}`"
        text = (
            f"{command}, {datetime.date.today()}, {where}, seed {chosen.seed}:\n\n{table(rows)}\n"
        )
        with chosen.out.open("a") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main()
