"""The harness itself: results, failures, hangs, and what is left behind. Nothing here needs the package."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from .ranks import RankPool, RanksFailed, run_ranks

Pools = Callable[[int], RankPool]


def total(rank: int, world_size: int, start: int) -> tuple[int, int, torch.Tensor]:
    x = torch.tensor([start + rank])
    dist.all_reduce(x)
    return rank, world_size, x


def identity(rank: int, world_size: int) -> int:
    return os.getpid()


def draws(rank: int, world_size: int) -> tuple[float, float]:
    return random.random(), torch.rand(1).item()


def chatty(rank: int, world_size: int) -> None:
    print(f"words of {rank}")
    os.write(2, f"raw words of {rank}\n".encode())


def raises_on(rank: int, world_size: int, culprit: int) -> None:
    print(f"before the trouble on {rank}")
    if rank == culprit:
        raise ValueError("the layer is on fire")
    dist.barrier()


def dies_on(rank: int, world_size: int, culprit: int, how: int) -> None:
    if rank == culprit:
        os.kill(os.getpid(), how)
    dist.barrier()


def leaves(rank: int, world_size: int) -> None:
    sys.exit(3)


def hangs(rank: int, world_size: int) -> None:
    print(f"rank {rank} gets in")
    if rank == 0:
        waits_for_ever()


def waits_for_ever() -> None:
    time.sleep(3600)


def starts_a_child(rank: int, world_size: int, pids: Path) -> None:
    child = subprocess.Popen(["sleep", "3600"])
    (pids / str(rank)).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(3600)


def uneven_collectives(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(3))


def ends_the_group(rank: int, world_size: int) -> None:
    dist.destroy_process_group()


def variable(rank: int, world_size: int, name: str) -> str | None:
    return os.environ.get(name)


def unpicklable(rank: int, world_size: int) -> Callable[[], None]:
    return lambda: None


def forks(rank: int, world_size: int) -> int:
    context = torch.multiprocessing.get_context("fork")
    child = context.Process(target=os.getpid)
    child.start()
    child.join()
    return child.exitcode if child.exitcode is not None else -1


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def gone_soon(pids: list[int]) -> bool:
    for _ in range(1200):
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_the_order_of_the_ranks(world_size: int) -> None:
    expected = sum(10 + rank for rank in range(world_size))
    results = run_ranks(total, world_size, 10)
    assert [(rank, size, x.item()) for rank, size, x in results] == [
        (rank, world_size, expected) for rank in range(world_size)
    ]


def test_a_pool_keeps_its_processes(ranks: Pools) -> None:
    first, second = ranks(2).run(identity), ranks(2).run(identity)
    assert first == second
    assert len({*first, os.getpid()}) == 3


def test_random_numbers_do_not_depend_on_what_ran_before(ranks: Pools) -> None:
    first, second = ranks(2).run(draws), ranks(2).run(draws)
    assert first == second
    assert first[0] == first[1]


def test_output_of_a_good_run_is_printed(ranks: Pools, capsys: pytest.CaptureFixture[str]) -> None:
    ranks(2).run(chatty)
    printed = capsys.readouterr().out
    for rank in range(2):
        assert f"[rank {rank}] words of {rank}\nraw words of {rank}\n" in printed
    ranks(2).run(identity)
    assert capsys.readouterr().out == ""


def test_an_exception_on_one_rank_shows_its_traceback_and_the_output_of_all() -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(raises_on, 3, 1, timeout=60)
    text = str(failure.value)
    assert text.startswith("tests.test_ranks.raises_on on 3 ranks: rank 1 raised ValueError: the layer is on fire\n")
    assert 'raise ValueError("the layer is on fire")' in text
    for rank in range(3):
        assert f"before the trouble on {rank}" in text
    assert text.count("was still running, and was killed") == 2
    assert text.count("dist.barrier()") + text.count("in barrier") >= 2  # where the other two were


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_the_death_of_a_rank_is_told(how: signal.Signals) -> None:
    with pytest.raises(RanksFailed, match=f"rank 1 died of {how.name}"):
        run_ranks(dies_on, 2, 1, how, timeout=60)


def test_a_crash_shows_the_stacks_of_all_threads() -> None:
    """Also of those that know nothing of Python, as Gloo's."""
    with pytest.raises(RanksFailed) as failure:
        run_ranks(dies_on, 2, 1, signal.SIGSEGV, timeout=60)
    assert "in dies_on" in str(failure.value)
    assert "gloo::transport::tcp::Loop::run" in str(failure.value)


def test_an_exit_is_a_failure() -> None:
    with pytest.raises(RanksFailed, match="raised SystemExit: 3"):
        run_ranks(leaves, 1)


def test_a_hang_is_killed_and_shows_where_it_was() -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(hangs, 3, timeout=4)
    text = str(failure.value)
    assert "on 3 ranks: not done after 4 s: rank 0, 1, 2" in text  # ranks 1 and 2 wait in the closing barrier
    assert "in waits_for_ever" in text
    for rank in range(3):
        assert f"rank {rank} gets in" in text


def test_a_time_out_kills_the_ranks_and_their_children(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="not done after 4 s"):
        run_ranks(starts_a_child, 2, tmp_path, timeout=4)
    pids = [int(pid) for rank in range(2) for pid in (tmp_path / str(rank)).read_text().split()]
    assert len(pids) == 4
    assert gone_soon(pids)


def test_different_collectives_fail_in_the_test_that_made_them() -> None:
    with RankPool(2) as pool:
        with pytest.raises(RanksFailed):
            pool.run(uneven_collectives, timeout=4)
        assert [x.item() for _, _, x in pool.run(total, 0)] == [1, 1]


def test_a_pool_starts_afresh_after_a_failure() -> None:
    with RankPool(2) as pool:
        before = pool.run(identity)
        with pytest.raises(RanksFailed, match="rank 0 raised ValueError"):
            pool.run(raises_on, 0)
        assert gone_soon(before)
        after = pool.run(identity)
        assert not {*before} & {*after}
        assert [x.item() for _, _, x in pool.run(total, 1)] == [3, 3]
    assert gone_soon(after)


def test_a_pool_whose_rank_died_between_two_runs_says_so() -> None:
    with RankPool(2) as pool:
        victim = pool.run(identity)[1]
        os.kill(victim, signal.SIGKILL)
        assert gone_soon([victim])
        with pytest.raises(RanksFailed, match="rank 1 died of SIGKILL"):
            pool.run(total, 0)
        assert len(pool.run(identity)) == 2


def test_a_function_may_end_the_group(ranks: Pools) -> None:
    ranks(2).run(ends_the_group)
    assert [x.item() for _, _, x in ranks(2).run(total, 0)] == [1, 1]


def test_environment_reaches_the_ranks() -> None:
    assert run_ranks(variable, 2, "FASTOPT_TEST", env={"FASTOPT_TEST": "x"}) == ["x", "x"]
    assert run_ranks(variable, 2, "RANK") == ["0", "1"]
    assert "FASTOPT_TEST" not in os.environ


def test_what_cannot_be_pickled_is_told(ranks: Pools) -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 raised .*pickle"):
        ranks(2).run(unpicklable)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        ranks(2).run(lambda rank, world_size: None)


def test_a_rank_may_start_processes_of_its_own(ranks: Pools) -> None:
    assert ranks(2).run(forks) == [0, 0]


def test_ranks_die_with_the_process_that_owns_them(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.ranks import run_ranks\n"
        "from tests.test_ranks import starts_a_child\n"
        "if __name__ == '__main__':\n"
        "    run_ranks(starts_a_child, 2, Path(sys.argv[1]), timeout=240)\n"
    )
    script = tmp_path / "owner.py"
    script.write_text(program)
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)}  # it cannot tidy up
    owner = subprocess.Popen([sys.executable, script, tmp_path], env=env)
    until = time.monotonic() + 240
    while owner.poll() is None and time.monotonic() < until:
        if len([path for path in tmp_path.glob("[01]") if path.read_text()]) == 2:
            break
        time.sleep(0.05)
    owner.kill()
    owner.wait()
    pids = [int(pid) for rank in range(2) for pid in (tmp_path / str(rank)).read_text().split()]
    assert gone_soon(pids)
