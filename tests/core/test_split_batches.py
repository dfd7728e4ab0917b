"""Passes over a split: all samples, each with an identity of its own, in as many steps as a schedule counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from unmoved import Batch, Method, ThreatModel, UnmovedError, attacks, evaluate, models, terms, train
from unmoved.core.split_batches import one_epoch, one_pass, require_distinct
from unmoved.evaluation.doctor import examine

THREAT = ThreatModel("linf", 0.1)
X, Y, INDEX = (
    torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0)),
    torch.arange(12) % 3,
    torch.arange(12),
)
METHOD = Method(attacks.PGD(THREAT, steps=1), terms.CE())
ATTACKS = {"pgd": attacks.PGD(THREAT, steps=1)}


class Theirs:
    """A split of somebody's own; ``make`` gives the batch of some rows."""

    num_classes, shape = 3, (1, 6, 6)

    def __init__(self, make: Callable[[slice], Any], length: int = 12, parts: int | None = None) -> None:
        self.make, self.length, self.parts = make, length, parts

    def __len__(self) -> int:
        return self.length

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Any]:
        for k in range(0, 12, self.parts or size):
            yield self.make(slice(k, k + (self.parts or size)))


def numbered(rows: slice) -> Batch:
    return Batch(X[rows], Y[rows], INDEX[rows])


def linear() -> torch.nn.Module:
    return models.linear((1, 6, 6), 3)


def test_a_whole_pass_comes_in_order_and_without_empty_batches() -> None:
    ragged = Theirs(lambda rows: numbered(rows) if rows.start != 4 else Batch(X[:0], Y[:0]), 8)
    assert [len(batch) for batch in one_pass(ragged, 4)] == [4, 4]
    assert torch.equal(torch.cat([batch.index for batch in one_pass(Theirs(numbered), 5)]), INDEX)
    assert [len(batch) for batch in one_epoch(Theirs(numbered), 5, 0)] == [5, 5, 2]


@pytest.mark.parametrize("length", [11, 13])
def test_samples_that_nobody_sees_are_never_counted_as_robust(length: int) -> None:
    with pytest.raises(UnmovedError, match=f"expected its {length} samples in each pass, came 12"):
        evaluate(linear(), Theirs(numbered, length), ATTACKS, THREAT, batch_size=4)


def test_a_generator_that_is_used_up_is_no_data() -> None:
    """The second pass, the attack's, finds nothing: each sample would have been robust."""

    class Once(Theirs):
        def __init__(self) -> None:
            super().__init__(numbered)
            self.rest = super().batches(4)

        def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Any]:
            return self.rest

    with pytest.raises(UnmovedError, match=r"came 0; let Once.batches begin anew whenever it is called"):
        evaluate(linear(), Once(), ATTACKS, THREAT, batch_size=4)


UNNUMBERED = Theirs(lambda rows: Batch(X[rows], Y[rows]))
TUPLES = Theirs(lambda rows: (X[rows], Y[rows]))


@pytest.mark.parametrize("split", [UNNUMBERED, TUPLES], ids=["unnumbered", "tuples"])
@pytest.mark.parametrize(
    "use",
    [
        lambda split: evaluate(linear(), split, ATTACKS, THREAT, batch_size=4),
        lambda split: train(linear(), METHOD, split, epochs=1, batch_size=4),
        lambda split: train(
            linear(), METHOD, Theirs(numbered), validation=split, threat=THREAT, epochs=1, batch_size=4
        ),
    ],
    ids=["evaluate", "train", "validation"],
)
def test_identities_and_batches_that_are_none_are_found_before_training(split: Any, use: Any) -> None:
    words = "an identity of its own for each sample, came 0 more than once; yield Batch" if split is UNNUMBERED else ""
    with pytest.raises(UnmovedError, match=words or r"expected its batches to be Batch\(x, y, index\), came tuple"):
        use(split)


def test_the_doctor_takes_no_tuples() -> None:
    with pytest.raises(UnmovedError, match=r"came tuple; yield unmoved.Batch"):
        examine.examine(linear(), TUPLES, THREAT)


def test_an_identity_twice_is_found_wherever_it_stands() -> None:
    require_distinct(INDEX)
    late = INDEX.clone()
    late[11] = 3
    with pytest.raises(UnmovedError, match="came 3 more than once"):
        evaluate(linear(), Theirs(lambda rows: Batch(X[rows], Y[rows], late[rows])), ATTACKS, THREAT, batch_size=4)


@pytest.mark.parametrize(("parts", "words"), [(6, "came a batch of 6"), (3, "came more than 3")])
def test_a_training_takes_as_many_steps_as_its_schedule_counts(parts: int, words: str) -> None:
    with pytest.raises(UnmovedError, match=f"at most 3 batches of at most 4 samples, {words}"):
        train(linear(), METHOD, Theirs(numbered, parts=parts), epochs=1, batch_size=4)
    table = evaluate(linear(), Theirs(numbered, parts=parts), ATTACKS, THREAT, batch_size=4)
    assert sorted(table["index"]) == INDEX.tolist()  # a verdict does not depend on batches
