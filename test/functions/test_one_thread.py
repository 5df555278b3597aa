"""Small work runs on one thread, and everybody's numbers of threads are then what they were."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from threading import Event, Thread

import both_ways
import pytest
import torch

from gpytorch.functions import kernel_log_prob, one_thread
from gpytorch.functions.one_thread import on_one_thread, run_on_one_thread
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.settings import use_torch_tensors

NUMBER = 3  # the user's, of the thread that a test runs in


def numbers() -> tuple[int, int | None]:
    """The calling thread's numbers of threads: torch's, and that of torch's MKL where it has one."""
    mkl = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return torch.get_num_threads(), mkl and int(mkl[1])


def in_a_thread(work: Callable[[], object]) -> object:
    found = []
    thread = Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(autouse=True)
def users_numbers() -> Iterator[tuple[int, int | None]]:
    before = torch.get_num_threads()
    torch.set_num_threads(NUMBER)
    users = numbers()
    yield users
    assert numbers() == users
    assert in_a_thread(numbers) == users
    torch.set_num_threads(before)


needs_openmp = pytest.mark.skipif(one_thread._setters() is None, reason="torch's OpenMP is not found here")


@needs_openmp
def test_runs_on_one_thread_and_returns_what_is_returned() -> None:
    assert run_on_one_thread(lambda *args: (args, set(numbers()) - {None}), 1, 2) == ((1, 2), {1})


@needs_openmp
def test_blocks_nest() -> None:
    def outer() -> list[int]:
        return [torch.get_num_threads(), run_on_one_thread(torch.get_num_threads), torch.get_num_threads()]

    assert run_on_one_thread(outer) == [1, 1, 1]


def test_passes_exceptions_on() -> None:
    def fail() -> None:
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose"):
        run_on_one_thread(run_on_one_thread, fail)


@needs_openmp
def test_other_threads_keep_their_numbers(users_numbers: tuple[int, int | None]) -> None:
    is_asked, may_end, found = Event(), Event(), []

    def runs_beside() -> None:
        found.append(numbers())
        is_asked.wait()
        found.append(numbers())
        may_end.set()

    def work() -> object:
        is_asked.set()
        may_end.wait()
        return in_a_thread(numbers)  # started meanwhile

    beside = Thread(target=runs_beside)
    beside.start()
    assert run_on_one_thread(work) == users_numbers
    beside.join()
    assert found == [users_numbers, users_numbers]


@needs_openmp
def test_a_thread_that_has_not_asked_torch_yet_gets_the_users_number() -> None:
    assert in_a_thread(lambda: (run_on_one_thread(torch.get_num_threads), torch.get_num_threads())) == (1, NUMBER)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer to interrupt with")
def test_an_interrupt_at_any_moment_leaves_the_numbers_as_they_were(users_numbers: tuple[int, int | None]) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    set_mkl = one_thread._setters()[1] if one_thread._setters() else int
    before = set_mkl(NUMBER)
    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(8000):
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 20e-6)
                while True:
                    run_on_one_thread(int)
            assert torch.get_num_threads() == NUMBER
            assert set_mkl(NUMBER) == NUMBER
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        set_mkl(before)


def test_does_without_what_a_build_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    setter = one_thread._setter
    lacking = {"OpenMP": ("omp_set_num_threads", None, NUMBER), "MKL": ("MKL_Set_Num_Threads_Local", int, 1)}
    for name, set_mkl, expected in lacking.values():
        monkeypatch.setattr(
            one_thread, "_setter", lambda library, asked, name=name: None if asked == name else setter(library, asked)
        )
        found = one_thread._setters.__wrapped__()
        assert (found and found[1]) is set_mkl
        monkeypatch.setattr(one_thread, "_setters", lambda found=found: found)
        assert run_on_one_thread(torch.get_num_threads) == (expected if found else NUMBER)
        monkeypatch.undo()


def test_an_openmp_that_torch_does_not_use_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_thread, "_setter", lambda library, name: lambda number: number)
    assert one_thread._setters.__wrapped__() is None


@needs_openmp
def test_large_work_keeps_its_threads() -> None:
    ask = on_one_thread(torch.Size)(lambda shape: torch.get_num_threads())
    shapes = {(0,): 1, (256,): 1, (257,): NUMBER, (4, 256): 1, (4, 257): NUMBER, (5, 256): NUMBER, (2, 2, 256): 1}
    assert {shape: ask(shape) for shape in shapes} == shapes


@needs_openmp
@pytest.mark.parametrize(
    ("n", "batch", "number"), [(20, (), 1), (256, (), 1), (257, (), NUMBER), (100, (26,), 1), (100, (27,), NUMBER)]
)
def test_a_small_training_step_runs_on_one_thread(
    n: int, batch: tuple[int, ...], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    factorize, found = kernel_log_prob._factorize, []

    def ask(*args) -> torch.Tensor:
        found.append(torch.get_num_threads())
        return factorize(*args)

    monkeypatch.setattr(kernel_log_prob, "_factorize", ask)
    shape = torch.Size(batch)
    mll = both_ways.exact_gp(
        ScaleKernel(MaternKernel(batch_shape=shape), batch_shape=shape),
        both_ways.inputs(n, batch=batch),
        likelihood=both_ways.GaussianLikelihood(batch_shape=shape),
        mean=both_ways.means.ConstantMean(batch_shape=shape),
    )
    with use_torch_tensors(), both_ways.routes(tensors=1):
        both_ways.loss(mll).sum().backward()
    assert found == [number]


@pytest.mark.parametrize("n", [30, 280])
def test_steps_repeat_to_the_bit_and_agree_on_any_number_of_threads(n: int) -> None:
    mll = both_ways.exact_gp(ScaleKernel(MaternKernel()), both_ways.inputs(n))
    leaves, found = dict(mll.named_parameters()), {}
    for number in (1, 2, NUMBER):
        torch.set_num_threads(number)
        found[number], again = (both_ways.evaluate(lambda: both_ways.loss(mll), leaves, flag=True) for _ in range(2))
        again.assert_equal(found[number])
        found[number].assert_near(found[1], rtol=1e-11)
    torch.set_num_threads(NUMBER)
