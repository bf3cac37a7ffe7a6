"""kill -9 at 50 random instants, with other work on the machine: a loadable newest checkpoint each time."""

import random

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import reshard_checkpoint
from tests.support import victims
from tests.support.processes import context
from tests.support.toy import random_tensors, read_all, same, save

KILLS = 50


@pytest.fixture(scope="module", autouse=True)
def _load():
    """Other work on both cores."""
    load = [context().Process(target=victims.burn, daemon=True) for _ in range(2)]
    for process in load:
        process.start()
    yield
    for process in load:
        process.kill()


def kill_while(target, *args, seconds):
    """Start, and kill after `seconds` that are counted from a moment at which the process is there."""
    process = context().Process(target=target, args=args, daemon=True)
    process.start()
    process.join(seconds)
    assert process.exitcode is None, "it ended by itself"
    process.kill()
    process.join()


@pytest.mark.parametrize("victim", [victims.save_for_ever, victims.save_in_background_for_ever])
def test_a_save_that_is_killed_leaves_the_newest_complete(tmp_path, victim):
    chance = random.Random(0)
    newest, litter = 0, 0
    for _ in range(KILLS):
        kill_while(victim, str(tmp_path), newest + 1, seconds=chance.uniform(0.05, 0.6))
        litter += any(path.name.startswith(".") for path in tmp_path.iterdir())
        if not (tmp_path / "latest").exists():
            continue
        reader = CheckpointReader(tmp_path)
        reader.verify()
        assert reader.step >= newest, "a newer checkpoint was there before"
        newest = reader.step
        for group in reader.groups():
            assert (reader.read_rows(group, "embedding.weight", start=0, stop=victims.ROWS) == newest).all()
    assert newest > KILLS / 5
    assert litter > KILLS / 5, "few were killed while they were saving"
    save(tmp_path, random_tensors(), step=newest + 1)
    assert all(path.name.startswith(("step_", "latest")) for path in tmp_path.iterdir())


def test_the_tool_killed_leaves_the_newest_complete_and_its_source_alone(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    tensors = random_tensors()
    save(source, tensors, (2, 2, 1))
    chance, kills, complete, litter = random.Random(1), 0, 0, 0
    # a slow machine imports for most of that time: it is killed more often, until enough of what is checked was seen
    while kills < KILLS or (kills < 4 * KILLS and not (complete > KILLS / 5 and litter > KILLS / 10)):
        kills += 1
        kill_while(victims.reshard_for_ever, str(source), str(target), seconds=chance.uniform(0.02, 0.3))
        if not target.exists():
            continue
        litter += any(path.name.startswith(".") for path in target.iterdir())
        if (target / "latest").exists():
            complete += 1
            CheckpointReader(target).verify()
            assert same(read_all(target), tensors)
    assert complete > KILLS / 5
    assert litter > KILLS / 10, "few were killed while they were writing"
    assert same(read_all(source), tensors)
    assert reshard_checkpoint.main(["--load", str(source), "--save", str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["latest", "step_00000100"]
