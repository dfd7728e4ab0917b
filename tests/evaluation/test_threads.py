"""Several threads, each with its own copy of the model."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
import torch
from torch import nn

from unmoved.core.errors import UnmovedError
from unmoved.evaluation.threads import Workers


def test_results_come_in_order_with_their_items() -> None:
    with Workers(nn.Linear(2, 2), 3) as pool:
        assert list(pool.map(lambda model, k: k * k, range(20))) == [(k, k * k) for k in range(20)]


def test_each_thread_has_a_copy_and_the_model_itself_is_not_touched() -> None:
    model, seen = nn.Linear(2, 2), []
    meet = threading.Barrier(2, timeout=20)

    def job(own: nn.Module, _: int) -> None:
        meet.wait()  # both are at work at the same time
        seen.append(own)
        own.train(False)

    with Workers(model, 2) as pool:
        list(pool.map(job, range(4)))
    assert len({id(own) for own in seen}) == 2
    assert model not in seen
    assert model.training


def test_one_worker_is_the_caller_with_its_own_model() -> None:
    model = nn.Linear(2, 2)
    with Workers(model, 1) as pool:
        ((_, (own, thread)),) = pool.map(lambda own, _: (own, threading.current_thread()), [0])
    assert own is model
    assert thread is threading.main_thread()


def test_the_number_of_threads_of_torch_is_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with suppress(RuntimeError), Workers(nn.Linear(2, 2), 2) as pool:
            assert torch.get_num_threads() == 1
            raise RuntimeError("on exceptions too")
        assert torch.get_num_threads() == 2
        with Workers(nn.Linear(2, 2), 0) as pool:
            assert pool.count == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_of_a_job_is_the_callers() -> None:
    def job(model: nn.Module, k: int) -> int:
        if k == 3:
            raise UnmovedError("the fourth")
        return k

    with pytest.raises(UnmovedError, match="the fourth"), Workers(nn.Linear(2, 2), 2) as pool:
        list(pool.map(job, range(100)))


def test_few_items_are_read_ahead() -> None:
    """Memory does not grow with the data: no more items are held than there are workers, and one."""
    read = 0

    def items():
        nonlocal read
        for k in range(50):
            read += 1
            yield k

    with Workers(nn.Linear(2, 2), 2) as pool:
        for done, _ in enumerate(pool.map(lambda model, k: k, items())):
            assert read <= done + 4
    assert done + 1 == read == 50


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("not me")


def test_a_model_that_cannot_be_copied_works_alone() -> None:
    with Workers(Uncopied(2, 2), 2) as pool:
        assert pool.count == 1
        assert list(pool.map(lambda model, k: type(model), [0])) == [(0, Uncopied)]
