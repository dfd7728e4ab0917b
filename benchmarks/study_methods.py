"""List the studies and methods of docs/studies/protocol.md, and make the recipe of each.

A method is what it changes in the tables of a study's recipe:

- ``objective``, whole; ``attack``, its changes, in all phases, or None for none; ``defense``;
- ``late``: (share of the epochs, changes of the attack from there on), for what begins after a warm-up;
- ``tuned``: (name, values), the first value the default; ``"$name"`` stands in the tables where the value goes;
- ``base``: the method that it is added to. Settings chosen for that one hold here too, unless ``settings_of`` names
  others, as a combination of several methods does.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from unmoved.core.errors import UnmovedError
from unmoved.runs import recipe as config

Tables = dict[str, Any]
CE: Tables = {"loss": {"use": "ce"}}
KL: Tables = {"loss": {"use": "kl"}}
CLEAN: Tables = {"ce": {"view": "clean"}}
ON_TRADES: Tables = {"trades": {"beta": "$beta"}}
ON_MART: Tables = {"mart": {"beta": "$mart"}}
GLOBAL: Tables = {"global_probability": {"weight": "$probscut"}}
APD: Tables = {"use": "apd", "eps": "$apd", "relative": True}
AWP: Tables = {"use": "awp", "gamma": "$awp"}
SAM: Tables = {"use": "sam", "rho": "$sam"}
WARM_UP, RAMP_DONE = 0.25, 0.6  # shares of the epochs


def _sensible(loss: Tables) -> Tables:
    """As in the recipes `sensible`: until the warm-up is over, the start alone is judged."""
    stop = {"use": "sensible", "c": "$c"}
    return {
        "attack": {**loss, "stop": {**stop, "adaptive": False}},
        "late": (WARM_UP, {"stop": {**stop, "adaptive": True}}),
    }


def _friendly(tau: int | str) -> Tables:
    return {"stop": {"use": "friendly", "tau": tau, "omega": 0.001}}


METHODS: dict[str, Tables] = {
    "standard": {"objective": CLEAN, "attack": None},
    "AT": {"objective": {"ce": {}}, "attack": CE},
    "TRADES": {"objective": ON_TRADES, "attack": KL, "tuned": ("beta", (3.0, 1.0, 6.0))},
    "MART": {"objective": ON_MART, "attack": CE, "tuned": ("mart", (5.0, 2.0, 8.0))},
    "AT-AWP": {
        "objective": {"ce": {}}, "attack": CE, "defense": AWP, "base": "AT",
        "tuned": ("awp", (0.005, 0.002, 0.01)),
    },
    "TRADES-AWP": {
        "objective": ON_TRADES, "attack": KL, "defense": AWP, "base": "TRADES",
        "tuned": ("awp", (0.005, 0.002, 0.01)),
    },
    "AT-SAM": {
        "objective": {"ce": {}}, "attack": CE, "defense": SAM, "base": "AT",
        "tuned": ("sam", (0.05, 0.02, 0.1)),
    },
    "AT-ASAM": {
        "objective": {"ce": {}}, "attack": CE, "defense": {"use": "asam", "rho": "$asam"}, "base": "AT",
        "tuned": ("asam", (0.5, 0.2, 1.0)),
    },
    "FAT": {
        "objective": {"ce": {}}, "attack": CE | _friendly(0), "late": (WARM_UP, _friendly("$tau")), "base": "AT",
        "tuned": ("tau", (1, 0, 2)),
    },
    "IAAT": {  # its radii do not ramp: a common one does, until the ramp is done
        "objective": {"ce": {}}, "attack": CE, "base": "AT",
        "late": (RAMP_DONE, {"use": "iaat", "gamma": "$iaat", "step_size": 0.04}),
        "tuned": ("iaat", (0.03, 0.01, 0.06)),
    },
    "DRSL": {
        "objective": CLEAN | {"drsl": {"weight": "$drsl"}}, "attack": None, "base": "standard",
        "tuned": ("drsl", (0.64, 0.16, 2.56)),
    },
    "DRSL on AT": {
        "objective": {"ce": {}, "drsl": {"view": "adv", "weight": "$drsl"}}, "attack": CE, "base": "AT",
        "tuned": ("drsl", (0.64, 0.16, 2.56)),
    },
    "DRSL on TRADES": {
        "objective": ON_TRADES | {"drsl": {"weight": "$drsl"}}, "attack": KL, "base": "TRADES",
        "tuned": ("drsl", (0.64, 0.16, 2.56)),
    },
    "PRSL": {
        "objective": CLEAN | {"prsl": {"weight": "$prsl"}}, "attack": None, "base": "standard",
        "tuned": ("prsl", (0.128, 0.032, 0.512)),
    },
    "logit squeezing": {
        "objective": CLEAN | {"logit_squeeze": {"weight": "$squeeze"}}, "attack": None, "base": "standard",
        "tuned": ("squeeze", (0.5, 0.125, 2.0)),
    },
    "GCE": {  # in the place of cross-entropy
        "objective": {"guided_complement_entropy": {"view": "clean", "alpha": "$alpha"}}, "attack": None,
        "base": "standard", "tuned": ("alpha", (1 / 3, 0.2, 0.5)),
    },
    "SENSE": {"objective": {"ce": {}}, **_sensible(CE), "base": "AT", "tuned": ("c", (0.5, 0.3, 0.7))},
    "sensible TRADES": {"objective": ON_TRADES, **_sensible(KL), "base": "TRADES", "tuned": ("c", (0.5, 0.3, 0.7))},
    "ProbsCut on AT": {
        "objective": {"ce": {}, "kl": {"weight": 3.0}} | GLOBAL, "attack": CE, "base": "AT",
        "tuned": ("probscut", (1.0, 0.3, 3.0)),
    },
    "ProbsCut on TRADES": {
        "objective": ON_TRADES | GLOBAL, "attack": KL, "base": "TRADES", "tuned": ("probscut", (1.0, 0.3, 3.0)),
    },
    "ProbsCut on MART": {
        "objective": ON_MART | GLOBAL, "attack": CE, "base": "MART", "tuned": ("probscut", (1.0, 0.3, 3.0)),
    },
    "ProbsCut literal": {
        "objective": ON_TRADES | {"global_probability": {"weight": "$probscut", "divergence": "qp"}}, "attack": KL,
        "base": "TRADES", "tuned": ("probscut", (1.0, 0.3, 3.0)),
    },
    "APD": {
        "objective": CLEAN, "attack": None, "defense": APD, "base": "standard", "tuned": ("apd", (0.01, 0.005, 0.02)),
    },
    "APD on AT": {
        "objective": {"ce": {}}, "attack": CE, "defense": APD, "base": "AT", "tuned": ("apd", (0.01, 0.005, 0.02)),
    },
    "APD on TRADES": {
        "objective": ON_TRADES, "attack": KL, "defense": APD, "base": "TRADES",
        "tuned": ("apd", (0.01, 0.005, 0.02)),
    },
    "ProbsCut on MART-SAM": {
        "objective": ON_MART | GLOBAL, "attack": CE, "defense": SAM, "base": "MART",
        "settings_of": ["ProbsCut on MART", "AT-SAM"],
    },
}  # fmt: skip
COMBINATION = "combination"  # in a list of methods, the one that a study has chosen
SOME = ["AT", "TRADES", "TRADES-AWP", "SENSE", "ProbsCut on TRADES", "DRSL on TRADES", "APD on TRADES", COMBINATION]
JUDGED = config.read(Path("mnist/fast")).tables()  # by what epochs and settings are chosen there
# recipe; title; changes of its tables; n test images; whether AutoAttack is asked about a sample; seeds; of PGD-40 what
# is not its default (steps of 2.5 eps / 40); where settings and the combination are chosen, if not here; methods, if
# not all; the combination, once it is chosen.
STUDIES: dict[str, Tables] = {
    "mnist": {
        "recipe": "mnist/fast", "title": "MNIST, linf 0.3", "n": 10_000, "sampled": True, "seeds": [0, 1, 2],
        "pgd40": {"step_size": 0.01},
    },
    "mnist-l2": {
        "recipe": "mnist/at_l2", "title": "MNIST, l2 2.0", "n": 10_000, "sampled": True, "seeds": [0],
        "changes": {"threat": {"eps": 2.0}, "attack": {"eps": {"from": 0.0, "to": 2.0, "over": 0.5}}},
        "settings_of": "mnist", "methods": SOME,
    },
    "cifar10": {
        "recipe": "cifar10/small", "title": "CIFAR-10 (JPEG copy), linf 8/255", "n": 1000, "sampled": False,
        "seeds": [0], "changes": {"data": {"use": "folder", "path": ""}}, "settings_of": "mnist",
        "methods": [*SOME[:3], "MART", *SOME[3:]],
    },
    "cifar10-gpu": {
        "recipe": "cifar10/fast", "title": "CIFAR-10 (JPEG copy), PreActResNet-18 on a GPU, linf 8/255", "n": 10_000,
        "sampled": True, "seeds": [0], "settings_of": "mnist", "methods": [*SOME[:3], "MART", *SOME[3:]],
        "changes": {"data": {"use": "folder", "path": ""}, "attack": {"eps": 8 / 255}},
    },
    "digits": {
        "recipe": "digits/trades", "title": "Digits of 8x8 pixels, linf 0.2", "n": 449, "sampled": False,
        "seeds": [0, 1, 2, 3, 4], "changes": {
            "training": {"validation": 300}, "validation": JUDGED["validation"], "evaluation": JUDGED["evaluation"],
        },
        COMBINATION: "ProbsCut on MART-SAM",
    },
}  # fmt: skip


def methods_of(study: str) -> list[str]:
    """Return the methods of a study in the order of the protocol, also a combination that is not chosen yet."""
    about, chosen = STUDIES[study], {entry[COMBINATION] for entry in STUDIES.values() if COMBINATION in entry}
    listed = about.get("methods", [*(method for method in METHODS if method not in chosen), COMBINATION])
    own = STUDIES[about.get("settings_of", study)].get(COMBINATION, COMBINATION)
    return [own if method == COMBINATION else method for method in listed]


def needs_folder(study: str) -> bool:
    """Return whether the images of a study are in a folder of the user's."""
    data = _merged(config.read(Path(STUDIES[study]["recipe"])).tables(), STUDIES[study].get("changes", {}))["data"]
    return "path" in data


def recipe_of(
    study: str, method: str, settings: dict[str, float], seed: int, *, data: Path | None, is_trial: bool = False
) -> config.Recipe:
    """Make the recipe of a method in a study, for a run or for a trial of its setting.

    Args:
        settings: of its tables, by name.
        data: the folder of the images, where the data has one.
        is_trial: half the epochs, of which each phase keeps its share; judged by the recipe's attacks on all validation
            images. A run is judged by PGD-40 on the study's test images.

    Raises:
        UnmovedError: as `unmoved.runs.recipe.parse`; a setting without a value.
    """
    about, entry = STUDIES[study], METHODS[method]
    changes = _filled({key: entry.get(key) for key in ("objective", "attack", "defense", "late")}, settings, method)
    tables = _merged(config.read(Path(about["recipe"])).tables(), about.get("changes", {}))
    tables |= {"name": f"{study}/{method}", "objective": changes["objective"]}
    tables.pop("description", None)
    if "base" in entry:
        tables["base"] = f"{study}/{entry['base']}"
    if "path" in tables["data"]:
        tables["data"]["path"] = str(data)
    if is_trial:
        _halve(tables)
    tables["training"]["seed"] = seed
    if changes["defense"] is not None:
        tables["defense"] = changes["defense"]
    if changes["attack"] is None:
        del tables["attack"]
        tables["phases"] = []
    else:
        tables["attack"] = _merged(tables["attack"], changes["attack"])
    if changes["late"] is not None:
        _add_late(tables, *changes["late"])
    if not is_trial:
        pgd = {"use": "pgd", "steps": 40, "keep": "best"} | about.get("pgd40", {})
        tables["evaluation"] = {"n": about["n"], "attacks": {"pgd40": pgd}}
    else:
        tables["evaluation"].pop("n", None)
    return config.parse(tables, f"{study}, {method}")


def _filled(value: Any, settings: dict[str, float], method: str) -> Any:
    """Return a copy with the value of each setting in its place."""
    if isinstance(value, dict):
        return {key: _filled(part, settings, method) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_filled(part, settings, method) for part in value)
    if not (isinstance(value, str) and value.startswith("$")):
        return value
    if value[1:] not in settings:
        raise UnmovedError(f"{method}: expected a value of {value[1:]!r}, came settings {settings}")
    return settings[value[1:]]


def _merged(base: Tables, changes: Tables) -> Tables:
    """Merge tables key by key; one whose ``use`` changes is replaced as a whole, and so is a ramp."""
    if changes.get("use", base.get("use")) != base.get("use") or "from" in base:
        return copy.deepcopy(changes)
    both = {key: base[key] for key in base.keys() & changes.keys()}
    merged = {
        key: _merged(old, changes[key]) if isinstance(old, dict) and isinstance(changes[key], dict) else changes[key]
        for key, old in both.items()
    }
    return copy.deepcopy(base | changes | merged)


def _halve(tables: Tables) -> None:
    """Let each phase begin at the same share of half the epochs; a ramp is a share of its phase already."""
    before = tables["training"]["epochs"]
    tables["training"]["epochs"] = epochs = max(1, before // 2)
    start = 0
    for phase in tables["phases"]:
        start = max(start + 1, round(phase["from_epoch"] * epochs / before))
        phase["from_epoch"] = start


def _add_late(tables: Tables, share: float, changes: Tables) -> None:
    """Change the attack from a share of the epochs on, and leave eps as it is at every moment.

    An attack that takes the place of the other one cannot ramp: it has the eps with which the ramp ends.
    """
    epochs, phases = tables["training"]["epochs"], tables["phases"]
    at = min(max(1, round(share * epochs)), epochs - 1)
    starts = [0, *(phase["from_epoch"] for phase in phases), epochs]
    k = max(number for number, start in enumerate(starts[:-1]) if start <= at)
    before: Tables = tables if k == 0 else phases[k - 1]
    attack, ramp = before["attack"], before["attack"].get("eps", tables["threat"]["eps"])
    ramp = ramp if isinstance(ramp, dict) else {"from": ramp, "to": ramp, "over": 1.0}
    done, over = (at - starts[k]) / (starts[k + 1] - starts[k]), ramp["over"]
    middle = ramp["from"] + (ramp["to"] - ramp["from"]) * min(done / over, 1)
    rest: Any = ramp["to"]
    if "use" not in changes and done < over:
        rest = {"from": middle, "to": ramp["to"], "over": (over - done) / (1 - done)}
    new = {"eps": rest, "steps": attack.get("steps", tables["attack"]["steps"])} | changes
    if done == 0:
        before["attack"] = new
        return
    attack["eps"] = {"from": ramp["from"], "to": middle, "over": min(over / done, 1.0)}
    phases.insert(k, {"from_epoch": at, "attack": new})
