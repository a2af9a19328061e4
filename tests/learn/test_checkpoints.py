"""Checkpoints: what is kept comes back as it was, or not at all."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError
from qnpu_jax.learn import train
from qnpu_jax.learn.checkpoints import Checkpoints, check_checkpoints, last_checkpoint
from qnpu_jax.learn.parameters import R1, R2, ThetaKey
from qnpu_jax.learn.train import History, TrainState
from qnpu_jax.recipes import Stage

INPUTS = {"model": "m" * 64, "recipe": {"seed": 0, "stages": [{"share": 1.0}]}}
BIAS = ThetaKey("bias", "layers.attn.q.bias")
HISTORY = History([0.1, 1 / 3], [(0, 0.7), (2, math.pi)], {"a": [0.6, 3.0], "b": [0.8, math.pi]}, 1)


def state(step: int, seed: int = 0) -> TrainState:
    """As of a stage that learns biases and rotations."""
    rng = np.random.default_rng(seed)
    theta = {
        BIAS: jnp.asarray(rng.normal(size=(2, 5)), jnp.float32),
        R1: jnp.eye(4, dtype=jnp.float32),
        R2: jnp.zeros((2, 3, 3), jnp.float32),
    }
    stage = Stage(learn=(("biases", 0.1), ("rotation", 0.1)))
    return replace(train.initial_state(stage, theta, 10), step=jnp.int32(step), stale=np.int32(3))


def flat(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, x in flat(a).items():
        np.testing.assert_array_equal(x, flat(b)[name], err_msg=name)


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Steps 4 and 6 of stage 0, step 2 of stage 1."""
    store = Checkpoints(tmp_path / "kept", INPUTS)
    for stage, step in ((0, 4), (0, 6), (1, 2)):
        store.save(stage, state(step, seed=10 * stage + step), HISTORY)
    return tmp_path / "kept"


# What is kept.


def test_comes_back_as_it_was(folder):
    like = state(0)
    found = Checkpoints(folder, INPUTS).load(0, like)
    assert found is not None
    restored, history = found
    assert_equal(restored, state(6, seed=6))
    assert history == HISTORY
    for name, x in flat(restored).items():
        expected = flat(like)[name]
        assert isinstance(x, type(expected)), name
        assert (x.dtype, x.shape) == (expected.dtype, expected.shape)
        assert getattr(x, "weak_type", None) == getattr(expected, "weak_type", None)
    # The compiled step may overwrite it, and the same compiled step takes it.
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
    moved = step(replace(restored, best=None, best_kl=None, stale=None, first_loss=None))
    assert int(moved.step) == 7
    np.testing.assert_array_equal(restored.best[R1], np.eye(4))


def test_nothing_kept(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    store = Checkpoints(tmp_path / "new" / "kept", INPUTS)
    assert last_checkpoint(store.folder) is None
    assert store.load(0, state(0)) is None
    store.remove()
    assert list((tmp_path / "new").iterdir()) == []


def test_the_last_two_of_a_stage_are_kept(folder):
    assert last_checkpoint(folder) == (1, 2)
    store = Checkpoints(folder, INPUTS)
    for step in (8, 10):
        store.save(0, state(step), HISTORY)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "run.json", "stage0", "stage0-8.json", "stage0-10.json", "stage1", "stage1-2.json"
    }  # fmt: skip
    assert {p.name for p in (folder / "stage0").iterdir()} == {"8", "10"}
    assert last_checkpoint(folder) == (1, 2)


def test_removed_but_for_what_is_not_ours(folder):
    store = Checkpoints(folder, INPUTS)
    (folder / "notes.txt").write_text("")
    store.remove()
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


# Killed while it saves.


@pytest.mark.parametrize("where", ["before", "after"])
def test_killed_while_it_saves(folder, monkeypatch, where):
    """Before orbax commits the state, and between that and our record of it."""

    def die(*_, **__):
        raise KeyboardInterrupt

    store = Checkpoints(folder, INPUTS)
    with monkeypatch.context() as patch:
        if where == "before":
            # What orbax leaves behind: a folder of a temporary name, half full.
            half = folder / "stage0" / "8.orbax-checkpoint-tmp"
            shutil.copytree(folder / "stage0" / "6", half)
            (half / "default" / "manifest.ocdbt").unlink()
            patch.setattr(ocp.CheckpointManager, "save", die)
        else:
            patch.setattr(artifacts, "digests", die)
        with pytest.raises(KeyboardInterrupt):
            store.save(0, state(8, seed=8), HISTORY)
    again = Checkpoints(folder, INPUTS)
    found = again.load(0, state(0))
    assert found is not None
    assert_equal(found[0], state(6, seed=6))
    again.save(0, state(8, seed=9), HISTORY)
    found = again.load(0, state(0))
    assert found is not None
    assert_equal(found[0], state(8, seed=9))


def test_killed_before_it_says_whose_it_is(tmp_path):
    (tmp_path / ".run.json.partial").write_text('{"form')
    store = Checkpoints(tmp_path, INPUTS)
    assert json.loads((store.folder / "run.json").read_text())["model"] == INPUTS["model"]


# Refused, and left as it is.


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"model": "n" * 64}, f"model: expected {'n' * 37}..., got {'m' * 37}...; give what that"),
        ({"recipe": {"seed": 1}}, "recipe.seed: expected 1, got 0;"),
        (
            {"recipe": {"seed": 0, "stages": [{"share": 0.5}]}},
            "recipe.stages[0].share: expected 0.5, got 1.0;",
        ),
        (
            {"recipe": {"seed": 0, "stages": [{"share": 1.0}, {"share": 1.0}]}},
            "recipe.stages[1].share: expected 1.0, got nothing;",
        ),
        ({"recipe": {"seed": 0}}, "recipe.stages[0].share: expected nothing, got 1.0;"),
        ({"calibration": "0" * 64}, "calibration: expected 0000"),
    ],
)
def test_of_another_run(folder, inputs, message):
    before = artifacts.digests(folder)
    said = refusal(Checkpoints, folder, INPUTS | inputs)
    assert said.startswith(f"{folder}: checkpoints of another run: {message}")
    assert "remove the folder, or choose another --checkpoints" in said
    assert said == refusal(check_checkpoints, folder, inputs)  # before the rest is known
    assert artifacts.digests(folder) == before


@pytest.mark.parametrize("package", ["qnpu", "jax", "orbax-checkpoint"])
def test_of_another_version(folder, monkeypatch, package):
    real = artifacts.version
    monkeypatch.setattr(artifacts, "version", lambda p: "9.9" if p == package else real(p))
    assert f"versions.{package}: expected 9.9, got {real(package) or 'nothing'};" in refusal(
        Checkpoints, folder, INPUTS
    )


def test_of_another_format_or_device(folder):
    run = json.loads((folder / "run.json").read_text())
    for key, value in (("format", 0), ("device", "abacus")):
        (folder / "run.json").write_text(json.dumps(run | {key: value}))
        assert f"{key}: expected {run[key]}, got {value};" in refusal(Checkpoints, folder, INPUTS)


def test_not_ours(tmp_path):
    (tmp_path / "file").write_text("")
    assert refusal(Checkpoints, tmp_path / "file", INPUTS).startswith(
        f"{tmp_path / 'file'}: is a file; expected a folder; choose another --checkpoints"
    )
    before = artifacts.digests(tmp_path)
    assert refusal(Checkpoints, tmp_path, INPUTS).startswith(
        f"{tmp_path}: holds no run.json, so it"
    )
    with ocp.StandardCheckpointer() as orbax:  # somebody else's checkpoints
        orbax.save(tmp_path / "orbax", {"x": np.zeros(3)})
    assert "orbax: holds no run.json" in refusal(Checkpoints, tmp_path / "orbax", INPUTS)
    (tmp_path / "orbax").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved")
    assert artifacts.digests(tmp_path) == before


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_state(folder, damage):
    """Orbax itself reads a flipped bit as another number."""
    file = largest(folder / "stage0" / "6")
    data = bytearray(file.read_bytes())
    match damage:
        case "flipped":
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        case "truncated":
            file.write_bytes(data[: len(data) // 2])
        case _:
            file.unlink()
    before = artifacts.digests(folder)
    store = Checkpoints(folder, INPUTS)
    said = refusal(store.load, 0, state(0))
    what = "missing; expected by stage0-6.json" if damage == "missing" else "changed or damaged"
    assert said.startswith(f"{file}: {what}")
    record = folder / "stage0-6.json"
    way_out = f"remove {record} to go on from the checkpoint before, or remove {folder} to learn"
    assert said.endswith(f"{way_out} afresh")
    assert artifacts.digests(folder) == before
    record.unlink()
    found = store.load(0, state(0))
    assert found is not None
    assert_equal(found[0], state(4, seed=4))


RECORD = {"loss": [0.5], "held_out": [[0, 0.5]], "sha256": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lo', "cannot be read"),
        ("{}", "incomplete"),
        ("[]", "expected a JSON object, got list"),
        *(
            (json.dumps(RECORD | {"domains": domains}), "incomplete or damaged")
            for domains in (5, {}, {"a": 1}, {"a": []}, {"a": ["x"]})
        ),
    ],
)
def test_damaged_record(folder, text, message):
    (folder / "stage0-6.json").write_text(text)
    said = refusal(Checkpoints(folder, INPUTS).load, 0, state(0))
    assert said.startswith(f"{folder / 'stage0-6.json'}: {message}")


def test_damaged_description(folder):
    (folder / "run.json").write_text('{"form')
    said = refusal(Checkpoints, folder, INPUTS)
    assert said.startswith(f"{folder / 'run.json'}: cannot be read")
    assert said.endswith(f"; remove {folder} to learn afresh")


def test_arrays_of_another_stage(folder):
    """Of a recipe of equal settings, but not of equal code. Orbax would cut arrays to measure."""
    store = Checkpoints(folder, INPUTS)
    like = state(0)
    short = replace(like, theta=like.theta | {R2: jnp.zeros((2, 3, 2), jnp.float32)})
    assert (
        "stage0/6: .theta['rotation/r2']: expected float32[2, 3, 2], got float32[2, 3, 3];"
        in refusal(store.load, 0, short)
    )
    fewer = replace(like, best={R1: like.best[R1]})
    said = refusal(store.load, 0, fewer)
    assert "stage0/6: array .best['bias/layers.attn.q.bias'] is unknown; expected" in said
    more = replace(like, best=like.best | {ThetaKey("bias", "a"): np.zeros(1, np.float32)})
    assert "array .best['bias/a'] is missing" in refusal(store.load, 0, more)


def test_no_room(tmp_path):
    store = Checkpoints(tmp_path, INPUTS)
    (tmp_path / "stage0").write_text("")  # stands for a disk that takes no more
    said = refusal(store.save, 0, state(2), HISTORY)
    assert said.startswith(f"{tmp_path}/stage0/2: orbax cannot read or write it (")
