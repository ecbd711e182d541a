"""What goes wrong from outside: full disks, damaged files, malicious files. benchmarks/reliability.py
counts the same on whole runs.
"""

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiment import built

from benchmarks import reliability_fuzz
from dd_jax import log
from dd_jax.experiment import command_line
from dd_jax.experiment.configuration import ConfigurationError
from dd_jax.results.report import Report, read_report, write_report
from dd_jax.training.checkpoints import Checkpoints, UnsavedCheckpointError

ROOT = pathlib.Path(__file__).parent.parent


@contextlib.contextmanager
def files_no_larger_than(size):
    """Within, the system refuses to write more into any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_is_one_sentence_and_the_one_before_stays(
    tmp_path, capfd
):
    draw = lambda step: {"w": jax.random.normal(jax.random.key(step), (200, 300))}
    with Checkpoints(tmp_path) as saved:
        saved.save(1, draw(1))
    capfd.readouterr()
    with (
        pytest.raises(
            UnsavedCheckpointError,
            match=rf"^A checkpoint cannot be saved in {tmp_path} \(File too large\): make room, .*"
            "resumes from the one before.$",
        ),
        files_no_larger_than(50_000),
        Checkpoints(tmp_path) as saved,
    ):
        saved.save(2, draw(2))
    assert capfd.readouterr().err == ""
    for step in (1, 2):  # The second time after it could be written again.
        with Checkpoints(tmp_path) as saved:
            assert saved.latest() == step
            np.testing.assert_array_equal(saved.restore(draw(0))["w"], draw(step)["w"])
            saved.save(2, draw(2))


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk cannot be written (No space"),
        (OSError(errno.EROFS, "Read-only file system", "runs/a"), "runs/a cannot be written (Read"),
        (UnsavedCheckpointError("A checkpoint cannot be saved."), "A checkpoint cannot be saved."),
    ],
)
def test_what_cannot_be_written_ends_a_command_with_one_sentence(error, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        command_line.run(main)
    words = capsys.readouterr().err
    assert ended.value.code == 1 and words.startswith(f"error: {said}") and words.count("\n") == 1


def test_too_little_memory_ends_a_command_with_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda: jnp.zeros((1 << 46,)).block_until_ready())
    words = capsys.readouterr().err
    assert ended.value.code == 1 and words.count("\n") == 1
    assert words.startswith("error: There is not enough memory (") and "batch_size=100" in words


def test_other_errors_of_jax_keep_their_traceback():
    def main():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        command_line.run(main)


def test_other_errors_of_the_system_keep_their_traceback():
    def main():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        command_line.run(main)


DAMAGES = {
    "cut short": lambda content: content[: len(content) * 2 // 3],
    "random bytes": lambda content: content[:40] + bytes(range(256)) + content[60:],
    "empty": lambda content: b"",
    "another type": lambda content: b"[]\n" * 3,
}
each_damage = pytest.mark.parametrize("damage", DAMAGES)


@each_damage
def test_damaged_lines_are_left_out_with_a_word_and_kept_beside(tmp_path, capsys, damage):
    path = tmp_path / log.FILE_NAME
    written = [{"stage": "reference", "step": step, "loss": step / 3} for step in range(1, 9)]
    for line in written:
        log.append_line(tmp_path, line)
    whole = path.read_bytes()
    path.write_bytes(damaged := DAMAGES[damage](whole))
    left = list(log.read_lines(tmp_path))
    assert all(line in written for line in left) and len(left) < 8
    log.forget_lines_after(tmp_path, "reference", 6)
    assert list(log.read_lines(tmp_path)) == [line for line in left if line["step"] <= 6]
    said, aside = capsys.readouterr().err, tmp_path / "metrics.jsonl.damaged"
    if damage in ("random bytes", "another type"):
        assert said.count("\n") == 1 and f"{path} is damaged (" in said and str(aside) in said
        assert aside.read_bytes() == damaged
    else:  # As a killed run leaves it.
        assert said == "" and not aside.exists()


def test_lines_that_are_missing_are_noticed(tmp_path, capsys):
    """As after a cut at the end of a line, which damages none. The copy is made once."""
    for step in (2, 4):
        log.append_line(tmp_path, {"stage": "reference", "step": step, "loss": 0.5})
    log.forget_lines_after(tmp_path, "reference", 5, last_line=4)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        log.forget_lines_after(tmp_path, "reference", 7, last_line=6)
        assert "it lacks lines of the reference stage" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.damaged*"))) == 1
    assert [line["step"] for line in log.read_lines(tmp_path)] == [2, 4]


@each_damage
def test_a_damaged_report_is_kept_beside_the_new_one(tmp_path, capsys, damage):
    report = a_report()
    path = write_report(report, tmp_path)
    path.write_bytes(damaged := DAMAGES[damage](path.read_bytes()))
    assert read_report(tmp_path) is None
    assert capsys.readouterr().err == ""
    write_report(report, tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{path} was damaged and is now {path}.damaged" in said
    assert (tmp_path / "report.json.damaged").read_bytes() == damaged
    assert read_report(tmp_path) == report
    path.write_bytes(b"{")
    write_report(report, tmp_path)
    assert (tmp_path / "report.json.damaged").read_bytes() == damaged  # It is not overwritten.
    assert (tmp_path / "report.json.damaged.1").read_bytes() == b"{"


def a_report():
    """A report with no other content than what it must have."""
    fields = dict.fromkeys(Report._fields, "") | dict(seed=0, limit=None, published={}, packages={})
    fields |= dict(measured={"reference": {"accuracy": 0.5}}, names=[], config={}, remarks=[])
    return Report(**fields)


@pytest.mark.parametrize("damage", ["cut short", "empty", "another type"])
def test_a_damaged_input_space_is_one_sentence(tmp_path, damage):
    built(tmp_path).preprocessing.save(tmp_path / "preprocessing.npz")
    path = tmp_path / "preprocessing.npz"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ConfigurationError, match=f"{path} is damaged .*remove it, and rerun"):
        built(tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "random bytes", "empty"])
def test_no_file_of_a_checkpoint_can_be_damaged_without_being_noticed(tmp_path, damage, capfd):
    """Either the same bits come back, or a word and the checkpoint before."""
    draw = lambda step: {"w": jax.random.normal(jax.random.key(step), (40, 30)), "n": jnp.ones(())}
    with Checkpoints(tmp_path / "whole") as saved:
        for step in (1, 2):
            saved.save(step, draw(step))
    names = sorted(
        path.relative_to(tmp_path / "whole")
        for path in (tmp_path / "whole/2").rglob("*")
        if path.is_file() and path.stat().st_size
    )
    ends = []
    for name in names:
        copy = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        (copy / name).write_bytes(DAMAGES[damage]((copy / name).read_bytes()))
        capfd.readouterr()
        with Checkpoints(copy) as saved:
            found = np.asarray(saved.restore(draw(0))["w"])
        said = "is damaged" in capfd.readouterr().err
        ends.append(next((step for step in (1, 2) if np.array_equal(found, draw(step)["w"])), None))
        assert ends[-1] == 2 or (ends[-1] == 1 and said), (name, ends[-1], said)
        shutil.rmtree(copy)
    assert 1 in ends  # Some of them matter.


def test_fuzzed_files_neither_crash_nor_hang_nor_run_code():
    """In processes of their own, with limits; benchmarks/reliability.md has 1,000."""
    command = [sys.executable, "-m", "benchmarks.reliability", "--parts", "fuzz"]
    command += ["--num_files", "240", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| fuzzed")]
    assert [row[0] for row in rows] == ["| fuzzed weight files", "| fuzzed images"], done.stderr
    assert [row[1:3] for row in rows] == [["156", "156"], ["84", "84"]], done.stdout
    assert all("code never ran" in row[3] and "read 0" not in row[3] for row in rows), done.stdout


@pytest.mark.filterwarnings("ignore:.*fork")
def test_the_fuzzing_itself_notices_what_must_not_happen(tmp_path, monkeypatch):
    """Code that runs, a crash, and a file that takes too long."""
    monkeypatch.setattr(reliability_fuzz, "SECONDS_PER_FILE", 0.5)
    paths = [tmp_path / name for name in ("runs", "writes", "crashes", "hangs", "raises", "reads")]

    def read(path):
        if path.name == "runs":
            os.system("true")
        elif path.name == "writes":
            (tmp_path / "canary").write_text("")
        elif path.name == "crashes":
            os.kill(os.getpid(), 9)
        elif path.name == "hangs":
            while True:
                pass
        elif path.name == "raises":
            raise KeyError("x")
        return "read"

    found = [each.result for each in reliability_fuzz.read_all(read, paths)]
    assert found[0].startswith("runs code: os.system") and found[1].startswith("runs code: open")
    assert found[2] == "ended with status 9" and found[3] == "hangs"
    assert found[4].startswith("raises KeyError") and found[5] == "read"
    assert not (tmp_path / "canary").exists()


def test_the_malicious_files_would_run_code(tmp_path):
    """Python's own unpickler, in a process of its own, makes the canary's file."""
    canary = tmp_path / "canary"
    files = reliability_fuzz.malicious_files(canary)
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    for content in [content for suffix, content in files if suffix == ".pt"][:7]:
        subprocess.run([sys.executable, "-c", program], input=content, stderr=subprocess.DEVNULL)
        assert canary.exists(), content
        canary.unlink()
