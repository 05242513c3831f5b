"""What is known about a plan, as frozen values: what crosses a cut, which stages there are, what
each costs, and how the cuts were found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor of the example batch.

    Attributes:
        shape: sizes of the example, batch dimension first unless ``batch_dim`` says otherwise.
        dtype: element type.
        feature_dim: 1 for convolutional maps ``(batch, channels, *space)``, -1 for ``(batch, ...,
            features)``.
        batch_dim: dimension of the batch: another than 0 in the state of a recurrent model, and
            where the sizes alone tell that it is the second one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    feature_dim: int = -1
    batch_dim: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Interface:
    """One float tensor on a trainable path that crosses from its producer stage to its consumer
    stages.

    Attributes:
        name: module path where the value is that module's output, else the node's name.
        spec: shape and dtype of the example.
        producer: index of the stage that computes the value.
        consumers: indices of the stages that use it, ascending.
        implied: True where the value crosses a cut that was not named after it.
        aliases: other names of the same value, which mappings may use as well.
        feeds: the model input that takes the value in the next window (the consumers are then
            stages of that one), or ``"another network"``; None for what stays within one call.
    """

    name: str
    spec: TensorSpec
    producer: int
    consumers: tuple[int, ...]
    implied: bool = False
    aliases: tuple[str, ...] = ()
    feeds: str | None = None

    @property
    def leaves(self) -> bool:
        """Whether the value goes to the next window or to another network."""
        return self.feeds is not None


@dataclass(frozen=True)
class CutPoint:
    """A place where a model can be named to be cut.

    Attributes:
        name: what to pass in ``cuts``.
        shape: shape of the example value that the cut is named after (or of the last one that
            crosses).
        nbytes: bytes that would cross, for the example batch.
        crossing: names of all values that would cross.
        interfaces: how many of them carry a gradient.
        legal: whether a cut may be made there.
        reason: why not, else empty.
        ends_module: whether a module's call ends there, so that the cut lies between modules.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    crossing: tuple[str, ...]
    interfaces: int
    legal: bool
    reason: str = ""
    ends_module: bool = False


@dataclass(frozen=True)
class StageCost:
    """What one stage costs for one batch of the example's size, on a device of speed 1.

    Attributes:
        forward: seconds of the stage's own forward.
        backward: seconds of its backward, gradients of parameters included.
        update: seconds of its optimiser.
        sources: seconds of the sources that it asks: prediction, and regression when the target
            arrives.
        parameter_bytes: its parameters, their gradients and Adam's two moments.
        activation_bytes: what its forward keeps for its backward, received values included.
        source_bytes: its sources' parameters, gradients and moments, and what they keep.
        frozen_bytes: of ``parameter_bytes`` those of parameters that are not trained, which have
            neither gradients nor moments.
    """

    forward: float
    backward: float
    update: float = 0.0
    sources: float = 0.0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    source_bytes: int = 0
    frozen_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Everything that the stage computes in one decoupled step."""
        return self.forward + self.backward + self.update + self.sources

    @property
    def nbytes(self) -> int:
        """All memory that the stage needs in a decoupled step."""
        return self.parameter_bytes + self.activation_bytes + self.source_bytes


@dataclass(frozen=True)
class StageReport:
    """One row of a plan's stages.

    Attributes:
        name: ``stage_0``, ``stage_1``, ...
        nodes: number of graph nodes.
        parameters: number of parameter elements.
        cut: the cut that ends it; None for the last one.
        inputs: names of model inputs and of earlier stages' values that it takes.
        modules: paths of the largest modules that lie wholly in it, in program order.
        cost: seconds and bytes; None where costs were not asked for.
    """

    name: str
    nodes: int
    parameters: int
    cut: str | None
    inputs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    cost: StageCost | None = None


@dataclass(frozen=True)
class SourceReport:
    """The source at one interface.

    Attributes:
        kind: its name.
        parameters: number of parameter elements.
        flops: floating-point operations of one prediction for the example batch; None: unknown.
        seconds: of one prediction and regression; None where costs were not asked for.
    """

    kind: str
    parameters: int
    flops: int | None
    seconds: float | None = None


@dataclass(frozen=True)
class NodeReport:
    """One node of the traced graph, for drawing.

    Attributes:
        name: the node's name; a model input's or the output's for those.
        operator: class of the module or name of the function that it calls; ``"input"`` or
            ``"output"``.
        scope: paths of the modules that it ran in, outermost first, its own path last where it is a
            module.
        inputs: names of the nodes whose values it uses.
        shape: shape of its value; empty where it is no tensor.
        stage: index of its stage; None for inputs, the output, and nodes made again in every stage
            that needs them.
        seconds: forward and backward; None where costs were not asked for.
    """

    name: str
    operator: str
    scope: tuple[str, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    stage: int | None
    seconds: float | None = None


@dataclass(frozen=True)
class SearchReport:
    """How the cuts were found.

    Attributes:
        objective: ``"throughput"``, ``"memory"``, ``"traffic"``, ``"learnability"``.
        costs: ``"measured"``, ``"analytic"`` or ``"given"``.
        slowest: seconds of the slowest stage: its work, its sources, and what it sends and receives
            (which :func:`dni_fx.simulate` takes to overlap with the work).
        bound: no plan with as many stages can have a faster slowest stage; seconds.
        frontiers: number of places that were weighed.
        exact: what the best was sought over without leaving any out: ``"all partitions"`` that keep
            units together, ``"program order"`` where stages are contiguous in it, ``""`` where some
            were left out. The plan may be one per cent slower than that best (5 for traffic and
            learnability).
        reasons: why each cut is where it is, by its name.
        explained: share of the true gradient that a quickly fitted source explained, by cut;
            learnability only.
    """

    objective: str
    costs: str
    slowest: float
    bound: float
    frontiers: int
    exact: str
    reasons: dict[str, str] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far the slowest stage is above the bound, as a share of the bound."""
        return self.slowest / self.bound - 1 if self.bound else 0.0


@dataclass(frozen=True)
class PlanReport:
    """What was measured or found while a plan was made. Takes no part in the plan's equality.

    Attributes:
        rung: which tracer made the graph.
        stages: a row for each stage.
        interfaces: values that carry a gradient across.
        plain: other values that cross.
        sources: a row for each interface, by name.
        notes: opaque modules, ties, fewer stages than asked for, and the like.
        exact: whether the self-check found the split model equal bit for bit; None where it was not
            run.
        nodes: the traced graph in program order, for drawing.
        kinds: class of every module that nodes ran in, by path.
        search: how the cuts were found; None where they were given.
        input_bytes: of the model's inputs, for the example batch.
    """

    rung: str
    stages: tuple[StageReport, ...]
    interfaces: tuple[Interface, ...]
    plain: tuple[str, ...] = ()
    sources: dict[str, SourceReport] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exact: bool | None = None
    nodes: tuple[NodeReport, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict)
    search: SearchReport | None = None
    input_bytes: int = 0
