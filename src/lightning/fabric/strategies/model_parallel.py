"""Tensor parallelism and FSDP2 together: the processes form a grid, and the user's code divides the model over it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric import collectives
from lightning.fabric.strategies import replicas
from lightning.fabric.strategies.fsdp_module import Root, WholeParameters, _local_gradient, groups_of, root_of
from lightning.fabric.strategies.meta_device import materialize
from lightning.fabric.strategies.parallel import DEFAULT_TIMEOUT
from lightning.fabric.strategies.sharded import ShardedStrategy
from lightning.fabric.strategies.sharding import distribute_like, full_tensor, is_dtensor, local_tensor, make_scaler_agree
from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.device_mesh import DeviceMesh

DATA, TENSOR = "data_parallel", "tensor_parallel"


class ModelParallelStrategy(ShardedStrategy):
    """Divide a model over a grid of processes, in the way that the model itself says.

    The grid, ``device_mesh``, has the dimensions ``"data_parallel"`` and ``"tensor_parallel"``. Processes that differ in the second
    alone compute one model together and are given the same data. The model is divided in ``LightningModule.configure_model`` (with
    Fabric, in ``parallelize_fn``): layers over ``device_mesh["tensor_parallel"]`` with ``parallelize_module``, then blocks over
    ``device_mesh["data_parallel"]`` with ``fully_shard``.

    What is built on the ``meta`` device there gets memory, and its first weights from ``reset_parameters``, once it is divided.
    Gradients of parameters that nothing divides over ``data_parallel`` are averaged over it. In the first step the processes that
    compute one model together make sure that they have the same data and, for what each of them holds whole, the same gradients.

    Args:
        data_parallel_size: processes along the first dimension; ``"auto"``: as many as there are machines.
        tensor_parallel_size: processes along the second dimension; ``"auto"``: as many as a machine has.
        save_distributed_checkpoint: save checkpoints as directories, to which each process writes its own part; False: in one file.
        process_group_backend: which library carries collectives; None for what suits the devices.
        timeout: how long a collective may take before it fails.
        parallelize_fn: called with the module and the mesh, it returns the module divided; where there is no ``configure_model``.
        kwargs: as for :class:`~lightning.fabric.strategies.parallel.ParallelStrategy`.

    Raises:
        ValueError: for a size that is no positive number.

    Example::

        class Model(LightningModule):
            def configure_model(self):
                parallelize_module(self.mlp, self.device_mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
                fully_shard(self.mlp, mesh=self.device_mesh["data_parallel"])

        Trainer(strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2), devices=4).fit(Model())
    """

    strategy_name = "model_parallel"
    file_option = "save_distributed_checkpoint=False"

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        *,
        parallelize_fn: Callable[[Any, DeviceMesh], Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **kwargs)
        for name, size in (("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size)):
            if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                hint = " The function goes to parallelize_fn=..., by name." if callable(size) else ""
                raise ValueError(f"{name}={size!r}: give a whole number of processes, 1 or more, or 'auto'.{hint}")
        self._sizes = data_parallel_size, tensor_parallel_size
        self.saves_directories = save_distributed_checkpoint
        self._parallelize_fn = parallelize_fn
        self._device_mesh: DeviceMesh | None = None
        self._divided: list[Module] = []  # that are trained
        self._averaged: list[replicas.AveragedGradients] = []  # of each of these
        self._compared_gradients = False
        self._handles: list[Any] = []
        self._metrics: list[Any] = []  # of torchmetrics, which gather from those that have other data
        self._without_value: list[str] = []  # tensors that only a checkpoint can give values to

    # ---- where this process is --------------------------------------------------------------------------------------

    @property
    def device_mesh(self) -> DeviceMesh:
        """The grid of processes, with the dimensions ``"data_parallel"`` and ``"tensor_parallel"``.

        Raises:
            RuntimeError: before the processes have met.
        """
        if self._device_mesh is None:
            raise RuntimeError("There is no `device_mesh` before the processes have met: use it in `configure_model`, or later.")
        return self._device_mesh

    def sizes(self) -> tuple[int, int]:
        """The processes along ``"data_parallel"`` and ``"tensor_parallel"``.

        Raises:
            RuntimeError: if the run has more or fewer processes than their product.
        """
        data, tensor = self._sizes
        data = self.num_nodes if data == "auto" else data
        tensor = self.num_processes if tensor == "auto" else tensor
        if data * tensor != self.world_size:
            given = ", ".join(f"{name}_size={size!r}" for name, size in zip((DATA, TENSOR), self._sizes))
            raise RuntimeError(
                f"ModelParallelStrategy({given}) makes a grid of {data} x {tensor} processes, and the run has {self.world_size} "
                f"({self.num_processes} devices on each of {self.num_nodes} machines). Give sizes whose product is {self.world_size}; "
                "'auto' means the machines for data_parallel_size, and the devices of one for tensor_parallel_size."
            )
        return data, tensor

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What a DistributedSampler has to know: processes that compute one model together get the same samples."""
        data, tensor = self.sizes()
        return {"num_replicas": data, "rank": self.global_rank // tensor}

    def configure_launcher(self) -> None:
        """Decide what starts the processes, if their number is right."""
        self.sizes()
        super().configure_launcher()

    # ---- setting up -------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Meet the other processes, and form the grid."""
        super().setup_environment()
        if self._device_mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            self._device_mesh = init_device_mesh(self.root_device.type, self.sizes(), mesh_dim_names=(DATA, TENSOR))
        self._share_random_states()
        if self.module is not None:
            self._hand_out_mesh(self.module)

    def connect(self, model: Module) -> None:
        super().connect(model)
        self._hand_out_mesh(model)

    def _hand_out_mesh(self, module: Module) -> None:
        for each in module.modules():
            if "_device_mesh" in vars(each):  # LightningModules
                each._device_mesh = self._device_mesh  # type: ignore[assignment]

    def _share_random_states(self) -> None:
        """Processes that compute one model together draw the same random numbers, as for dropout and the order of data."""
        if self.sizes()[1] > 1:
            group = self.device_mesh[TENSOR].get_group()
            first = torch.distributed.get_global_rank(group, 0)
            self._set_random_states(collectives.broadcast(self._random_states(), first, group))

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """A context to build a module in: on the CPU, or on the ``meta`` device with ``empty_init``, since it is divided afterwards."""
        with torch.device("meta") if empty_init else nullcontext(), self.precision.module_init_context():
            yield

    def setup_module(self, module: Module, training: bool = True) -> Module:
        """Return the module, which ``configure_model`` or ``parallelize_fn`` has divided, converted and on the device.

        Args:
            module: the user's.
            training: whether it will be trained.

        Raises:
            TypeError: if nothing in it is divided, or ``parallelize_fn`` returned no module.
            MisconfigurationException: if batch normalisation would have to be replaced after it was divided.
        """
        from torch.distributed.fsdp import FSDPModule

        if self._parallelize_fn is not None:
            module = self._parallelize_fn(module, self.device_mesh)
            if not isinstance(module, Module):
                raise TypeError(f"`parallelize_fn` returned {module!r}, a {type(module).__name__}; it must return the module.")
        self._check_divided(module)
        module = self.precision.convert_module(module)
        self._without_value = materialize(module, self.root_device)
        self.module_to_device(module)
        tensors = [*module.parameters(), *module.buffers()]
        for dimension in (TENSOR, DATA):  # a tensor that neither divides becomes what it is on rank 0
            replicas.make_same(tensors, self.device_mesh[dimension])
        if training:
            scaler = getattr(self.precision, "scaler", None)
            if scaler is not None:
                make_scaler_agree(scaler)
            self._average_gradients(module)
            self._compared_gradients = self.sizes()[1] == 1
        if self.sizes()[1] > 1:
            self._metrics += replicas.count_once(module, self.device_mesh[DATA].get_group())
        if isinstance(module, FSDPModule) and root_of(module) is None:  # itself, so that steps have to gather the weights that it holds
            Root(module, WholeParameters(module, [], self.device_mesh))
        return module

    def module_to_device(self, module: Module) -> None:
        """Move what is not there yet to the device of this process."""
        module.to(self.root_device)

    def _check_divided(self, module: Module) -> None:
        if not any(is_dtensor(parameter) for parameter in module.parameters()):
            raise TypeError(
                f"No parameter of {type(module).__name__} is divided. With ModelParallelStrategy override `configure_model` (with Fabric, "
                "give `parallelize_fn`), and there apply `parallelize_module` with `self.device_mesh['tensor_parallel']`, `fully_shard` "
                "with `mesh=self.device_mesh['data_parallel']`, or both. Where nothing is to be divided, use strategy='ddp'."
            )
        if self.layer_sync is not None and any(isinstance(each, torch.nn.modules.batchnorm._BatchNorm) for each in module.modules()):
            raise MisconfigurationException(
                "sync_batchnorm=True replaces layers, which is too late once they are divided. In `configure_model` call "
                "`torch.nn.SyncBatchNorm.convert_sync_batchnorm(module, self.device_mesh['data_parallel'].get_group())` first."
            )

    def _average_gradients(self, module: Module) -> None:
        """See to gradients that neither FSDP2 nor DTensor averages over ``"data_parallel"``."""
        self._forget(module)
        mesh = self.device_mesh[DATA]
        ranks = replicas.ranks_of(mesh)
        alone = [p for p in module.parameters() if p.requires_grad and len(ranks) > 1 and not replicas.covers(p, ranks)]
        self._divided.append(module)
        self._averaged.append(replicas.AveragedGradients(alone, mesh.get_group()))

    def _forget(self, module: Module) -> None:
        if module in self._divided:
            index = self._divided.index(module)
            del self._divided[index]
            self._averaged.pop(index).remove()

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer, if it can step the divided parameters.

        Raises:
            MisconfigurationException: if it was made from parameters that have been replaced, or mixes kinds that its
                implementation does not.
        """
        known: set[Tensor] = set()
        for module in self._divided:
            self.reshard(module)
            known.update(module.parameters())
        if known and not any(parameter in known for group in optimizer.param_groups for parameter in group["params"]):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} holds no parameter of the model as it is now: dividing it has replaced them. Make the "
                "optimizer in `configure_optimizers`; with Fabric, after `setup_module`."
            )
        self._prepare_to_step(optimizer)
        for root in filter(None, map(root_of, self._divided)):
            self._handles += [optimizer.register_step_pre_hook(root.before_step), optimizer.register_step_post_hook(root.after_step)]
        return optimizer

    def bind(self, name: str) -> Callable[..., Any]:
        """The step function ``name`` of the module, which in its first call compares the batches of those that need the same one.

        Raises:
            RuntimeError: if the module was built on the meta device, and some of its tensors never got a value.
        """
        if self._without_value:
            raise RuntimeError(
                f"The module was built on the meta device, and nothing gave values to {', '.join(map(repr, self._without_value[:8]))}. "
                "Give the modules that hold them a method `reset_parameters` that does, or load a checkpoint."
            )
        assert self.module is not None
        step = self.as_forward(self.module, self.method(name))
        return step if self.sizes()[1] == 1 else replicas.compares_first_batch(step, name, self.device_mesh[TENSOR].get_group())

    def as_forward(self, module: Module, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, which computes with a module, as it runs in place of its forward pass: with the weights that it holds gathered."""
        root = root_of(module)
        if root is None:
            return _without_inference_mode(method)
        manual = method.__name__ == "training_step" and not getattr(module, "automatic_optimization", True)
        return root.through(method, manual)

    # ---- stepping ---------------------------------------------------------------------------------------------------

    @contextmanager
    def no_backward_sync(self, module: Module | None = None) -> Generator[None, None, None]:
        """A context in which backward keeps gradients local; the forward pass belongs into it too.

        Args:
            module: as :meth:`setup_module` returned it; None for the strategy's own.
        """
        held = [(each, averaged) for each, averaged in zip(self._divided, self._averaged) if module is None or each is module]
        units = [unit for owner, _ in held for unit in _units(owner)]
        for each in units:
            each.set_requires_gradient_sync(False, recurse=False)
        for _, averaged in held:
            averaged.enabled = False
        try:
            yield
        finally:
            for each in units:
                each.set_requires_gradient_sync(True, recurse=False)
            for _, averaged in held:
                averaged.enabled = True

    def block_backward_sync(self) -> AbstractContextManager[Any]:
        """Another name of :meth:`no_backward_sync`, for manual optimization."""
        return self.no_backward_sync()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        if self._compared_gradients:
            return super().optimizer_step(optimizer, closure, **kwargs)
        if closure is None:
            self._compare_gradients()
            return super().optimizer_step(optimizer, None, **kwargs)

        def then_compare() -> Any:
            result = closure()
            self._compare_gradients()
            return result

        return super().optimizer_step(optimizer, then_compare, **kwargs)

    def _compare_gradients(self) -> None:
        """Once, make sure that the processes which compute one model together agree on what each of them holds whole."""
        mesh = self.device_mesh[TENSOR]
        ranks, group = replicas.ranks_of(mesh), mesh.get_group()
        finite = [replicas.check_replicated_gradients(module, ranks, group) for module in self._divided]
        self._compared_gradients = all(finite)

    def pre_backward(self, closure_loss: Any) -> None:
        """In manual optimization: gather the weights that a backward pass over ``closure_loss`` needs."""
        root = root_of(self.module)
        if root is not None and root.manual:
            root.before_backward(closure_loss)

    # ---- processes --------------------------------------------------------------------------------------------------

    def reduce_named(self, values: Mapping[str, tuple[Tensor, str]], group: Any = None) -> dict[str, Tensor]:
        """Reduce many values, each with those of the same name: each batch counts once, however many processes computed it together."""
        return super().reduce_named(values, self.device_mesh[DATA].get_group() if group is None else group)

    def load_module_state_dict(self, module: Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        super().load_module_state_dict(module, state_dict, strict)
        self._without_value = [name for name in self._without_value if name not in state_dict]

    def mean_gradients(self) -> dict[str, Tensor]:
        assert self.module is not None
        self.reshard(self.module)
        mesh = self.device_mesh[DATA]
        ranks, group = replicas.ranks_of(mesh), mesh.get_group()
        kept = {
            each.sharded_param: _local_gradient(each)
            for unit in _units(self.module)
            for params in groups_of(unit)
            for each in params.fsdp_params
        }
        found = {}
        for name, parameter in self.module.named_parameters():
            total = parameter.grad
            if total is not None and not replicas.covers(parameter, ranks):
                total = total.clone()
                local_tensor(total).copy_(collectives.reduce(local_tensor(total), "mean", group))
            whole = kept.get(parameter)  # that FSDP2 keeps until the window is over, divided by the other dimension alone
            if whole is not None:
                mean = distribute_like(collectives.reduce(full_tensor(whole), "mean", group).to(parameter.dtype), parameter)
                total = mean if total is None else total + mean
            if total is not None:
                found[name] = total
        return found

    # ---- the end ----------------------------------------------------------------------------------------------------

    def reshard(self, module: Module) -> None:
        for unit in _units(module):
            unit.reshard()

    def teardown(self) -> None:
        """Bring what this process holds back to the host. The module stays divided, for a next run of the same processes."""
        for module in list(self._divided):
            self._forget(module)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for metric in self._metrics:
            metric.dist_sync_fn = None
        self._metrics.clear()
        root = root_of(self.module)
        if root is not None:
            root.reset()
        super().teardown()


def _units(module: Module) -> list[Any]:
    """The modules to which ``fully_shard`` was applied."""
    from torch.distributed.fsdp import FSDPModule

    return [each for each in module.modules() if isinstance(each, FSDPModule)]


def _without_inference_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` with gradients switched off in its place: weights that are gathered in inference mode could never be trained."""

    @wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return step(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return step(*args, **kwargs)

    return run
