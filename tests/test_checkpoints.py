"""Checkpoints: bitwise, never without the latest, whatever is donated, killed or moved to another
machine meanwhile.
"""

import asyncio
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.training import checkpoints
from dd_jax.training.checkpoints import NUM_KEPT, Checkpoints, DamagedCheckpointError
from dd_jax.training.train_step import TrainState


def state(step, size=5):
    """A state with what is hard to save exactly: NaN, infinity, minus zero, a denormal number,
    nothing at all.
    """
    odd = jnp.array([np.nan, np.inf, -0.0, 1e-42, 1 / 3], jnp.float32)
    params = {"fc": {"kernel": jax.random.normal(jax.random.key(step), (size, 3)), "bias": odd}}
    return TrainState(
        jnp.asarray(step, jnp.int32), params, {}, (jnp.full((2,), step, jnp.float32), ())
    )


def assert_bitwise(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert (
            a.dtype == b.dtype
            and a.shape == b.shape
            and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        )


def restored(directory, like=None):
    with Checkpoints(directory, read_only=True) as saved:
        return saved.restore(jax.eval_shape(lambda: state(0) if like is None else like))


def test_what_is_saved_comes_back_bitwise(tmp_path):
    with Checkpoints(tmp_path / "run" / "stage") as saved:
        saved.save(7, state(7))
        assert saved.latest() == 7
    assert_bitwise(restored(tmp_path / "run" / "stage"), state(7))


def test_an_empty_folder_has_no_latest_and_restoring_says_so(tmp_path):
    with Checkpoints(tmp_path) as saved:
        assert saved.latest() is None
        with pytest.raises(FileNotFoundError, match=f"There is no checkpoint in {tmp_path}"):
            saved.restore(state(0))


def test_reading_makes_no_folder(tmp_path):
    with Checkpoints(tmp_path / "nowhere", read_only=True) as saved:
        assert saved.latest() is None
        with pytest.raises(FileNotFoundError, match="There is no checkpoint in .*nowhere"):
            saved.restore(state(0))
    assert not (tmp_path / "nowhere").exists()


def test_the_latest_is_always_kept_and_the_oldest_go(tmp_path):
    # The second time in a manager that knows of the first only from the folder.
    for steps in ((3, 9, 10), (11,)):
        with Checkpoints(tmp_path) as saved:
            for step in steps:
                saved.save(step, state(step))
                assert saved.latest() == step
        assert_bitwise(restored(tmp_path), state(steps[-1]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"] and NUM_KEPT == 2


def test_a_step_that_is_there_is_left_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(4, state(4))
        saved.save(4, state(5))
    assert_bitwise(restored(tmp_path), state(4))


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
    """Orbax holds views of the CPU's buffers; steps that donate them must not write there before
    all is on the disk.
    """
    large = lambda: {
        "large": [jax.random.normal(jax.random.key(i), (2_000_000,)) for i in range(8)]
    }  # noqa: E731
    step = jax.jit(lambda tree: jax.tree.map(lambda x: 1.5 * x + 1, tree), donate_argnums=0)
    address = lambda tree: tree["large"][0].unsafe_buffer_pointer()  # noqa: E731
    present, num_steps = step(large()), 0
    before = address(present)
    present = step(present)
    assert address(present) == before  # Donating does write in place here, when nobody looks on.
    with Checkpoints(tmp_path) as saved:
        saved.save(1, present)
        while saved._manager.is_saving_in_progress():
            present, num_steps = jax.block_until_ready(step(present)), num_steps + 1
        assert num_steps > 3
    assert_bitwise(restored(tmp_path, present), step(step(large())))


def test_what_was_restored_may_be_donated(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state(1))
    for _ in range(2):  # The second time too: donating has not reached the file.
        tree = restored(tmp_path)
        doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(tree)
        assert_bitwise(doubled.params["fc"]["kernel"], 2 * state(1).params["fc"]["kernel"])


def test_a_save_that_was_killed_is_passed_over_and_made_again(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(3, state(3))
    unfinished = tmp_path / "8.orbax-checkpoint-tmp"  # What Orbax leaves.
    shutil.copytree(tmp_path / "3", unfinished)
    next(path for path in pathlib.Path(unfinished).rglob("manifest.ocdbt")).unlink()
    assert_bitwise(restored(tmp_path), state(3))
    with Checkpoints(tmp_path) as saved:
        assert saved.latest() == 3
        saved.save(8, state(8))
    assert_bitwise(restored(tmp_path), state(8))


def test_a_checkpoint_of_another_machine_is_restored_on_this_ones_device(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(2, state(2))
    for path in tmp_path.rglob("_sharding"):
        text = path.read_text()
        assert "cpu:0" in text
        path.write_text(text.replace("cpu:0", "cuda:3"))
    tree = restored(tmp_path)
    assert_bitwise(tree, state(2))
    assert {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()} == {
        jax.devices()[0]
    }


def damage(directory):
    """Cuts the largest file in two."""
    largest = max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_where_the_latest_is_damaged_the_one_before_is_taken_and_its_step_can_be_saved_again(
    tmp_path, capfd
):
    folder, like = tmp_path / "stage", state(0, size=500)
    with Checkpoints(folder) as saved:
        for step in (2, 4):
            saved.save(step, state(step, size=500))
    damage(folder / "4")
    with pytest.raises(
        DamagedCheckpointError,
        match=r"stage/4 is damaged \(.*\): rerun train.py on its run directory",
    ):
        restored(folder, like)
    assert (folder / "4").exists()
    with Checkpoints(folder) as saved:
        assert_bitwise(saved.restore(like), state(2, size=500))
        assert saved.latest() == 2 and (tmp_path / "stage_damaged/4").is_dir()
        saved.save(4, state(4, size=500))
    assert f"The checkpoint {folder / '4'} is damaged" in capfd.readouterr().err
    assert_bitwise(restored(folder, like), state(4, size=500))
    for step in ("2", "4"):
        damage(folder / step)
    with (
        Checkpoints(folder) as saved,
        pytest.raises(DamagedCheckpointError, match=f"in {folder} can be .* remove that"),
    ):
        saved.restore(like)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]


def test_reads_under_way_are_waited_for_where_another_has_failed():
    finished, make_loop = [], asyncio.new_event_loop

    async def read(array):
        await asyncio.sleep(0 if array == "damaged" else 0.1)
        if array == "damaged":
            raise OSError("cannot be read")
        finished.append(array)

    async def read_all():
        await asyncio.gather(*map(read, ["a", "damaged", "b"]))

    with checkpoints._loops_that_finish():
        loop = asyncio.new_event_loop()
        with pytest.raises(OSError, match="cannot be read"):
            loop.run_until_complete(read_all())
        assert not finished
        loop.close()
    assert sorted(finished) == ["a", "b"] and loop.is_closed()
    assert asyncio.new_event_loop is make_loop
