"""Several devices and processes give what one gives. Programs of their own, since a process has one
number of devices.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import parallel
from dd_jax.parallel import processes

PROGRAM = """
import json, sys, warnings
sys.path[:0] = [{root!r}]
from dd_jax import parallel
arguments = json.loads(sys.argv[1])
if arguments.get("coordinator"):
    parallel.initialize(arguments["coordinator"], arguments["num_processes"], arguments["process_id"])
from functools import partial
import flax.linen as nn
import jax, numpy as np, optax
from dd_jax import defenses, evaluation, training
from dd_jax.data import in_memory
from dd_jax.evaluation import Settings

warnings.simplefilter("error", DeprecationWarning)
warnings.simplefilter("error", FutureWarning)

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(3, (3, 3), name="conv")(x))
        x = nn.Dropout(0.3, broadcast_dims=(0,), deterministic=not train, name="dropout")(x)
        return nn.Dense(4, name="fc")(x.reshape(len(x), -1))

model, optimizer = Net(), training.make_optimizer(optax.constant_schedule(0.05), momentum=0.9, weight_decay=1e-3)
defense = defenses.make_defense("deep_defense_fgsm", penalty_weight=1.0, correct_scale=2.0, wrong_scale=1.0, num_steps=2)
apply = lambda variables, x: model.apply(variables, x)
options = dict(batch_size=8, settings=Settings(num_steps=5), show_progress=False,
    to_images=lambda x: (x[..., :1].repeat(3, 1).repeat(3, 2) + 3) / 6)

def run(mode):
    random = np.random.default_rng(0)
    step = training.make_train_step(model, optimizer, defense, parallel_mode=mode,
                                    accumulation_steps=arguments.get("accumulation_steps", 1))
    state = parallel.replicate(training.initial_state(model, optimizer, (5, 5, 2), 0))
    for i in range(5):
        size = 13 if i == 4 else 16  # The last one is ragged.
        batch = {{"image": random.normal(size=(size, 5, 5, 2)).astype(np.float32),
                 "label": random.integers(0, 4, size).astype(np.int32), "mask": np.ones(size, np.float32), "number": np.arange(size, dtype=np.int32)}}
        state, measured = step(state, parallel.share_of(batch), jax.random.key(3))
        jax.block_until_ready(state)
    whole = in_memory(batch["image"], batch["label"])
    shares = whole._replace(batches=lambda *sizes: (parallel.share_of(part) for part in whole.batches(*sizes)))
    # The weights as training leaves them, and as a checkpoint gives them.
    states = state.params, jax.tree.map(lambda x: jax.numpy.asarray(np.asarray(x)), state.params)
    found, streamed = (
        evaluation.Evaluator(apply, examples, compile_fn=partial(compile_fn, mode=mode), **options)
        .measure({{"params": params}}, names=("deepfool", "pgd", "pass"))
        for examples, compile_fn, params in ((whole, parallel.sums_and_rows, states[0]),
                                             (shares, parallel.sums_over_shares, states[1]))
    )
    assert found.keys() == streamed.keys() and all(np.isclose(found[name], streamed[name], rtol=1e-5) for name in found), streamed
    leaves = {{jax.tree_util.keystr(path): np.asarray(x).tolist() for path, x in jax.tree.leaves_with_path(state.params)}}
    drawn = {{}}
    for name in ("adversarial_pgd", "trades"):  # They start at random points.
        loss_fn = defenses.make_defense(name, num_attack_steps=1)
        step = training.make_train_step(model, optimizer, loss_fn, parallel_mode=mode, accumulation_steps=arguments.get("accumulation_steps", 1))
        first = parallel.replicate(training.initial_state(model, optimizer, (5, 5, 2), 0))
        drawn[name] = float(step(first, parallel.share_of(batch), jax.random.key(3))[1]["loss"])
    return {{"drawn": drawn, "params": leaves, "measured": {{k: float(v) for k, v in measured.items()}}, "found": found,
            "streamed": streamed, "devices": parallel.num_devices()}}

by_mode = {{mode: run(mode) for mode in arguments.get("modes", ["auto"])}}
if parallel.is_primary():
    print(json.dumps(by_mode))
"""

ENDING = """
import json, os, signal, sys, time
sys.path[:0] = [{root!r}]
from dd_jax import parallel
from dd_jax.experiment import command_line
from dd_jax.training import loop
from dd_jax.experiment.configuration import ConfigurationError

def stage(first_step, asked_at=None):
    pauses, ended = loop.Pauses(), None
    with parallel.Termination() as termination:
        for step in range(first_step + 1, first_step + 120):
            time.sleep(0.01)
            if step == asked_at:
                os.kill(os.getpid(), signal.SIGTERM)
            _, to_end = pauses.after(step, is_line=step % 50 == 0, asked=termination.asked_for())
            if to_end:
                return step

def fail(alone):
    if alone:
        raise ConfigurationError("This one has no data.")

def main():
    parallel.initialize(arguments["coordinator"], arguments["num_processes"], arguments["process_id"])
    second = not parallel.is_primary()
    ends = [stage(0, 30 if second else None), stage(0), stage(500, 501 if second else None)]
    print(json.dumps(ends), flush=True)
    command_line.prepared_by_all(lambda: fail(second))

arguments = json.loads(sys.argv[1])
loop.SECONDS_BETWEEN_QUESTIONS = 0.2
command_line.run(main)
"""


WAITING = """
import json, os, sys, time
sys.path[:0] = [{root!r}]
from dd_jax import parallel
from dd_jax.experiment import command_line

def main():
    parallel.initialize(arguments["coordinator"], arguments["num_processes"], arguments["process_id"])
    print("[0]", flush=True)
    while True:
        parallel.any_of_us(False) if arguments["together"] else time.sleep(0.05)

arguments = json.loads(sys.argv[1])
command_line.run(main)
"""


def start(tmp_path, num_devices, program_text=PROGRAM, **arguments):
    # A file of its own: one that is written again may be read while it is empty.
    program = tmp_path / f"program_{len(list(tmp_path.iterdir()))}.py"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program.write_text(textwrap.dedent(program_text).format(root=root))
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"
    }
    command = [sys.executable, str(program), json.dumps(arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    printed = [line for line in out.splitlines() if line.startswith("{")]  # Gloo prints too.
    return json.loads(printed[0]) if printed else None


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def together(tmp_path):
    both = dict(coordinator=f"127.0.0.1:{free_port()}", num_processes=2)
    processes = [start(tmp_path, 2, **both, process_id=i, modes=MODES) for i in range(2)]
    return [result(process) for process in processes]


MODES = ["pmap", "shard_map"]


def assert_same(actual, wanted):
    for name, values in wanted["params"].items():
        np.testing.assert_allclose(
            actual["params"][name], values, rtol=1e-5, atol=1e-5, err_msg=name
        )
    np.testing.assert_allclose(*([*x["drawn"].values()] for x in (actual, wanted)), rtol=1e-5)
    for name, value in wanted["measured"].items():
        np.testing.assert_allclose(
            actual["measured"][name], value, rtol=1e-4, atol=1e-5, err_msg=name
        )
    assert (
        actual["found"].keys() == wanted["found"].keys() and actual["found"]["num_examples"] == 13
    )
    for name, value in wanted["found"].items():
        np.testing.assert_allclose(actual["found"][name], value, rtol=1e-3, err_msg=name)


def test_devices_processes_parts_and_modes_change_nothing(tmp_path):
    """Five steps with dropout, the last on a ragged batch, and a measurement whose last batch is
    ragged too. pmap and shard_map give the same bits, and neither gives a DeprecationWarning.
    """
    one, four = (result(start(tmp_path, count, modes=MODES)) for count in (1, 4))
    in_parts = result(start(tmp_path, 2, accumulation_steps=3))["auto"]
    two_processes, nothing = together(tmp_path)
    assert nothing is None
    for by_mode in (one, four, two_processes):
        assert by_mode["pmap"] == by_mode["shard_map"]
    one, four, two_processes = (found["pmap"] for found in (one, four, two_processes))
    assert [x["devices"] for x in (one, four, in_parts, two_processes)] == [1, 4, 2, 4]
    for other in (four, in_parts, two_processes):
        assert_same(other, one)


def test_an_unknown_mode_is_refused_with_the_known_ones(unchecked):
    with pytest.raises(ValueError, match="mode is 'vmap'; it must be one of auto, pmap, shard_map"):
        parallel.on_all_devices(lambda state, batch: state, mode="vmap")


def test_processes_end_together_when_one_is_asked_and_when_one_fails(tmp_path):
    """SIGTERM in a first stage, a stage without, SIGTERM at once in a stage that goes on at 500;
    then one has no data.
    """
    both = dict(coordinator=f"127.0.0.1:{free_port()}", num_processes=2)
    processes = [start(tmp_path, 1, ENDING, **both, process_id=i) for i in range(2)]
    (first, first_err), (second, second_err) = (
        process.communicate(timeout=120) for process in processes
    )
    assert [process.returncode for process in processes] == [1, 1], (
        first_err[-2000:],
        second_err[-2000:],
    )
    ends = [
        [
            json.loads(line)
            for line in out.splitlines()
            if line.startswith("[") and "Gloo" not in line
        ]
        for out in (first, second)
    ]
    ((early, never, resumed),) = ends[0]
    assert ends[0] == ends[1] and 30 <= early <= 100 and never is None and 501 <= resumed <= 550
    assert (
        first_err.strip().splitlines()[-1]
        == "error: Another process cannot begin; what it says tells why."
    )
    assert second_err.strip().splitlines()[-1] == "error: This one has no data."


def test_one_of_two_processes_is_killed_and_the_other_ends_with_a_sentence(tmp_path):
    """Each of the two, while they wait for each other and while they do not. JAX alone aborts with
    a stack trace where process 0 is gone, and waits for 100 seconds where 1 is.
    """
    pairs, ports = [], set()
    while len(ports) < 2:  # The system may give the same one twice.
        ports.add(free_port())
    for together, port in zip((True, False), ports, strict=True):
        both = dict(coordinator=f"127.0.0.1:{port}", num_processes=2, together=together)
        pairs.append([start(tmp_path, 1, WAITING, **both, process_id=i) for i in range(2)])
    try:
        for victim, pair in enumerate(pairs):
            for process in pair:  # They have met.
                have_met = any(line.startswith("[0]") for line in process.stdout)
                assert have_met, process.communicate(timeout=100)[1][-3000:]
            pair[victim].kill()
            begin = time.monotonic()
            _, errors = pair[1 - victim].communicate(timeout=100)
            assert time.monotonic() - begin < 60 and pair[1 - victim].returncode == 1
            assert "Traceback" not in errors and "***" not in errors
            said = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert (
                len(said) == 1 and "Another process has ended; what it says tells why." in said[0]
            )
    finally:  # None outlives the test, or a mounted folder could not be given back.
        for process in sum(pairs, []):
            process.kill()
        pair[victim].communicate()


def test_a_batch_is_filled_up_with_what_counts_for_nothing():
    batch = {"image": np.arange(6.0).reshape(3, 2), "mask": np.ones(3, np.float32)}
    filled = parallel.fill_up(batch, 4)
    np.testing.assert_array_equal(filled["image"], [[0, 1], [2, 3], [4, 5], [0, 1]])
    np.testing.assert_array_equal(filled["mask"], [1, 1, 1, 0])
    assert filled["mask"].dtype == np.float32
    np.testing.assert_array_equal(parallel.fill_up(batch, 3)["image"], batch["image"])
    with pytest.raises(ValueError, match="at least one example"):
        parallel.fill_up({"mask": np.ones(0)}, 2)


def test_parts_add_up_to_the_whole():
    batch = {"x": jnp.arange(12.0).reshape(6, 2), "mask": jnp.ones(6)}
    total = lambda part: {"squares": jnp.sum(part["x"] ** 2), "count": jnp.sum(part["mask"])}
    whole, parts = total(batch), parallel.summed_in_parts(total, batch, 3)
    jax.tree.map(np.testing.assert_allclose, parts, whole)


def test_rows_come_back_in_order_and_sums_over_all_devices():
    def attack(shared, batch):
        return {"values": batch["x"] * shared}

    def judge(shared, batch, found):
        return jnp.sum(found["values"] * batch["mask"]), {"doubled": found["values"]}

    batch = {"x": np.arange(5, dtype=np.float32), "mask": np.ones(5, np.float32)}
    sums, rows = parallel.sums_and_rows(attack, judge)(np.float32(2), batch)
    assert float(sums) == 20
    np.testing.assert_array_equal(rows["doubled"][:5], [0, 2, 4, 6, 8])


def test_being_asked_to_end_is_seen_between_steps():
    before = signal.getsignal(signal.SIGTERM)
    with parallel.Termination() as termination:
        assert not termination.asked_for()
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked_for() and termination.asked_for()
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_fails_elsewhere_stops_everyone(monkeypatch):
    assert parallel.in_all_processes(lambda: 3) == 3
    with pytest.raises(KeyError):
        parallel.in_all_processes(lambda: {}["a"], (KeyError,))
    monkeypatch.setattr(processes, "any_of_us", lambda flag: True)
    with pytest.raises(parallel.OthersFailedError, match="Another process cannot begin"):
        parallel.in_all_processes(lambda: 3)


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"--coordinator is '{address}', and process 0 cannot"):
            parallel.initialize(address, 2, 0)


def test_processes_are_described_whole_or_not_at_all():
    with pytest.raises(ValueError, match="Give all of --coordinator"):
        parallel.initialize("127.0.0.1:1", 2)
    for address in ("localhost", "localhost:", ":1234", "localhost:99999", "localhost:port"):
        with pytest.raises(
            ValueError, match=rf"--coordinator is '{address}'; it must be HOST:PORT of process 0"
        ):
            parallel.initialize(address, 2, 1)
    with pytest.raises(ValueError, match=r"process_id is 2; it must be within 0\.\.1"):
        parallel.initialize("127.0.0.1:1", 2, 2)
