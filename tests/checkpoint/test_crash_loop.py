from crash_loop import OURS, PLANTED, Loop


def test_nothing_is_lost_when_ranks_are_killed() -> None:
    """The long run, 300 kills, is benchmarks/reliability.py."""
    loop = Loop(OURS, seed=1)
    loop.run(kills=60, seconds=300)
    assert loop.faults == []
    assert loop.kills == 60
    assert loop.in_save >= 10
    assert set(loop.world_sizes) == {1, 2, 3}
    assert loop.runs >= 1


def test_the_loop_catches_a_saver_that_overwrites_in_place() -> None:
    loop = Loop(PLANTED, seed=1)
    loop.run(kills=0, seconds=60)
    assert not loop.faults  # nothing is wrong with it as long as nobody is killed
    loop.run(kills=60, seconds=200, stop_at_fault=True)
    assert loop.faults
