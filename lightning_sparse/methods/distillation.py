"""Distillation: a sparse model learns from a dense one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple, final

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_sparse.core import (
    Call,
    FeatureLayer,
    FeatureTap,
    Position,
    Remembered,
    RunLength,
    align_names,
    check_number,
    copy_model,
    is_cut,
    read_tensors,
    trained_part,
)
from lightning_sparse.functional import distillation_loss
from lightning_sparse.loop import Shards, Sparsifier
from lightning_sparse.loop.dry_run import dry_run, is_repeatable, take_step, training_batches

__all__ = ["Distillation"]

START = "start"


@final
class Distillation(Sparsifier):
    r"""Pull the outputs of a model toward those of a teacher during training; list it beside a method that prunes.

    At station `feature_penalty`, adds

    $$ \alpha \, T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big)
       + \beta \sum_l \mathrm{mean}\big((h_s^l - h_t^l)^2\big) $$

    to the loss, where z are the outputs of the network for the batch and h those of the selected layers. The teacher runs in
    evaluation mode without gradients on the same inputs as the network; this costs one extra forward pass per batch and the
    memory of the teacher. The teacher is not part of the module, so it is neither trained nor saved with it. (Its weights
    are in the callback's state if they are the weights from the start of this run, which are stored nowhere else.) Positions
    that the loss ignores, such as padding, count here.

    Sources: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531;
    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", https://arxiv.org/abs/1412.6550, eq. 3 without a regressor, for
    features.

    Args:
        teacher: `start` for the weights that the network has when the run begins, before anything is pruned; a file with
            other weights for the same network (a checkpoint, a state dict, safetensors); or a module that takes the same
            inputs.
        strength: $\alpha$, at least 0.
        temperature: T, positive.
        class_dim: the class dimension of the outputs; 1 for segmentation maps.
        features: names of layers of the network whose outputs are compared too; or a mapping of student layer -> teacher
            layer.
        feature_strength: $\beta$, at least 0.
        network: name of the submodule that is compared; None is the innermost one that holds all trainable parameters.
        targets: weights used to check that a checkpoint fits; they are not modified. Exclude frozen ones.
        name: distinguishes several callbacks of the same class.

    Raises:
        ValueError: at the start of fit if a file does not fit, a layer does not exist, or output shapes differ (one batch is
            tried on a copy that logs nothing); in the first batch if the data can be read only once.

    Example:
        >>> Distillation("start", strength=0.5, features=["layer4"]).label
        'Distillation'
    """

    removes_weights = False
    shards: ClassVar[Shards] = "data"
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("sparsity", "allocation", "structure", "layer_sparsity"),
        "it removes nothing by itself; list it beside a method that does",
    )

    dense = Remembered[dict[str, Tensor]](dict)
    """The teacher's parameters and buffers, if they are those of the start of this run."""

    def __init__(
        self,
        teacher: nn.Module | str = START,
        *,
        strength: float = 1.0,
        temperature: float = 2.0,
        class_dim: int = -1,
        features: Sequence[str] | Mapping[str, str] | None = None,
        feature_strength: float = 1.0,
        network: str | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.teacher, self.strength, self.temperature = teacher, strength, temperature
        self.class_dim, self.features, self.feature_strength, self.network = class_dim, features, feature_strength, network
        check_number("strength", strength)
        check_number("feature_strength", feature_strength)
        if not (isinstance(temperature, int | float) and 0 < temperature < float("inf")):
            raise ValueError(f"temperature={temperature!r} must be a positive number, such as 2.0.")
        if not isinstance(teacher, str | nn.Module):
            raise ValueError(f"teacher={teacher!r} must be 'start', a file with weights, or a module.")
        if strength == 0 and (not features or feature_strength == 0):
            raise ValueError("strength=0 without features leaves nothing to learn from the teacher; set one of them.")
        self._teacher: nn.Module | None = None
        self._path = ""
        self._student: _Watched | None = None
        self._tap: FeatureTap | None = None
        self._terms: dict[str, Tensor] = {}

    # ---- the teacher -------------------------------------------------------------------------------------------------

    def check(self, run: RunLength, until: float = 1.0) -> None:
        self._path = trained_part(self.run.module, self.network, self.label)
        network = self.run.module.get_submodule(self._path)
        if isinstance(self.teacher, nn.Module):
            self._teacher = self.teacher
        elif is_cut(network):
            raise ValueError(
                f"{self.label}: teacher='{self.teacher}' needs a copy of the network, but its weights are sharded; "
                "pass a module instead."
            )
        else:
            self._teacher = copy_model(network)  # now, because other methods prune when they begin
            if self.teacher != START:
                self._load(self._teacher, read_tensors(self.teacher, "teacher"))
        for layers, whole, whose in ((self._pairs, network, "network"), (self._pairs.values(), self._teacher, "teacher")):
            _refuse_missing(layers, whole, whose)
        if self.brought is None and not self.goes_on and is_repeatable(self.run.trainer, self.run.module):
            self._rehearse(self._teacher)

    def _rehearse(self, teacher: nn.Module) -> None:
        """Compare the first batch once, on a copy that logs nothing, so that a misfit is refused before anything changes."""
        student, tap = self._tried(), FeatureTap(self._layers(teacher), grad=False)
        modes = {part: part.training for part in teacher.modules()}
        try:
            if student is not None:
                with self.run.trainer.precision_plugin.train_step_context(), isolate_rng():
                    self._compare(self._seen(student), teacher.to(self.run.module.device).eval(), tap)
        finally:
            tap.remove()
            for part, mode in modes.items():
                part.training = mode

    def _tried(self) -> _Watched | None:
        """A copy of the network that was called as in the first batch; None if a copy cannot be trained."""
        trainer, module, student = self.run.trainer, self.run.module, None
        with suppress(Exception), dry_run(trainer, module) as twin, torch.enable_grad():
            batch = next(training_batches(trainer))
            watched = self._watched(twin)
            try:
                watched.start()
                with trainer.precision_plugin.train_step_context():
                    take_step(twin, batch, 0)
                student = watched
            finally:
                watched.remove()
        return student

    @property
    def _pairs(self) -> Mapping[str, str]:
        """The teacher layer for each student layer."""
        features = self.features or ()
        return dict(features) if isinstance(features, Mapping) else {layer: layer for layer in features}

    def _load(self, teacher: nn.Module, saved: Mapping[str, Any]) -> None:
        wanted = teacher.state_dict()
        places = align_names([*wanted], saved)
        missing = [name for name in wanted if name not in places]
        wrong = [name for name, place in places.items() if getattr(saved[place], "shape", None) != wanted[name].shape]
        if missing or wrong:
            what = f"has nothing for '{missing[0]}'" if missing else f"holds another shape of '{wrong[0]}'"
            raise ValueError(
                f"teacher='{self.teacher}' {what}, which the student network has; give weights of the same network, or pass "
                "a different network as a module."
            )
        teacher.load_state_dict({name: saved[place] for name, place in places.items()})

    def begin(self) -> None:
        if self.teacher == START:
            self.dense = self._tensors()
        self._attach()

    def resume(self) -> None:
        if self.teacher == START and self._teacher is not None:
            for name, value in self._tensors().items():
                value.copy_(self.dense[name])
            self.dense = self._tensors()  # the same memory
        self._attach()

    def _tensors(self) -> dict[str, Tensor]:
        """The teacher's own parameters and buffers."""
        assert self._teacher is not None
        return {name: value for name, value in self._teacher.state_dict().items() if isinstance(value, Tensor)}

    def _attach(self) -> None:
        assert self._teacher is not None
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # graphs compiled earlier do not know about the hooks
        self._teacher.to(self.run.module.device).requires_grad_(False).eval()
        self._student = self._watched(self.run.module)
        self._tap = FeatureTap(self._layers(self._teacher), grad=False)

    def _watched(self, module: nn.Module) -> _Watched:
        return _Watched(module.get_submodule(self._path), [*self._pairs])

    def _layers(self, teacher: nn.Module) -> list[FeatureLayer]:
        return [FeatureLayer(name, teacher.get_submodule(name)) for name in self._pairs.values()]

    # ---- the terms ---------------------------------------------------------------------------------------------------

    def before_batch(self, position: Position) -> None:
        if self._student is not None:
            self._student.start()

    def feature_penalty(self) -> Tensor | None:
        assert self._student is not None
        assert self._teacher is not None
        assert self._tap is not None
        if self._terms and not self._student.called:
            return None  # a batch that did not use the network
        terms = self._compare(self._seen(self._student), self._teacher, self._tap)
        self._terms = {name: term.detach() for name, term in terms.items()}
        return torch.stack([*terms.values()]).sum()

    def _seen(self, student: _Watched) -> _Seen:
        """The outputs of the network.

        Raises:
            ValueError: if it was not called.
        """
        seen = student.take()
        if seen is None:
            raise ValueError(
                f"{self.label} saw no call of the network '{self._path or type(self.run.module).__name__}' in the first "
                "batch's training_step; name the submodule that is called with network=..."
            )
        return seen

    def _compare(self, seen: _Seen, teacher: nn.Module, tap: FeatureTap) -> dict[str, Tensor]:
        """The loss terms, by name."""
        with torch.no_grad():
            tap.open = True
            answer = teacher(*seen.call.args, **seen.call.kwargs)
            theirs = tap.take()
        terms = {}
        if self.strength:
            terms["outputs"] = self.strength * self._compare_outputs(_logits(seen.output), _logits(answer))
        if seen.features:
            losses = [self._compare_features(*pair) for pair in zip(seen.features, theirs, strict=True)]
            terms["features"] = self.feature_strength * torch.stack(losses).sum()
        return terms

    def _compare_outputs(self, student: Tensor | None, teacher: Tensor | None) -> Tensor:
        shapes = [None if part is None else tuple(part.shape) for part in (student, teacher)]
        if student is None or teacher is None or student.shape != teacher.shape:
            raise ValueError(
                f"{self.label}: the network outputs {shapes[0]} and the teacher {shapes[1]}, but logits must have equal "
                "shapes; use a teacher with the same classes, or strength=0 with features."
            )
        if student.shape[self.class_dim] < 2:
            raise ValueError(
                f"{self.label}: outputs of shape {shapes[0]} have a single class in class_dim={self.class_dim}, so there is "
                "nothing to distill; use strength=0 with features."
            )
        return distillation_loss(student, teacher, self.temperature, self.class_dim)

    def _compare_features(self, mine: tuple[FeatureLayer, Tensor], theirs: tuple[FeatureLayer, Tensor]) -> Tensor:
        (layer, student), (_, teacher) = mine, theirs
        if student.shape != teacher.shape:
            raise ValueError(
                f"{self.label}: layer '{layer.name}' outputs {tuple(student.shape)} and the teacher's '{theirs[0].name}' "
                f"{tuple(teacher.shape)}; compare layers of equal shape."
            )
        return (student.float() - teacher.float()).square().mean()

    def batch_end(self, output: Any, batch: Any) -> None:
        if self._student is not None:
            self._student.take()  # the term may not have been used

    def numbers(self) -> Mapping[str, float | Tensor]:
        """The terms of the last batch, as added to the loss."""
        return self._terms

    def release(self) -> None:
        for watched in (self._student, self._tap):
            if watched is not None:
                watched.remove()
        self._student = self._tap = self._teacher = None
        self._terms = {}


class _Seen(NamedTuple):
    call: Call
    output: Any
    features: list[tuple[FeatureLayer, Tensor]]


class _Watched:
    """The inputs and outputs of a network in training, and the features of some of its layers."""

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self._network: nn.Module | None = network
        self._last: tuple[Call, Any] | None = None
        self._features: list[tuple[FeatureLayer, Tensor]] = []
        self._handle = network.register_forward_hook(self._hook(), with_kwargs=True)
        self._tap = FeatureTap([FeatureLayer(name, network.get_submodule(name)) for name in layers])

    @property
    def called(self) -> bool:
        """Whether the network has been called since `start`."""
        return self._last is not None

    def start(self) -> None:
        """Start a batch."""
        self._last, self._tap.open = None, True

    def take(self) -> _Seen | None:
        """Return the last call since `start` and release it; None if there was none."""
        last, self._last = self._last, None
        features, self._features = self._features or self._tap.take(), []
        return None if last is None else _Seen(*last, features)

    def remove(self) -> None:
        """Remove the hooks from the network; the last call can still be taken."""
        self._handle.remove()
        self._features = self._tap.take()
        self._tap.remove()
        self._network = None

    def _hook(self) -> Callable[..., None]:
        # A function, not a method, so that a copy of the model shares it and does not copy the teacher.
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if module is self._network and module.training and torch.is_grad_enabled():
                self._last = Call(args, kwargs), output

        return see


def _logits(output: Any) -> Tensor | None:
    """The predictions in a network's output: its `logits`, or the first floating-point tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]  # type: ignore[no-any-return]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits  # type: ignore[no-any-return]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 1), None)


def _refuse_missing(layers: Any, module: nn.Module, whose: str) -> None:
    names = [name for name, _ in module.named_modules() if name]
    for layer in layers:
        if layer not in names:
            near = difflib.get_close_matches(str(layer), names, n=1, cutoff=0.3) or names[:1]
            hint = f"did you mean '{near[0]}'?" if near else "it has no layers."
            raise ValueError(f"features: '{layer}' is not a layer of the {whose} ({type(module).__name__}); {hint}")
