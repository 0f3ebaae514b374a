"""Wrong settings, drawn from tables: whatever is drawn must be refused in one sentence."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator
from typing import Any

import yaml

from lightning_sparse.cli.configs import config_folder, config_names
from lightning_sparse.cli.methods import METHODS
from lightning_sparse.loop import Sparsifier

# ---- the command line ------------------------------------------------------------------------------------------------

RUN = ["--config=data/digits", "--config=models/mlp", "--seed_everything=0", "--trainer.accelerator=cpu"]
RUN += ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
RUN += ["--trainer.enable_checkpointing=false", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
RUN += ["--trainer.limit_val_batches=1"]

NO_NUMBER = ("abc", "[1]", "{a: 1}", ".nan")
NOT_WHOLE = (*NO_NUMBER, "1.5", "''")
SETTINGS: dict[str, tuple[str, ...]] = {
    "data": ("Digitz", "torch.nn.Linear", "3"),
    "data.batch_size": ("0", "-4", *NOT_WHOLE),
    "data.seed": ("-1", *NOT_WHOLE),
    "data.val_fraction": ("0", "1", "-0.5", "2", "0.9999", *NO_NUMBER),
    "seed_everything": ("-5", "4294967296", *NOT_WHOLE),
    "ckpt_path": ("nowhere.ckpt", ".", "text.ckpt"),
    "model": ("Classifierr", "torch.nn.Linear", "3"),
    "model.label_smoothing": ("-1", "1", "3", *NO_NUMBER),
    "model.annealing": ("0", "-1", "2", *NO_NUMBER),
    "model.num_classes": ("3", "0", *NOT_WHOLE),
    "model.image_size": ("9", *NOT_WHOLE),
    "model.network.hidden": ("[0]", "[-3]", "abc", "[1.5]", "{a: 1}"),
    "model.optimizer.lr": ("-1", "abc", "[1]"),
    "model.optimizer.momentum": ("-1", "abc", "[1]"),
    "model.optimizer.weight_decay": ("-1", "abc"),
    "trainer.max_epochs": ("0", "-3", *NOT_WHOLE),
    "trainer.max_steps": ("0", "-3", *NOT_WHOLE),
    "trainer.devices": ("two", "0", "-7", "1.5", "{a: 1}"),
    "trainer.accelerator": ("cpuu", "[cpu]"),
    "trainer.precision": ("8", "abc", "[16]"),
    "trainer.strategy": ("ddpp", "[ddp]"),
    "trainer.limit_train_batches": ("0", "-1", "1.5", *NO_NUMBER),
    "trainer.limit_val_batches": ("-1", "1.5", *NO_NUMBER),
    "trainer.accumulate_grad_batches": ("0", "-1", *NOT_WHOLE),
    "trainer.gradient_clip_val": ("-1", *NO_NUMBER),
    "trainer.log_every_n_steps": ("-1", *NOT_WHOLE),
    "trainer.val_check_interval": ("5.5", "-1", "[1]"),
    "trainer.default_root_dir": ("/proc/x", "text.ckpt/x"),
    "trainer.callbacks": ("3", "rigl", "{a: 1}", "[RigLL]", "torch.nn.Linear"),
    "trainer.logger": ("NoLogger", "3"),
    "trainer.enable_progress_bar": ("perhaps", "3"),
    "beside_dense": ("perhaps", "3"),
    "config": ("quickstrt", "methods/riggl", ".", "broken.yaml", "list.yaml", "empty.yaml", "unknown.yaml"),
}
"""Options and what they must not be."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "sparsity": ("1", "1.0", "-0.1", "90", "true", *NO_NUMBER),
    "start": ("2", "-1", "30 apples", "[1]", ".nan"),
    "end": ("2", "-1", "30 apples", "[1]", ".nan", "900 epochs"),
    "every": ("0", "1", "2", "-1", "30 apples", "[1]", ".nan"),
    "structure": ("2:5:3", "4:2", "0:4", "abc", "[2]"),
    "allocation": ("erkk", "3", "[erk]"),
    "layer_sparsity": ("{'*': 2}", "{'*': abc}", "0.5", "{nothing: 0.5}"),
    "targets": ("[]", "nothing", "['re:(']", "['type:Nothing']", "['!*']"),
    "schedule": ("quartic", "math.sqrt", "tests.helpers.draws.seven", "no.such.thing", "3"),
    "drop_schedule": ("quartic", "math.sqrt", "tests.helpers.draws.seven", "3"),
    "seed": ("-1", *NOT_WHOLE),
    "batches": ("0", "-1", *NOT_WHOLE),
    "strength": ("-1", ".inf", *NO_NUMBER),
    "drop_fraction": ("0", "1", "-1", *NO_NUMBER),
    "momentum": ("1", "-0.1", *NO_NUMBER),
    "penalty": ("l7", "3", "[l1]"),
    "rounds": ("0", "-1", *NOT_WHOLE),
    "p": ("0", "-1", "abc", "[]"),
    "mode": ("none", "3"),
}
"""Arguments of methods and what they must not be; what a method does not take is left out."""
FLAGS = ("perhaps", "3", "[true]")
"""What is neither true nor false."""


def seven(progress: float, start: float, end: float) -> float:
    """No schedule: a sparsity of seven."""
    return 7.0


def files() -> dict[str, str]:
    """What settings name, by name."""
    unknown = "trainer:\n  maxepochs: 3\n"
    return {
        "broken.yaml": "trainer: [open",
        "list.yaml": "- a\n",
        "empty.yaml": "",
        "text.ckpt": "no",
        "unknown.yaml": unknown,
    }


def command_lines(count: int, dice: random.Random) -> Iterator[list[str]]:
    """Wrong arguments of `lightning-sparse`, one mistake in each."""
    settings = [[f"--{name}={value}"] for name, values in SETTINGS.items() for value in values]
    settings = [_with_optimizer(args) for args in settings]
    yield from ([*RUN, f"--config={dice.choice(overlays())}", *args] for args in dice.sample(settings, count // 2))
    yield from (_misspelled(dice) for _ in range(count // 6))
    of_methods = [[*RUN, *args] for name in overlays() for args in _of_method(name)]
    yield from dice.sample(of_methods, count - count // 2 - count // 6)


def _with_optimizer(args: list[str]) -> list[str]:
    return ["--model.optimizer=torch.optim.SGD", *args] if "optimizer" in args[0] else args


def overlays() -> list[str]:
    """Methods as they are configured."""
    return [name for name in config_names() if name.startswith("methods/")]


def _of_method(name: str) -> Iterator[list[str]]:
    entry = yaml.safe_load((config_folder() / f"{name}.yaml").read_text())["trainer"]["callbacks+"][-1]
    method = next(cls for cls in METHODS if cls.__name__ == entry["class_path"].rpartition(".")[2])
    for argument, parameter in inspect.signature(method).parameters.items():
        wrong = FLAGS if parameter.annotation == "bool" else ARGUMENTS.get(argument, ())
        for value in wrong if argument in inspect.signature(method.__init__).parameters else ():
            yield [f"--config={name}", f"--trainer.callbacks.{argument}={value}"]


def _misspelled(dice: random.Random) -> list[str]:
    """An option with a letter too few."""
    name = dice.choice([n for n in SETTINGS if n not in ("model", "data", "config", "trainer.callbacks", "trainer.logger")])
    start = name.rfind(".") + 1
    place = dice.randrange(start + 1, len(name))
    return [*RUN, *_with_optimizer([f"--{name[:place]}{name[place + 1 :]}=1"])]


# ---- Python ----------------------------------------------------------------------------------------------------------

OBJECTS: dict[str, tuple[Any, ...]] = {
    "sparsity": (1, 1.0, -0.1, 90, math.nan, "abc", [0.5], {"a": 1}),
    "start": (2.0, -1, "30 apples", math.nan, [1]),
    "end": (2.0, -1, "30 apples", math.nan, [1]),
    "every": (0, 2.0, -1, "30 apples", math.nan, [1]),
    "structure": ("2:5:3", "4:2", "abc", 3, None),
    "allocation": ("erkk", 3, None),
    "layer_sparsity": ({"*": 2}, {"*": "abc"}, {"nothing": 0.5}),
    "targets": ([], "nothing", ["re:("], ["type:Nothing"], ["!*"]),
    "schedule": ("quartic", 3, math.sqrt, seven),
    "drop_schedule": ("quartic", 3, math.sqrt, seven),
    "seed": (-1, 1.5, "abc", [1]),
    "batches": (0, -1, 1.5, "abc"),
    "strength": (-1, math.nan, math.inf, "abc", [1]),
    "drop_fraction": (0, 1, -1, math.nan, "abc"),
    "penalty": ("l7", 3, None),
    "rounds": (0, -1, 1.5, "abc"),
    "mode": ("none", 3),
}


def constructions(count: int, dice: random.Random) -> Iterator[tuple[type[Sparsifier], dict[str, Any]]]:
    """Methods, and arguments of which one is wrong."""
    every = []
    for method in METHODS:
        parameters = inspect.signature(method.__init__).parameters
        needed = {name: value for name, value in {"sparsity": 0.5, "p": 1.1}.items() if name in parameters}
        for name, parameter in parameters.items():
            wrong = ("yes", 3, None) if parameter.annotation == "bool" else OBJECTS.get(name, ())
            every += [(method, needed | {name: value}) for value in wrong]
    yield from dice.sample(every, min(count, len(every)))
