"""TensorBoard's curves: what is written is read back, also by a run that goes on."""

import pytest

from dd_jax import log

LINE = {
    "stage": "defended",
    "step": 3,
    "epoch": 0.5,
    "loss": 2.0,
    "test": {"accuracy": 0.75, "num_examples": 4},
}


def test_a_line_s_numbers_have_their_place():
    assert dict(log.numbers(LINE)) == {
        "epoch": 0.5,
        "loss": 2.0,
        "test/accuracy": 0.75,
        "test/num_examples": 4,
    }


def test_curves_are_written_at_their_steps(tmp_path):
    pytest.importorskip("tensorboardX", reason="the optional extra 'tensorboard' is not installed")
    from tensorboardX.proto import event_pb2

    for first_step, loss in ((0, 2.0), (2, 1.0)):
        with log.open_curves(tmp_path, first_step) as add:
            add(LINE | {"step": first_step + 1, "loss": loss})
    found, starts = [], []
    for path in sorted(tmp_path.glob("events*")):
        data, place = path.read_bytes(), 0
        while place < len(data):  # Length, its checksum, the event, its checksum.
            length = int.from_bytes(data[place : place + 8], "little")
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            starts += [event.step] if event.HasField("session_log") else []
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            place += 16 + length
    assert {(step, value) for step, tag, value in found if tag == "loss"} == {(1, 2.0), (3, 1.0)}
    assert {tag for _, tag, _ in found} == {"epoch", "loss", "test/accuracy", "test/num_examples"}
    assert 2 in starts  # Where the second run's curves take over.


def test_without_the_package_that_is_said(monkeypatch):
    assert isinstance(log.is_tensorboard_installed(), bool)
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    assert not log.is_tensorboard_installed()
