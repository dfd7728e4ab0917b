"""The judge: attacks propose, it decides; its verdict is what a plain count says, or it raises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from unmoved import evaluate, train
from unmoved.attacks import APGD, FGSM, PGD, Quick
from unmoved.core.batch import Batch
from unmoved.core.errors import UnmovedError
from unmoved.core.protocols import Method
from unmoved.core.threat import ThreatModel
from unmoved.data import ArraySplit, digits
from unmoved.evaluation import curve_and_gallery, outcomes
from unmoved.terms import CE
from unmoved.training.optim import Adam

THREAT = ThreatModel("linf", 0.1)
DATA = digits(test=0.5)
TEST = DATA.test.take(150)


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    """Trained on digits without any defense, with BatchNorm and dropout inside."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
        net = nn.Sequential(*first, nn.Dropout(0.2), nn.Linear(144, 10))
    train(net, Method(None, CE("clean")), DATA.train, epochs=6, batch_size=64, optimizer=Adam(lr=1e-2), device="cpu")
    return net


@dataclass(frozen=True)
class Batches:
    """A split of whatever batches it is given, right or wrong."""

    parts: tuple[Batch, ...]
    num_classes: int = 10
    shape: tuple[int, int, int] = (1, 8, 8)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        yield from self.parts


@dataclass(frozen=True)
class Doubles:
    """The same split in float64, where rounding decides nothing."""

    part: ArraySplit
    num_classes: int = 10
    shape: tuple[int, int, int] = (1, 8, 8)

    def __len__(self) -> int:
        return len(self.part)

    def batches(self, size: int, *, shuffle: int | None = None) -> Iterator[Batch]:
        for batch in self.part.batches(size):
            yield replace(batch, x=batch.x.double())


def accuracy(table: pd.DataFrame) -> dict[str, float]:
    return outcomes.summary(table).set_index("measure")["accuracy"].to_dict()


def whole(split: ArraySplit) -> Batch:
    return next(iter(split.batches(len(split))))


# --- the verdict


def test_one_row_per_sample_and_attack(model: nn.Module) -> None:
    table = evaluate(model, TEST, {"pgd": PGD(THREAT, steps=3), "fgsm": FGSM(THREAT)}, THREAT, batch_size=64)
    assert tuple(table.columns) == outcomes.COLUMNS
    assert len(table) == 2 * len(TEST)
    assert table["attack"].unique().tolist() == ["fgsm", "pgd"]
    for _, rows in table.groupby("attack"):
        assert rows["index"].tolist() == sorted(TEST.index.tolist())
    labels = dict(zip(TEST.index.tolist(), TEST.labels.tolist(), strict=True))
    assert table["label"].tolist() == [labels[k] for k in table["index"]]
    assert (table["eps"] == 0.1).all()
    assert (table["norm"] == "linf").all()
    outcomes.checked(table)


def test_clean_accuracy_is_that_of_a_plain_loop(model: nn.Module) -> None:
    batch = whole(TEST)
    model.eval()
    with torch.no_grad():
        right = (model(batch.x).argmax(dim=1) == batch.y).sum()
    model.train()
    for attacks in ({"a": PGD(THREAT, steps=1)}, {"a": lambda m, b: b.x}):
        table = evaluate(model, TEST, attacks, THREAT, batch_size=64)
        assert accuracy(table)["clean"] == int(right) / len(TEST)


def test_at_eps_zero_robust_is_clean_exactly(model: nn.Module) -> None:
    ball = ThreatModel("linf", 0.0)
    one_wrong = replace(TEST, labels=TEST.labels.index_fill(0, torch.tensor([3]), (int(TEST.labels[3]) + 1) % 10))
    for attack in (PGD(ball), APGD(ball, steps=5), lambda m, b: b.x):
        table = evaluate(model, one_wrong, {"a": attack}, ball)
        scores = accuracy(table)
        assert scores["a"] == scores["clean"] == scores["worst case"] < 1
        assert (table["adversarial_prediction"] == table["clean_prediction"]).all()


def test_success_is_what_a_second_look_at_the_same_images_says(model: nn.Module) -> None:
    """T16: the proposals are judged again, by hand."""
    kept: dict[int, Tensor] = {}

    def attack(m: nn.Module, batch: Batch) -> Tensor:
        x_adv = PGD(THREAT, steps=3)(m, batch)
        kept.update(zip(batch.index.tolist(), x_adv, strict=True))
        return x_adv

    table = evaluate(model, TEST, {"a": attack}, THREAT, batch_size=32).set_index("index")
    model.eval()
    for k, x, y in zip(TEST.index.tolist(), whole(TEST).x, TEST.labels.tolist(), strict=True):
        row = table.loc[k]
        with torch.no_grad():
            clean = int(model(x[None]).argmax())
            adversarial = int(model(kept[k][None]).argmax()) if clean == y else clean
        assert (row.clean_prediction, row.adversarial_prediction) == (clean, adversarial)
        assert row.success == (adversarial != y)
        assert (k in kept) == (clean == y)  # what is lost already is not attacked
        assert row.distance == pytest.approx(float((kept[k] - x).abs().max()) if clean == y else 0.0, abs=1e-7)
    assert table["success"].mean() > 0.3
    assert not table["success"].all()


def test_the_verdict_does_not_depend_on_batch_size_or_order(model: nn.Module) -> None:
    exact, few = copy.deepcopy(model).double(), TEST.take(50)
    attacks = {"pgd": PGD(THREAT, steps=3, restarts=2, keep="best"), "apgd": APGD(THREAT, steps=5)}
    first = evaluate(exact, Doubles(few), attacks, THREAT, batch_size=50)
    backwards = few.select(torch.arange(len(few) - 1, -1, -1))
    for split, size in ((few, 7), (few, 1), (backwards, 32)):
        other = evaluate(exact, Doubles(split), attacks, THREAT, batch_size=size)
        pd.testing.assert_frame_equal(first, other, check_exact=False, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_robust_accuracy_falls_with_eps_steps_and_restarts(model: nn.Module, norm: str) -> None:
    """T14, T16: sample by sample, what was broken stays broken."""
    unit = 0.05 if norm == "linf" else 0.3
    ball = ThreatModel(norm, unit)

    def robust(attack: Any) -> pd.Series:
        table = evaluate(model, TEST, {"a": attack}, attack.threat).set_index("index")
        return ~table["success"]

    fixed = PGD(ball, step_size=unit / 4, keep="best")
    for grown in (
        [replace(fixed, steps=steps) for steps in (0, 1, 3, 6)],
        [replace(fixed, steps=2, restarts=restarts) for restarts in (1, 2, 4)],
    ):
        results_by_recipe = [robust(attack) for attack in grown]
        for weak, strong in zip(results_by_recipe, results_by_recipe[1:], strict=False):
            assert not (strong & ~weak).any()
        assert results_by_recipe[0].sum() > results_by_recipe[-1].sum()
    radii = [0.0, unit / 2, unit, 2 * unit, 4 * unit]
    table = curve_and_gallery.curve(model, TEST, PGD(ball, steps=5, keep="best"), ball, radii)
    falling = outcomes.curve_summary(table)["accuracy"].tolist()
    assert falling == sorted(falling, reverse=True)
    assert falling[0] > falling[-1] + 0.5


def test_nothing_undefended_stands_at_eps_one(model: nn.Module) -> None:
    ball = ThreatModel("linf", 1.0)
    assert accuracy(evaluate(model, TEST, {"a": PGD(ball, steps=10, keep="best")}, ball))["a"] <= 0.02


def test_the_worst_case_is_per_sample(model: nn.Module) -> None:
    """Two attacks that break half of the samples each leave none."""

    def half(parity: int) -> Callable[[nn.Module, Batch], Tensor]:
        def attack(m: nn.Module, batch: Batch) -> Tensor:
            strong = PGD(ThreatModel("linf", 1.0), steps=10, keep="best")(m, batch)
            return torch.where((batch.index % 2 == parity)[:, None, None, None], strong, batch.x)

        return attack

    table = evaluate(model, TEST, {"odd": half(1), "even": half(0)}, ThreatModel("linf", 1.0))
    scores = accuracy(table)
    assert scores["odd"] > 0.3
    assert scores["even"] > 0.3
    assert scores["worst case"] <= 0.02


# --- what is left alone


def test_modes_weights_gradients_and_random_state_are_left_alone(model: nn.Module) -> None:
    model.train()
    model[1].eval()  # one frozen layer inside
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.random.get_rng_state()
    with pytest.raises(UnmovedError):
        evaluate(model, TEST, {"a": PGD(THREAT, steps=2), "b": lambda m, b: b.x + 1}, THREAT)
    curve_and_gallery.gallery(model, TEST, PGD(THREAT, steps=2), THREAT)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all((p.grad == 1).all() for p in model.parameters())
    model.zero_grad()
    model.train()


def test_progress_rises_to_its_end_and_says_an_upper_bound(model: nn.Module) -> None:
    told: list[tuple[float, float, str]] = []
    attacks = {"a": lambda m, b: b.x, "b": FGSM(THREAT)}
    table = evaluate(model, TEST, attacks, THREAT, batch_size=64, progress=lambda *facts: told.append(facts))
    shares = [done / total for done, total, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert told[0][2].startswith("a: robust accuracy at most ")
    assert told[-1][2] == f"b: robust accuracy at most {accuracy(table)['b']:.1%}"


# --- attacks that break the rules


def moved(by: float) -> Callable[[nn.Module, Batch], Tensor]:
    return lambda model, batch: batch.x + by


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (moved(0.11), r"attack 'mine' left the (threat model: distance|valid images)"),
        (lambda m, b: (b.x + 0.2).clamp(0, 1), "attack 'mine' left the threat model: distance 0.2 > eps 0.1"),
        (moved(-0.01), "attack 'mine' left the valid images: pixel -0.01"),
        (lambda m, b: b.x * float("nan"), "attack 'mine' left the valid images: pixel nan"),
        (lambda m, b: b.x[:, :, :4], "attack 'mine' changed the shape"),
        (lambda m, b: b.x[:1], "attack 'mine' changed the shape"),
        (lambda m, b: b.x.flatten(1), "attack 'mine' changed the shape"),
        (lambda m, b: None, "attack 'mine': expected a tensor of images, came NoneType"),
        (lambda m, b: (b.x, 0.1), "attack 'mine': expected a tensor of images, came tuple"),
        (lambda m, b: b.x.double().numpy(), "attack 'mine': expected a tensor of images, came ndarray"),
        (lambda m, b: (b.x * 255).byte(), "attack 'mine': expected images of torch.float32, came torch.uint8"),
        (PGD(ThreatModel("linf", 0.5)), "attack 'mine': expected eps of at most the threat model's 0.1, came 0.5"),
        (Quick(ThreatModel("linf", 0.2)), "attack 'mine': expected eps of at most the threat model's 0.1, came 0.2"),
    ],
)
def test_an_attack_that_breaks_the_rules_is_named(model: nn.Module, attack: Any, words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        evaluate(model, TEST, {"fine": PGD(THREAT, steps=1), "mine": attack}, THREAT)


def test_an_attack_that_writes_into_its_images_is_judged_against_the_true_ones(model: nn.Module) -> None:
    """It would otherwise be measured against its own proposal, at distance 0, and spoil the next attack's images."""

    def writes(m: nn.Module, batch: Batch) -> Tensor:
        return batch.x.add_(0.5).clamp_(0, 1)

    with pytest.raises(UnmovedError, match="attack 'writes' left the threat model"):
        evaluate(model, TEST, {"writes": writes}, THREAT)
    ball = ThreatModel("linf", 0.5)
    table = evaluate(model, TEST, {"a writes": writes, "b nothing": lambda m, b: b.x}, ball)
    scores = accuracy(table)
    assert scores["b nothing"] == scores["clean"]
    assert table[table["attack"] == "a writes"]["distance"].max() == pytest.approx(0.5)


def test_a_proposal_may_still_carry_a_graph(model: nn.Module) -> None:
    def graph(m: nn.Module, batch: Batch) -> Tensor:
        return batch.x.clone().requires_grad_(True) * 1.0

    evaluate(model, TEST.take(20), {"a": graph}, THREAT)
    assert len(curve_and_gallery.gallery(model, TEST.take(20), graph, THREAT)["x"]) == 8


def test_rounding_at_the_border_is_no_crime(model: nn.Module) -> None:
    for eps in (8 / 255, 0.3, 1e-3):
        ball = ThreatModel("linf", eps)
        evaluate(model, TEST, {"a": lambda m, b, eps=eps: (b.x + eps).clamp(0, 1)}, ball)


# --- models and data that cannot be judged


class Answers(nn.Module):
    """A model that answers something odd."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer, self.inner = answer, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.inner(x.flatten(1)))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda z: (z, z), r"expected logits of shape \(B, K\), came a tuple; wrap the model"),
        (lambda z: {"logits": z}, "came a dict; wrap the model"),
        (lambda z: z[:, 0], "expected logits of shape"),
        (lambda z: z[:, :1], "K >= 2"),
        (lambda z: z[:1], "expected logits of shape"),
        (lambda z: z * float("nan"), "expected finite logits, came NaN or infinity"),
        (lambda z: z / 0, "expected finite logits, came NaN or infinity"),
        (lambda z: z[:, :5], r"labels: expected 0..4 for 5 logits, came 9"),
    ],
)
def test_models_that_cannot_be_judged(answer: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        evaluate(Answers(answer), TEST, {"a": lambda m, b: b.x}, THREAT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: replace(b, x=b.x * 255), r"images: expected pixels in \[0, 1\], came 0 to 255; .*divide by 255"),
        (lambda b: replace(b, x=(b.x - 0.5) / 0.5), "put the normalisation inside the model"),
        (lambda b: replace(b, x=b.x * float("nan")), "NaN or infinite: look for a division by zero"),
        (lambda b: replace(b, y=b.y - 1), "labels: expected 0..K-1, came -1"),
        (lambda b: replace(b, y=b.y + 1), "labels: expected 0..9 for 10 logits, came 10"),
    ],
)
def test_data_that_cannot_be_judged(model: nn.Module, change: Callable[[Batch], Batch], words: str) -> None:
    with pytest.raises(UnmovedError, match=words):
        evaluate(model, Batches((change(whole(TEST)),)), {"a": lambda m, b: b.x}, THREAT)


def test_settings_that_cannot_be(model: nn.Module) -> None:
    attack = PGD(THREAT, steps=1)
    with pytest.raises(UnmovedError, match="at least one attack"):
        evaluate(model, TEST, {}, THREAT)
    with pytest.raises(UnmovedError, match="at least one sample"):
        evaluate(model, Batches(()), {"a": attack}, THREAT)
    with pytest.raises(UnmovedError, match="batch_size: expected a whole number >= 1, came 0"):
        evaluate(model, TEST, {"a": attack}, THREAT, batch_size=0)
    with pytest.raises(UnmovedError, match="precision: unknown value 'half'"):
        evaluate(model, TEST, {"a": attack}, THREAT, precision="half")
    with pytest.raises(UnmovedError, match="expected an attack with a threat field"):
        curve_and_gallery.curve(model, TEST, lambda m, b: b.x, THREAT, [0.1])


def test_the_search_may_be_in_bf16_the_verdict_is_not(model: nn.Module) -> None:
    attacks = {"a": PGD(THREAT, steps=3, keep="best")}
    rough, exact = (evaluate(model, TEST, attacks, THREAT, precision=p) for p in ("bf16", "float32"))
    assert (rough["clean_prediction"] == exact["clean_prediction"]).all()
    assert accuracy(rough)["a"] == pytest.approx(accuracy(exact)["a"], abs=0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a caller's own autocast does not reach the verdict
        outside = evaluate(model, TEST, {"a": lambda m, b: b.x}, THREAT)
    assert (outside["clean_prediction"] == exact["clean_prediction"]).all()


# --- gallery and curve


def test_the_gallery_shows_what_the_model_got_right(model: nn.Module) -> None:
    attack = PGD(THREAT, steps=3)
    shown = curve_and_gallery.gallery(model, TEST, attack, THREAT, count=5, name="pgd")
    assert {len(part) for part in shown.values()} == {5}
    assert (shown["label"] == shown["clean_prediction"]).all()
    assert np.abs(shown["x_adv"] - shown["x"]).max() <= 0.1 + 1e-6
    with torch.no_grad():
        again = model.eval()(torch.from_numpy(shown["x_adv"])).argmax(dim=1)
    assert (again.numpy() == shown["adversarial_prediction"]).all()
    wrong = Batches((replace(whole(TEST), y=(model(whole(TEST).x).argmax(dim=1) + 1) % 10),))
    assert curve_and_gallery.gallery(model, wrong, attack, THREAT) == {}


def test_the_gallery_is_of_what_broke_the_model_from_each_class_in_turn(model: nn.Module) -> None:
    attack = PGD(THREAT, steps=3)
    table = evaluate(model, TEST, {"pgd": attack, "weak": PGD(THREAT, steps=1)}, THREAT)
    broken = curve_and_gallery.broken_by(table, "pgd")
    rows = table[table["attack"] == "pgd"].set_index("index")
    won = rows[rows["success"] & (rows["clean_prediction"] == rows["label"])]
    assert sorted(broken) == sorted(won.index)
    classes = won["label"].nunique()
    assert rows.loc[broken[:classes], "label"].nunique() == classes > 3
    shown = curve_and_gallery.gallery(model, TEST, attack, THREAT, count=5, name="pgd", table=table)
    assert len(shown["label"]) == 5
    assert (shown["label"] == shown["clean_prediction"]).all()
    assert (shown["label"] != shown["adversarial_prediction"]).all()


def test_radii_of_the_curve_stay_in_the_box_for_linf_alone() -> None:
    assert curve_and_gallery.radii(ThreatModel("linf", 0.8)) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert curve_and_gallery.radii(ThreatModel("l2", 2.0)) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    assert curve_and_gallery.radii(ThreatModel("linf", 0.0)) == [0.0]


class Counted(nn.Module):
    """Counts the passes that are made of a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.inner(x)


def test_the_judge_takes_as_many_draws_as_an_attack_declares(model: nn.Sequential) -> None:
    class Still:
        draws = 5

        def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
            return batch.x

    passes = []
    for attack in (Still(), type("One", (Still,), {"draws": 1})()):
        counted = Counted(model)
        evaluate(counted, TEST.take(20), {"still": attack}, THREAT)
        passes.append(counted.passes)
    assert passes[0] == passes[1] + 4
    with pytest.raises(UnmovedError, match=r"Still\.draws: expected a whole number >= 1"):
        evaluate(model, TEST.take(20), {"still": type("Still", (Still,), {"draws": 0})()}, THREAT)


def test_a_strangers_attack_that_declares_it_may_leave_the_ball_and_does_not_succeed_there(
    model: nn.Sequential,
) -> None:
    class Inverted:
        minimum_norm: object = True

        def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
            return 1 - batch.x

    table = evaluate(model, TEST.take(20), {"a": Inverted()}, THREAT)
    assert (table["adversarial_prediction"] != table["label"]).any()
    assert not table["success"][table["clean_prediction"] == table["label"]].any()
    for said, words in ((False, "left the threat model"), ("no", "Inverted.minimum_norm: expected true or false")):
        with pytest.raises(UnmovedError, match=words):
            evaluate(model, TEST.take(20), {"a": type("Inverted", (Inverted,), {"minimum_norm": said})()}, THREAT)
