"""Quantisation of a whole model, block by block, from calibration batches."""
import copy
import fnmatch
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ._blocks import Stream, execution_order, find_blocks
from ._calibrate import Sums, calibrate, solve
from ._columns import QuantizedWeight
from ._layers import is_layer, put, weight_of
from ._report import ModuleResult, QuantizeReport
from ._resume import Store
from ._stages import Group, find_stages
from .config import QuantizeConfig
from .gptq_quantize import rtn_quantize
from .quantized_linear import QuantizedLinear

REASONS = {1: "its Hessian is not positive definite, however damped", 2: "its calibration inputs are not finite",
           3: "its calibration inputs are all zero"}  # fmt: skip


@torch.no_grad()
def quantize_model(model: nn.Module, calibration: Iterable[Any] | None, config: QuantizeConfig, *,
                   progress: bool = True, resume: str | PathLike[str] | None = None) -> QuantizeReport:  # fmt: skip
    """Replaces the linear layers of a model by :class:`QuantizedLinear`, in place, block after block.

    Blocks are the elements of the outermost ``ModuleList``\\ s that hold linear layers; what is outside of them
    (embeddings, poolers, heads) is left alone. A model without such lists is one block, and all of it is quantised.
    Inside a block, layers with the same input tensor (q, k and v; gate and up) share one Hessian, and layers are
    quantised in the order in which they feed each other, each from what the layers before it return once quantised.
    Of the calibration batches, only their way into the next block is kept; memory for Hessians is that of one stage of
    one block (``4 in^2`` bytes for every distinct input).

    Args:
        model: on any device, in any floating-point dtype. Modified; in evaluation mode meanwhile.
        calibration: batches, each a tensor (``model(batch)``), a tuple (``model(*batch)``) or a dictionary
            (``model(**batch)``). A dictionary's ``"attention_mask"`` says which tokens are padding: those do not count
            in layers whose inputs are laid out as the mask is. (Experts get a selection of tokens; calibrate mixtures
            of experts with batches that need no padding.) None or empty: only with ``method="rtn"``.
        config: :class:`QuantizeConfig`.
        progress: show a bar, if `rich` is installed.
        resume: a directory for the result of every layer. An interrupted run that starts again from the same model,
            calibration and config takes from there what is done, and ends with the same codes.

    Returns:
        :class:`QuantizeReport`: for every layer its loss, damping, tokens and seconds, and what was left alone and why;
        ``print`` shows a table.

    Raises:
        TypeError: an argument is of the wrong type. ValueError: the model has no linear layer to quantise, weights are
        not finite, calibration is empty, or ``resume`` holds results of another run.

    A layer that saw too few tokens, or none, or inputs that are not finite, is rounded to nearest, with a warning that
    names it. Weights that are shared with another module, subclasses of ``nn.Linear`` and layers that match
    ``config.skip`` are left alone. ``Conv1D`` of GPT-2 counts as a linear layer. If this function is interrupted or
    fails, the model is left half done: load it again.

    Example:
        >>> import torch
        >>> from gradops.quant import QuantizeConfig, quantize_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 16))
        >>> report = quantize_model(model, [torch.randn(256, 64)], QuantizeConfig(group_size=32), progress=False)
        >>> [row.name for row in report.modules], type(model[0]).__name__
        (['0', '2'], 'QuantizedLinear')
    """
    if not isinstance(config, QuantizeConfig):
        raise TypeError(f"config must be a QuantizeConfig, got {type(config).__name__}")
    if isinstance(calibration, (Tensor, Mapping, str)):
        raise TypeError(f"calibration must be an iterable of batches, got one {type(calibration).__name__}")
    began = time.perf_counter()
    batches = list(calibration or ())
    if not batches and config.method != "rtn":
        raise ValueError(f"calibration must hold batches for method={config.method!r}, got none")
    names = find_blocks(model)
    blocks, left = _choose(model, names, config)
    layers = {name for block in blocks.values() for name in block}
    if not layers:
        raise ValueError(f"model has no Linear layer to quantise; left alone: {left or 'nothing'}")
    store = Store(resume, model, sorted(layers), batches, config)
    training = model.training
    model.eval()
    try:
        with _bar(progress, len(layers)) as tick:
            run = _Run(model, config, store, tick)
            if config.method != "rtn":
                _calibrated(run, batches, names, blocks)
            for block in blocks.values():  # all of them, or those that no batch comes to
                run.round(name for name in block if is_layer(model.get_submodule(name)))
                run.install()
    finally:
        model.train(training)
    return QuantizeReport(config, run.rows, left, time.perf_counter() - began)


def _choose(model: nn.Module, names: Sequence[str],
            config: QuantizeConfig) -> tuple[dict[str, list[str]], dict[str, str]]:  # fmt: skip
    """The layers to quantise, block by block, and what is left alone and why."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    blocks: dict[str, list[str]] = {name: [] for name in names or [""]}
    left = {}
    for name, module in model.named_modules():
        block = next((b for b in blocks if not b or name == b or name.startswith(b + ".")), None)
        if not is_layer(module):
            if isinstance(module, nn.Linear):
                left[name] = f"a {type(module).__name__}, which may use its weight in its own way"
            elif block is not None and _fused(module):
                left[name] = "weights with three dimensions (fused experts) are not supported"
                warnings.warn(f"{name}: {left[name]}; it stays in full precision", stacklevel=3)
            continue
        shared = [other for other in owners[id(module.weight)] if other != f"{name}.weight"]
        pattern = next((p for p in config.skip if fnmatch.fnmatch(name, p)), None)
        if block is None:
            left[name] = "outside the blocks"
        elif shared:
            left[name] = f"its weight is also {', '.join(shared)}"
        elif pattern:
            left[name] = f"skip={pattern!r}"
        elif not bool(module.weight.isfinite().all()):
            raise ValueError(f"the weight of {name} must be finite, got NaN or infinity")
        else:
            blocks[block].append(name)
    return blocks, left


def _fused(module: nn.Module) -> bool:
    """Whether it holds several matrices in one parameter."""
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return not convolution and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _calibrated(run: "_Run", batches: Sequence[Any], names: Sequence[str], blocks: Mapping[str, list[str]]) -> None:
    model, gptaq = run.model, run.config.method.endswith("gptaq")
    order = execution_order(model, names, batches[0])
    stream = Stream(model, batches, order)
    exact = Stream(model, batches, order) if gptaq else None  # in full precision
    for at, block in enumerate(order):
        names_here = blocks[block] if block in blocks else [name for part in blocks.values() for name in part]
        layers = {name: model.get_submodule(name) for name in names_here}
        twin = copy.deepcopy(model.get_submodule(block)) if gptaq else None
        twins = {} if twin is None else {name: twin.get_submodule(name[len(block) :].lstrip(".")) for name in layers}
        for stage in find_stages(stream, at, layers) if run.store.missing(layers) else [[Group(list(layers), 1)]]:
            began = time.perf_counter()
            todo = [group for group in stage if run.store.missing(group.names)]
            sums = calibrate(stream, at, todo, layers, exact, twin, twins) if todo else []
            run.take([name for group in stage if group not in todo for name in group.names])
            run.compensate(todo, sums, began)
        run.round(layers)
        if at + 1 < len(order):
            for batch in range(len(batches)):
                stream.run(at, batch, keep=True)
                if exact is not None:
                    exact.run(at, batch, block=twin, keep=True)
        run.install()


class _Run:
    """Layers that are done: their results, and where they go."""

    def __init__(self, model: nn.Module, config: QuantizeConfig, store: Store, tick: Callable[[str], None]) -> None:
        self.model, self.config, self.store, self.tick = model, config, store, tick
        self.rows: list[ModuleResult] = []
        self.most = 0  # tokens that any layer saw
        self.warned = False
        self._ready: dict[str, QuantizedLinear] = {}  # of the block at hand

    def compensate(self, groups: Sequence[Group], sums: Sequence[Sums], began: float) -> None:
        """Quantises the groups of a stage, those of the same shapes (experts) in one call."""
        self.most = max([self.most, *(s.seen for s in sums)])
        alike: dict[Any, list[tuple[list[str], Sums]]] = defaultdict(list)
        for (group, _), s in zip(groups, sums, strict=True):
            weights = [weight_of(self.model.get_submodule(name)) for name in group]
            inputs = weights[0].shape[1]
            if s.seen < inputs and not self.warned:
                self.warned = True
                warnings.warn(f"{group[0]} saw {s.seen} tokens and has {inputs} inputs: with fewer tokens than inputs, "
                              "compensation may do worse than rounding (said once)", stacklevel=4)  # fmt: skip
            if 0 < s.seen >= self.config.min_token_share * self.most:
                alike[tuple(w.shape for w in weights), weights[0].dtype, s.H.device, s.D is None].append((group, s))
            else:
                self.round(group, f"saw {s.seen} of {self.most} tokens", s.seen)
        results = []
        for parts in alike.values():
            weights = [torch.cat([weight_of(self.model.get_submodule(name)) for name in group]) for group, _ in parts]
            solved = solve(torch.stack(weights), [s for _, s in parts], self.config)
            results += [(group, s, answer) for (group, s), answer in zip(parts, solved, strict=True)]
        each = (time.perf_counter() - began) / max(1, sum(len(group) for group, _, _ in results))
        for group, s, (q, damp, info) in results:
            if info > 0:
                self.round(group, REASONS[info], s.seen, info)
                continue
            method = self.config.method
            if method.endswith("gptaq") and s.D is None:
                method = "foem" if method.startswith("foem") else "gptq"
                warnings.warn(f"{', '.join(group)}: quantised by {method}: the tokens that an expert sees are others "
                              "in full precision, and GPTAQ compares the same", stacklevel=4)  # fmt: skip
            begin = 0
            for name in group:
                end = begin + len(weight_of(self.model.get_submodule(name)))
                rows = slice(begin, end)
                part = QuantizedWeight(q.codes[rows], q.scales[rows], q.zeros[rows], q.g_idx, q.weight[rows],
                                       q.loss[rows], q.info)  # fmt: skip
                self._finish(name, part, ModuleResult(name, method, s.seen, float(part.loss.sum()), damp, each, info))
                begin = end

    def round(self, names: Iterable[str], why: str = "no calibration batch reaches it", seen: int = 0,
              info: int = 0) -> None:
        """Rounds to nearest those that are not done."""
        for name in names:
            if name in self._ready:
                continue
            if not self.store.missing([name]):
                self.take([name])
                continue
            began, rtn = time.perf_counter(), self.config.method == "rtn"
            if not rtn:
                warnings.warn(f"{name}: rounded to nearest: {why}", stacklevel=4)
            c = self.config
            q = rtn_quantize(weight_of(self.model.get_submodule(name)), bits=c.bits, group_size=c.group_size, sym=c.sym,
                             mse=c.mse, scale_dtype=torch.float16)  # fmt: skip
            self._finish(name, q, ModuleResult(name, "rtn", seen, float(q.loss.sum()), math.nan,
                                               time.perf_counter() - began, info, "" if rtn else why))  # fmt: skip

    def take(self, names: Iterable[str]) -> None:
        """Takes from the store those that are not done."""
        for name in names:
            if name not in self._ready:
                self._ready_now(name, *self.store.get(name))

    def install(self) -> None:
        """Puts the quantised layers of a block into the model."""
        for name, layer in self._ready.items():
            put(self.model, name, layer)
        self._ready.clear()

    def _finish(self, name: str, q: QuantizedWeight, result: ModuleResult) -> None:
        bias: Any = self.model.get_submodule(name).bias
        layer = QuantizedLinear.from_quantized(q, bias, bits=self.config.bits, group_size=self.config.group_size,
                                               checkpoint_format=self.config.checkpoint_format)  # fmt: skip
        self.store.put(layer, result)
        self._ready_now(name, layer, result)

    def _ready_now(self, name: str, layer: QuantizedLinear, result: ModuleResult) -> None:
        weight = weight_of(self.model.get_submodule(name))
        layer = layer.to(weight.device)
        weight.copy_(layer.dequantize())  # what later layers of the block see, faster than the packed layer
        self._ready[name] = layer
        self.most = max(self.most, result.tokens)
        self.rows.append(result)
        self.tick(name)


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[str], None]]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        wanted = False
    if not wanted:
        yield lambda name: None
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibrating", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)
