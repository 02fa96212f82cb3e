"""``Trainer(compile="step")``: the device work of a training step, recorded once and replayed.

A step runs as always until its batch was seen twice in this shape; then it is recorded, by the loop's own closure, as one piece of work
for the device: forward, backward, accumulation, clipping, optimizer and what it logs. From then on a step is a copy of the batch and one
launch. What a replay could not know of is looked for before (``graph_watch.py``), and asked at each step where it is cheap to ask: then
steps run as always again, and the user is told why.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lightning.fabric.precision import MixedPrecision
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.dispatch import no_op, override_of
from lightning.pytorch.loops.graph_optimizer import OptimizerInGraph
from lightning.pytorch.loops.graph_recording import Logged, LogRecorder, Recorder
from lightning.pytorch.loops.graph_watch import PLAIN, NoticedCollectives, NotReplayable, Watch, is_ours, place

if TYPE_CHECKING:
    from lightning.fabric.strategies.ddp_between import BetweenPasses
    from lightning.pytorch.loops.fit import FitLoop
    from lightning.pytorch.trainer.trainer import Trainer

WARM_UP = 2  # steps of each shape that run as always before it is recorded: kernels are chosen, and state is made, in the first
MOST_GRAPHS = 8  # recorded at once
MOST_SHAPES = 64  # that are counted
MOST_CHANGES = 3  # of what is constant in a recording, before it is given up
WITHIN = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")  # hooks that run inside of a step
AROUND = ("on_train_batch_start", "on_train_batch_end", "lr_scheduler_step", *WITHIN)  # those that run between two steps

SOME_GRADIENTS = "some parameters get gradients in some batches of an accumulation window only"
GRADIENT_GONE = "a hook in the middle of a step has set a gradient to None, which a replay can't follow"

Work = Callable[[], Any]


class Graph:
    """A recorded step.

    Args:
        batch: lies where the recording reads it.
        inputs: the tensors in it.
    """

    def __init__(self, batch: Any, inputs: list[Tensor]) -> None:
        self.batch, self.inputs = batch, inputs
        self.nodes: list[Work] = []  # replays, and between them hooks
        self.logged: list[Logged] = []
        self.outputs: Any = None
        self.loss: Any = None
        self.gradients: list[tuple[Tensor, Tensor]] = []  # parameters, with those that the recording writes
        self.without: list[Tensor] = []  # parameters that it gives no gradient
        self.outside: list[tuple[Tensor, Tensor]] = []  # of no optimizer, whose gradients the recording adds to

    def note_gradients(self, parameters: list[Tensor]) -> None:
        """Take note of the gradients that parameters have after the recording, or a piece of it."""
        self.gradients = [(each, each.grad) for each in parameters if each.grad is not None]
        self.without = [each for each in parameters if each.grad is None]

    def give_gradients(self) -> None:
        """Let the parameters have the gradients that the recording writes."""
        for parameter in self.without:
            parameter.grad = None
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def adopt_gradients(self) -> bool:
        """Let the recording go on with gradients that a hook has put in place of its own; returns whether one is gone."""
        gone = False
        for parameter, gradient in self.gradients:
            if parameter.grad is None:
                gone = True
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
                parameter.grad = gradient
        return gone


class StepGraphs:
    """Stands around the steps of a loop, and replays those that it has recorded.

    Args:
        trainer: whose.
        loop: the training loop.
        recorder: of the device.
    """

    def __init__(self, trainer: Trainer, loop: FitLoop, recorder: Recorder) -> None:
        self.trainer, self.loop, self.recorder = trainer, loop, recorder
        self.device = trainer.strategy.root_device
        self.optimizer: OptimizerInGraph | None = None
        self.logs = LogRecorder(trainer._metrics, self.device)
        self.off = self.told_of_many = False
        self.several = trainer.world_size > 1
        self.between: BetweenPasses | None = None  # how several processes talk
        self.instead: Callable[[Work], Work] = as_it_is
        self.scaler: GradScaler | None = None
        self.update_scale: Work = no_op
        self.forget_scale: Work = no_op
        self.changes = 0
        self.forget()

    def forget(self) -> None:
        """Let go of all recordings."""
        self.logs.forget()
        self.graphs: dict[Any, Graph] = {}
        self.seen: dict[Any, int] = {}
        self.current: Graph | None = None
        self.watching = False
        self.epoch, self.validated_at = -1, 0.0
        self.state: dict[str, Any] = {}
        self.places: list[Any] = []
        self.gone = False  # whether a hook has let go of a gradient
        self.without_gradient: set[int] | None = None  # the ids of trained parameters that get none
        self.differs = False  # whether those were others from step to step
        self.fixed: dict[Tensor, Tensor] = {}  # gradients that add up over several recordings, by their parameters
        self.watch = Watch(self.trainer.lightning_module, self.device, attributes=self.trainer._config.compile_options is None)

    # ---- around the loop --------------------------------------------------------------------------------------------

    def wrap(self, loop: FitLoop) -> None:
        """Take the place of the loop's closure and update; to be called anew when hooks have changed."""
        self.forget()
        self.plain_step, self.plain_update, self.plain_zero = loop.training_step, loop.update, loop.zero_grad
        self.plain_closure = partial(type(loop).closure, loop)
        loop.training_step, loop.zero_grad = self.step, self.zero
        vars(loop)["closure"] = partial(self.run, self.plain_closure)
        if not loop.user_steps:
            loop.update = self.update
        precision = self.trainer.strategy.precision
        if isinstance(precision, MixedPrecision) and precision.policy.scaler:
            self.scaler = precision.grad_scaler
            self.update_scale, self.forget_scale = precision.update_scale, precision.forget_step
        self.between = getattr(self.trainer.strategy, "between", None)
        if self.between is not None:
            self.plain_backward, loop.backward = loop.backward, self.backward
        self.hooks_act = loop.user_steps or self.calls_user(AROUND)
        self.user_listens = self.calls_user(("on_train_batch_end",))
        if self.optimizer is None or self.optimizer.optimizer is not loop.optimizer:
            scheduled = bool(self.trainer.strategy.lr_scheduler_configs)
            self.optimizer = OptimizerInGraph(loop.optimizer, self.device, scheduled)

    def calls_user(self, names: tuple[str, ...]) -> bool:
        """Whether code that is not our own runs in one of these hooks: of a class, or a function as a LambdaCallback has."""
        owners = [(self.trainer.lightning_module, LightningModule), *((each, Callback) for each in self.trainer.callbacks)]
        hooks = [(owner, override_of(owner, name, base)) for owner, base in owners for name in names]
        return any(hook is not None and not (is_ours(type(owner)) and is_ours(hook)) for owner, hook in hooks)

    def finish(self) -> None:
        """Leave everything as it was."""
        self.forget()
        vars(self.loop).pop("closure", None)
        if self.optimizer is not None:
            self.optimizer.restore()

    def give_up(self, reason: str) -> None:
        """From here on steps run as always."""
        self.forget()
        self.off = True
        if self.optimizer is not None and not self.several:  # other processes may go on with them
            self.optimizer.restore()
        rank_zero_warn(f"Trainer(compile='step'): training steps are not replayed but run as without it, since {reason}.")

    # ---- what the loop calls ----------------------------------------------------------------------------------------

    def step(self, batch: Any, batch_idx: int) -> Any:
        """``training_step``, watched where it is to be recorded next."""
        return self.watch.run(self.plain_step, batch, batch_idx) if self.watching else self.plain_step(batch, batch_idx)

    def zero(self, optimizer: Any) -> None:
        """Zeroing gradients: in place, where recordings add to them."""
        if not self.fixed:
            self.plain_zero(optimizer)
            return
        for parameter, gradient in self.fixed.items():
            parameter.grad = gradient if parameter.requires_grad else None
        torch._foreach_zero_(list(self.fixed.values()))

    def update(self, closure: Work) -> Any:
        """The update, with everything that the closure does."""
        return self.run(partial(self.plain_update, self.plain_closure))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward, after which the processes take the mean of their gradients: replayed steps and others, so that all do the same."""
        self.plain_backward(loss, *args, **kwargs)
        if self.loop.progress.updates:
            self.instead(self.between.average)()  # type: ignore[union-attr]

    def run(self, work: Work) -> Any:
        """Do ``work``, which is a step, or replay it."""
        loop = self.loop
        if self.between is None:
            return self.done(work)
        if not self.between.within_window:
            self.between.begin_window()
        assert self.optimizer is not None
        with nullcontext() if loop.user_steps else self.optimizer.rounded():
            return self.done(work)

    def done(self, work: Work) -> Any:
        """The result of ``work``, or of its replay."""
        loop = self.loop
        if self.off:
            return work()
        if loop.progress.epoch != self.epoch or loop.validated_at != self.validated_at:
            self.ask_hooks()
        elif self.hooks_act and self.current is not None and (self.watch.places() != self.places or self.watch.changed_within()):
            self.forget()
        leaves: list[Tensor] = []
        try:
            if self.several and loop.loader.lockstep is not None:  # type: ignore[union-attr]
                raise NotReplayable("the processes have different numbers of batches")
            key = self.kind(), signature(loop.batch, leaves)
        except NotReplayable as error:
            self.give_up(str(error))
            return work()
        graph = self.graphs.get(key)
        if graph is not None and self.is_valid():
            return self.replay(graph, leaves)
        self.leave()
        return work() if self.off else self.meet(key, work)

    def kind(self) -> tuple[Any, ...]:
        """What a step depends on beside its batch: where in an accumulation window it is."""
        loop = self.loop
        if loop.accumulate == 1:
            return ()
        p = loop.progress
        place = p.batch_idx % loop.accumulate
        return loop.accumulate, loop.window(), place == 0, p.updates, place + 1 if p.is_last else 0

    def ask_hooks(self) -> None:
        """At the beginning of an epoch and after a validation: see whether hooks have changed what is constant in the recordings."""
        loop, entries = self.loop, self.trainer._metrics.entries or {}
        self.epoch, self.validated_at = loop.progress.epoch, loop.validated_at
        state = self.watch.state_elsewhere()
        logged = all(
            entries.get((each.entry.scope, each.entry.name, each.entry.dataloader_idx)) is each.entry
            for graph in self.graphs.values()
            for each in graph.logged
        )
        if (self.graphs or self.fixed) and (not logged or any(state.get(name) != value for name, value in self.state.items())):
            self.forget()
            self.epoch, self.validated_at = loop.progress.epoch, loop.validated_at
        self.state = state

    def is_valid(self) -> bool:
        """Whether what is constant in the recordings still is so; else they are forgotten."""
        assert self.optimizer is not None
        name = (None if self.loop.user_steps else self.optimizer.follow()) or self.watch.changed()
        if self.gone:
            self.give_up(GRADIENT_GONE)
            return False
        if name is None:
            return True
        self.changes += 1
        if self.changes > MOST_CHANGES:
            self.give_up(f"{name!r} changes again and again, which a recording can't follow")
        else:
            self.forget()
        return False

    # ---- the first steps of a kind ----------------------------------------------------------------------------------

    def meet(self, key: Any, work: Work) -> Any:
        """A step that is not recorded yet."""
        seen = self.seen.get(key, 0)
        if seen < WARM_UP:
            if seen or len(self.seen) < MOST_SHAPES:
                self.seen[key] = seen + 1
            return self.observe(key, work, seen == WARM_UP - 1)
        if len(self.graphs) >= MOST_GRAPHS:
            if not self.told_of_many:
                self.told_of_many = True
                rank_zero_warn(
                    f"Trainer(compile='step'): {MOST_GRAPHS} kinds of training steps are replayed; batches of further shapes run as "
                    "without it. Batches that are padded to a few shapes can all be replayed."
                )
            return work()
        return self.record(key, work)

    def observe(self, key: Any, work: Work, last: bool) -> Any:
        """Run a step as always, and look whether it can be replayed.

        Args:
            key: its kind.
            work: the step.
            last: whether it is recorded the next time.
        """
        optimizer = self.optimizer
        assert optimizer is not None
        try:
            if any(getattr(part, "sparse", False) is True for part in self.trainer.lightning_module.modules()):
                raise NotReplayable("a module gives sparse gradients")
            if optimizer.has_other_groups:
                optimizer.restore()
            told = optimizer.prepare() if optimizer.given is None else ""
        except NotReplayable as error:
            self.give_up(str(error))
            return work()
        if told:
            rank_zero_info(f"Trainer(compile='step'): {told}, as recorded steps need it.")
        before = optimizer.host_state()
        self.watching = True
        try:
            with self.hooks_as(self.unwatched), self.logs.noting(self.watch, key), self.reached(), ExitStack() as contexts:
                if last:  # the first one may read from the device to choose kernels
                    contexts.enter_context(self.recorder.noticing(self.watch))
                if last and self.several:
                    contexts.enter_context(NoticedCollectives(self.watch))
                result = work()
        finally:
            self.watching = False
        if last:
            changed = [name for name, value in optimizer.host_state().items() if before.get(name, value) != value]
            if changed and self.loop.progress.updates and not self.loop.user_steps:
                self.watch.note(f"{type(optimizer.optimizer).__name__} changes `{changed[0]}` on the host, which a replay would not do")
            if (hooked := self.hooked()) is not None:
                self.watch.note(f"`{hooked}` has hooks of its forward or backward pass, which a replay would leave out")
        if self.differs:
            self.watch.note(SOME_GRADIENTS)
        if self.watch.reason is not None:
            self.give_up(self.watch.reason)
        return result

    @contextmanager
    def hooks_as(self, instead: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        """Inside of it, ``instead`` of each hook that somebody overrides, and of all else that runs in the middle of a step, is called."""
        hooks = self.loop.hooks
        heard = {name: getattr(hooks, name) for name in WITHIN if getattr(hooks, name) is not no_op}
        for name, hook in heard.items():
            setattr(hooks, name, instead(hook))
        self.instead = instead
        try:
            yield
        finally:
            self.instead = as_it_is
            for name, hook in heard.items():
                setattr(hooks, name, hook)

    def unscaled(self) -> list[Any]:
        """How far the scaler is with the gradients of the current step."""
        return [state["stage"] for state in stages(self.scaler).values()]

    def unwatched(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """``hook``, which is never recorded, and may do as it likes."""

        def run(*args: Any) -> Any:
            before, unscaled = [each.grad for each in self.parameters()], self.unscaled()
            self.watch.paused = True
            try:
                result = hook(*args)
            finally:
                self.watch.paused = False
            if unscaled != self.unscaled():
                self.watch.note("a hook in the middle of a step unscales gradients, which the rest of a replay would not know of")
            if any(old is not None and each.grad is None for old, each in zip(before, self.parameters())):
                self.watch.note(GRADIENT_GONE)
            return result

        return run

    def hooked(self) -> str | None:
        """A module with hooks that are not torch's own."""
        for name, part in self.trainer.lightning_module.named_modules():
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
                if any(not (getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.") for hook in hooks.values()):
                    return name or type(part).__name__
        return None

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Within accumulation windows: see whether the step gives gradients to the same parameters as all others.

        Gradients of a window are kept, filled with zeros, so that one which a whole window does not use would count as zero.
        """
        if self.loop.accumulate == 1:
            yield
            return
        found: set[int] = set()
        trained = [each for each in self.parameters() if each.requires_grad]
        hooks = [each.register_post_accumulate_grad_hook(lambda p: found.add(id(p))) for each in trained]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        lacking = {id(each) for each in trained} - found
        self.differs = self.differs or (self.without_gradient is not None and lacking != self.without_gradient)
        self.without_gradient = lacking

    def fix_gradients(self) -> None:
        """Let gradients stay where they are from one step to the next, for they add up over several recordings."""
        for parameter in self.parameters():
            if parameter not in self.fixed and parameter.requires_grad and id(parameter) not in (self.without_gradient or ()):
                self.fixed[parameter] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def outside(self) -> list[Tensor]:
        """Parameters that have a gradient and no optimizer, so that nobody zeroes it in a step."""
        known = set(self.parameters())
        return [each for each in self.trainer.lightning_module.parameters() if each.grad is not None and each not in known]

    def parameters(self) -> list[Tensor]:
        """Of the optimizer."""
        return [parameter for group in self.loop.optimizer.param_groups for parameter in group["params"]]

    # ---- recording --------------------------------------------------------------------------------------------------

    def record(self, key: Any, work: Work) -> Any:
        """Record a step, and replay what was recorded."""
        loop = self.loop
        batch = loop.batch
        inputs: list[Tensor] = []
        graph = Graph(apply_to_collection(batch, Tensor, Tensor.clone), inputs)
        signature(graph.batch, inputs)
        if loop.accumulate > 1:
            self.fix_gradients()
        places, outside = self.watch.places(), self.outside()
        self.update_scale()  # by the step before; that of this one is part of the recording, which finds its overflows nowhere else
        try:
            loop.batch = graph.batch
            if self.between is not None or any(getattr(loop.hooks, name) is not no_op for name in WITHIN):
                with self.recording(Graph(None, []), key, rehearses=True):
                    work()
                    self.update_scale()
                    self.recorder.end()
            with self.recording(graph, key), self.reached():
                graph.loss = work()
                self.update_scale()
                graph.nodes.append(self.recorder.end())
        except BaseException as error:
            self.recorder.abandon()
            self.forget_scale()
            loop.batch = batch
            if not isinstance(error, Exception):
                raise
            if graph.nodes:
                raise  # of a hook in the middle of the step
            found = str(error) if isinstance(error, NotReplayable) else f"it can't be recorded: {first_line(error)}"
            self.give_up(found if isinstance(error, NotReplayable) else found + place(traceback.extract_tb(error.__traceback__)))
            return work()
        graph.nodes[-1]()
        self.optimizer.recorded_state()  # type: ignore[union-attr]
        graph.outputs = loop.outputs
        graph.note_gradients(self.parameters())
        graph.outside = [(each, each.grad) for each in outside]  # type: ignore[misc]
        self.graphs[key] = self.current = graph
        self.state, self.places = self.watch.state_elsewhere(), self.watch.places()
        self.watch.remember()
        self.follow(graph)
        if places != self.places:
            self.give_up("a hook in the middle of a step changes weights or buffers, or how modules run, for the rest of it")
        elif loop.accumulate > 1 and (self.differs or any(parameter not in self.fixed for parameter, _ in graph.gradients)):
            self.give_up(SOME_GRADIENTS)
        return graph.loss

    @contextmanager
    def recording(self, graph: Graph, key: Any, rehearses: bool = False) -> Iterator[None]:
        """What the loop's closure does inside of this is recorded; hooks of the user run between two pieces.

        Args:
            graph: gets them.
            key: the kind of the step.
            rehearses: run no hooks, so that one can see whether a step can be recorded before anything has happened.
        """
        assert self.optimizer is not None

        def instead(hook: Callable[..., Any]) -> Callable[..., Any]:
            return no_op if rehearses else partial(self.interrupt, graph, hook)

        with self.optimizer.recording(), self.logs.recording(key) as logged, self.hooks_as(instead):
            graph.logged = logged
            self.recorder.begin()
            yield

    def interrupt(self, graph: Graph, hook: Callable[..., Any], *args: Any) -> None:
        """Run a hook in the middle of a step: on values, so what was recorded until here is replayed before."""
        graph.nodes.append(self.recorder.end())
        graph.nodes[-1]()
        graph.note_gradients(self.parameters())
        log, scaled = vars(self.trainer._metrics).pop("log"), stages(self.scaler)
        try:
            self.call(graph, hook, *args)
        finally:
            vars(self.trainer._metrics)["log"] = log
        graph.nodes.append(partial(self.call_again, scaled, graph, hook, *args))
        self.recorder.begin()

    def call_again(self, scaled: dict[Any, Any], graph: Graph, hook: Callable[..., Any], *args: Any) -> None:
        """Run a hook in a replay, where the scaler knows of the step so far what it knew in the recording."""
        if self.scaler is None:
            self.call(graph, hook, *args)
            return
        known = self.scaler._per_optimizer_states
        known.update({key: dict(state) for key, state in scaled.items()})
        try:
            self.call(graph, hook, *args)
        finally:
            known.clear()

    def call(self, graph: Graph, hook: Callable[..., Any], *args: Any) -> None:
        """Run a hook between two pieces of a recording."""
        graph.give_gradients()
        hook(*args)
        if graph.adopt_gradients() and not self.off:
            rank_zero_warn(f"Trainer(compile='step'): {GRADIENT_GONE}; in this step it counts as it was.")
            self.gone = True

    # ---- replaying --------------------------------------------------------------------------------------------------

    def replay(self, graph: Graph, leaves: list[Tensor]) -> Any:
        """A step that was recorded: copy the batch, launch."""
        switched = self.current is not graph
        if switched:
            self.leave()
            self.current = graph
        if leaves:
            torch._foreach_copy_(graph.inputs, leaves)
        self.update_scale()
        for parameter, gradient in graph.outside:
            if parameter.grad is None:
                gradient.zero_()
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        for node in graph.nodes:
            node()
        if graph.gradients and (switched or graph.gradients[0][0].grad is not graph.gradients[0][1]):
            graph.give_gradients()  # validation has freed them, or another recording has run
        self.follow(graph)
        return graph.loss

    def leave(self) -> None:
        """Something else than the current recording runs next, and may use its memory."""
        if self.current is not None:
            for each in self.current.logged:
                each.settle()
        self.current = None

    def follow(self, graph: Graph) -> None:
        """What the loop would have done on the host."""
        loop = self.loop
        serial = self.trainer._metrics.serial
        for each in graph.logged:
            each.note(serial)
        # Users may keep what they get; the next replay writes over the recording's own.
        loop.outputs = apply_to_collection(graph.outputs, Tensor, Tensor.clone) if self.user_listens else graph.outputs
        loop.gathered = loop.progress.batch_idx % loop.accumulate + 1


def stages(scaler: GradScaler | None) -> dict[Any, Any]:
    """What a scaler knows of the current step: whose gradients it has unscaled, and where it finds their overflows."""
    return {} if scaler is None else {key: dict(state) for key, state in scaler._per_optimizer_states.items()}


def as_it_is(function: Work) -> Work:
    """The function."""
    return function


def signature(value: Any, leaves: list[Tensor]) -> Any:
    """What must be the same of two batches for one recording; their tensors are added to ``leaves``.

    Raises:
        NotReplayable: for what can't be compared.
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return value.shape, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value), tuple([signature(each, leaves) for each in value])
    if isinstance(value, Mapping):
        return type(value), tuple([(key, signature(each, leaves)) for key, each in value.items()])
    if isinstance(value, PLAIN):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple([signature(getattr(value, field.name), leaves) for field in dataclasses.fields(value)])
    raise NotReplayable(f"the batch holds a {type(value).__name__}, of which it is not known what a replay would have to copy")


def first_line(error: BaseException) -> str:
    """The type of an error, and the first line of its text."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}"
