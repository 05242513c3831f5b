"""Models of packages for graphs, molecules, fields, flows and spikes; see `zoo_packages`."""

from __future__ import annotations

import itertools
import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from zoo_packages import Make, Row, ids, named, real, row, unit

NODES, EDGES, WIDTH = 6, 14, 16  # of each graph in a batch


def _edges(batch: int, generator: torch.Generator, _dtype: torch.dtype) -> Tensor:
    shape = (2, batch, EDGES)
    starts = NODES * torch.arange(batch)[:, None]
    return (torch.randint(NODES, shape, generator=generator) + starts).flatten(1)


def _flat(*shape: int, count: int = NODES) -> Make:
    """Normal numbers for every node, or edge, of a batch of graphs."""
    return lambda batch, generator, dtype: torch.randn(
        (batch * count, *shape), generator=generator, dtype=dtype
    )


def _atoms(batch: int, generator: torch.Generator, _dtype: torch.dtype) -> Tensor:
    return torch.randint(1, 9, (batch * NODES,), generator=generator)


def _members(batch: int, _generator: torch.Generator, _dtype: torch.dtype) -> Tensor:
    return torch.arange(batch).repeat_interleave(NODES)


_GRAPH: tuple[Make, ...] = _flat(8), _edges
_LAYERS = {"in_channels": 8, "hidden_channels": WIDTH, "num_layers": 4, "out_channels": 3}


def _neighbours(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs in a molecule; torch-cluster, which would find near ones, is compiled code."""
    pairs = batch[:, None] == batch[None, :]
    pairs = pairs & ~torch.eye(len(batch), dtype=torch.bool)
    edges = pairs.nonzero().t()
    return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)


def _schnet() -> nn.Module:
    return named("torch_geometric.nn:SchNet")(
        hidden_channels=WIDTH, num_filters=WIDTH, num_interactions=3, num_gaussians=8,
        interaction_graph=_neighbours,
    )  # fmt: skip


class Pooled(nn.Module):
    """A classifier of graphs as PyG's examples have it."""

    def __init__(self, conv: str, **options: Any) -> None:
        super().__init__()
        make = named(f"torch_geometric.nn:{conv}")
        widths = (8, WIDTH, WIDTH, WIDTH)
        self.convs = nn.ModuleList(make(a, b, **options) for a, b in itertools.pairwise(widths))
        self.norm = named("torch_geometric.nn:BatchNorm")(WIDTH)
        self.pool = named("torch_geometric.nn:global_mean_pool")
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        """Scores of every graph's class."""
        for conv in self.convs:
            x = self.norm(conv(x, edge_index)).relu()
        return self.head(self.pool(x, batch))


def _pna() -> nn.Module:
    return named("torch_geometric.nn:PNA")(
        **_LAYERS, aggregators=["mean", "max", "std"], scalers=["identity", "amplification"],
        deg=torch.tensor([0, 2, 3, 4, 2, 1]),
    )  # fmt: skip


def _e3nn() -> nn.Module:
    return named("e3nn.nn.models.v2106.gate_points_networks:SimpleNetwork")(
        irreps_in="2x0e + 1x1o", irreps_out="3x0e", max_radius=6.0, num_neighbors=4.0,
        num_nodes=6.0, mul=4, layers=3, lmax=1,
    )  # fmt: skip


def _se3() -> nn.Module:
    # it keeps tables in files, which a first call makes: each process has a folder of its own
    os.environ["CACHE_PATH"] = tempfile.mkdtemp(prefix="zoo-")
    return named("se3_transformer_pytorch:SE3Transformer")(
        dim=8, heads=2, dim_head=4, depth=2, num_degrees=2, num_neighbors=3
    )


def _points(batch: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    shape = batch * NODES
    return {
        "pos": torch.randn((shape, 3), generator=generator, dtype=dtype),
        "x": torch.randn((shape, 5), generator=generator, dtype=dtype),
        "batch": torch.arange(batch).repeat_interleave(NODES),
    }


class Equivariant(nn.Module):
    """Tensor products and gates of e3nn, layer after layer."""

    def __init__(self) -> None:
        super().__init__()
        o3 = named("e3nn:o3")
        irreps = o3.Irreps("4x0e + 4x1o")
        self.enter = o3.Linear("2x0e + 1x1o", irreps)
        product = o3.FullyConnectedTensorProduct
        self.products = nn.ModuleList(product(irreps, "1x0e + 1x1o", irreps) for _ in range(3))
        self.norms = nn.ModuleList(named("e3nn.nn:BatchNorm")(irreps) for _ in range(3))
        self.leave = o3.Linear(irreps, "3x0e")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Invariant scores."""
        x = self.enter(x)
        for product, norm in zip(self.products, self.norms, strict=True):
            x = x + norm(product(x, y))
        return self.leave(x)


class Likelihood(nn.Module):
    """The negative log-likelihood of a flow, which is what is trained."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.flow = make()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """One number for each sample."""
        if type(self.flow).__module__.startswith("zuko"):
            return -self.flow(context).log_prob(x)
        return -self.flow.log_prob(x)


def _zuko(name: str, **options: Any) -> Any:
    return lambda: named(f"zuko.flows:{name}")(features=4, **options)


def _nflows(name: str) -> Any:
    return lambda: named(f"nflows.flows:{name}")(
        features=4, hidden_features=16, num_layers=3, num_blocks_per_layer=1
    )


def _nflows_spline() -> nn.Module:
    module = named("importlib:import_module")
    transforms = module("nflows.transforms")
    layers: list[nn.Module] = []
    for _ in range(3):
        layers.append(transforms.ReversePermutation(features=4))
        layers.append(
            transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                features=4, hidden_features=16, num_bins=4, tails="linear", tail_bound=4.0
            )
        )
    normal = module("nflows.distributions").StandardNormal([4])
    return module("nflows.flows").Flow(transforms.CompositeTransform(layers), normal)


def _normflows(spline: bool) -> Any:
    def make() -> nn.Module:
        nf = named("importlib:import_module")("normflows")
        flows: list[nn.Module] = []
        for _ in range(3):
            if spline:
                flows.append(nf.flows.AutoregressiveRationalQuadraticSpline(4, 1, 16))
            else:
                flows.append(nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 16, 16, 4])))
                flows.append(nf.flows.Permute(4, mode="swap"))
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(4, trainable=False), flows)

    return make


class Spiking(nn.Module):
    """The network of snntorch's tutorials: a loop over time steps around neurons."""

    def __init__(self, neuron: str, hidden_state: bool = False, **options: Any) -> None:
        super().__init__()
        gradient = named("snntorch.surrogate:fast_sigmoid")(slope=25)
        options |= {"spike_grad": gradient, "init_hidden": hidden_state}
        make = named(f"snntorch:{neuron}")
        self.first, self.last = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 4)
        self.inner = make(**options)
        self.outer = make(**options, **({"output": True} if hidden_state else {}))
        self.hidden_state = hidden_state

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes and membranes of the last layer, over time."""
        spikes, membranes = [], []
        inner, outer = self._start()
        for _ in range(5):
            if self.hidden_state:
                spike, *outer = self.outer(self.last(self.inner(self.first(x))))
            else:
                spike, *inner = self.inner(self.first(x), *inner)
                spike, *outer = self.outer(self.last(spike), *outer)
            spikes.append(spike)
            membranes.append(outer[-1])
        return torch.stack(spikes), torch.stack(membranes)

    def _start(self) -> tuple[Any, Any]:
        if self.hidden_state:
            named("snntorch.utils:reset")(self)
            return [], []
        found = []
        for neuron in (self.inner, self.outer):
            kind = type(neuron).__name__
            start = neuron.init_synaptic() if kind == "Synaptic" else neuron.init_leaky()
            found.append(list(start) if isinstance(start, tuple) else [start])
        return found[0], found[1]


class Jelly(nn.Module):
    """A spiking network of spikingjelly, reset at the start of each batch."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        module = named("importlib:import_module")
        layer = module("spikingjelly.activation_based.layer")
        neuron = module("spikingjelly.activation_based.neuron")
        surrogate = module("spikingjelly.activation_based.surrogate")
        self.functional = module("spikingjelly.activation_based.functional")
        spike: dict[str, Any] = {"surrogate_function": surrogate.ATan()}
        if deep:
            sew = module("spikingjelly.activation_based.model.sew_resnet")
            self.net = sew.sew_resnet18(
                cnf="ADD", spiking_neuron=neuron.IFNode, num_classes=4, **spike
            )
        else:
            self.net = nn.Sequential(
                layer.Conv2d(3, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.LIFNode(**spike),
                layer.MaxPool2d(2, 2), layer.Flatten(), layer.Linear(8 * 64, WIDTH),
                neuron.LIFNode(**spike), layer.Linear(WIDTH, 4),
            )  # fmt: skip
        self.functional.set_step_mode(self.net, "m")

    def forward(self, x: Tensor) -> Tensor:
        """Mean scores over four time steps of the same image."""
        self.functional.reset_net(self.net)
        return self.net(x.unsqueeze(0).repeat(4, *[1] * x.dim())).mean(0)


class Differential(nn.Module):
    """A network whose middle is an ordinary differential equation."""

    def __init__(self, solve: str, **options: Any) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 3)
        self.field = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.solve, self.options = named(f"torchdiffeq:{solve}"), options
        if solve == "odeint_adjoint":
            self.options["adjoint_params"] = tuple(self.field.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the state at the end."""
        times = torch.linspace(0.0, 1.0, 3, dtype=x.dtype)
        states = self.solve(lambda _t, y: self.field(y), self.enter(x), times, **self.options)
        return self.leave(states[-1])


class Deep(nn.Module):
    """Features of a network under a variational Gaussian process, with its marginals."""

    def __init__(self) -> None:
        super().__init__()
        gp = named("importlib:import_module")("gpytorch")

        class Process(gp.models.ApproximateGP):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                points = torch.randn(6, 2)
                chosen = gp.variational.CholeskyVariationalDistribution(6)
                super().__init__(gp.variational.VariationalStrategy(self, points, chosen))
                self.mean = gp.means.ConstantMean()
                self.kernel = gp.kernels.ScaleKernel(gp.kernels.RBFKernel())

            def forward(self, x: Tensor) -> Any:
                return gp.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

        self.features = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.process = Process()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances."""
        found = self.process(self.features(x))
        return found.mean, found.variance


class Kernel(nn.Module):
    """A kernel of gpytorch on a network's features, as a dense matrix."""

    def __init__(self) -> None:
        super().__init__()
        gp = named("importlib:import_module")("gpytorch")
        self.features = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.kernel = gp.kernels.ScaleKernel(gp.kernels.RBFKernel())

    def forward(self, x: Tensor) -> Tensor:
        """The covariance of the batch."""
        return self.kernel(self.features(x)).to_dense()


_EGNN = {"dim": WIDTH, "depth": 3, "num_tokens": 9, "num_nearest_neighbors": 3}

TABLE: dict[str, Row] = {
    "torch_geometric/gcn": row("torch_geometric.nn:GCN", *_GRAPH, **_LAYERS),
    "torch_geometric/gcn_dropout": row(
        "torch_geometric.nn:GCN", *_GRAPH, **_LAYERS, dropout=0.5, norm="batch_norm", jk="cat"),
    "torch_geometric/gat": row("torch_geometric.nn:GAT", *_GRAPH, **_LAYERS, heads=2),
    "torch_geometric/gin": row("torch_geometric.nn:GIN", *_GRAPH, **_LAYERS),
    "torch_geometric/sage": row("torch_geometric.nn:GraphSAGE", *_GRAPH, **_LAYERS),
    "torch_geometric/edge_cnn": row("torch_geometric.nn:EdgeCNN", *_GRAPH, **_LAYERS),
    "torch_geometric/pna": row(_pna, *_GRAPH),
    "torch_geometric/attentive_fp": row(
        "torch_geometric.nn:AttentiveFP", *_GRAPH, _flat(3, count=EDGES), _members, in_channels=8,
        hidden_channels=WIDTH, out_channels=3, edge_dim=3, num_layers=2, num_timesteps=2),
    "torch_geometric/graph_unet": row(
        "torch_geometric.nn:GraphUNet", *_GRAPH, _members, in_channels=8, hidden_channels=WIDTH,
        out_channels=3, depth=2),
    "torch_geometric/schnet": row(_schnet, _atoms, _flat(3), _members),
    "torch_geometric/pooled_graph": row(Pooled, *_GRAPH, _members, conv="GraphConv"),
    "torch_geometric/pooled_cheb": row(Pooled, *_GRAPH, _members, conv="ChebConv", K=2),
    "e3nn/points": row(_e3nn, _points),
    "e3nn/products": row(Equivariant, real(5), real(4)),
    "egnn_pytorch/network": row(
        "egnn_pytorch:EGNN_Network", ids(9, NODES), real(NODES, 3), **_EGNN),
    "se3_transformer_pytorch/transformer": row(_se3, real(NODES, 8), real(NODES, 3)),
    "neuraloperator/fno": row(
        "neuralop.models:FNO", real(1, 16, 16), n_modes=(4, 4), in_channels=1, out_channels=1,
        hidden_channels=8, n_layers=4),
    "neuraloperator/tfno": row(
        "neuralop.models:TFNO", real(1, 16, 16), n_modes=(4, 4), in_channels=1, out_channels=1,
        hidden_channels=8, n_layers=3, factorization="tucker", rank=0.5),
    "neuraloperator/uno": row(
        "neuralop.models:UNO", real(1, 16, 16), in_channels=1, out_channels=1, hidden_channels=8,
        lifting_channels=16, projection_channels=16, n_layers=3, uno_out_channels=[8, 8, 8],
        uno_n_modes=[[4, 4]] * 3, uno_scalings=[[1.0, 1.0]] * 3, channel_mlp_skip="linear"),
    "zuko/maf": row(Likelihood, real(4), make=_zuko("MAF", hidden_features=(16, 16))),
    "zuko/nsf": row(
        Likelihood, real(4), real(3), make=_zuko("NSF", context=3, hidden_features=(16, 16))),
    "zuko/nice": row(Likelihood, real(4), make=_zuko("NICE", hidden_features=(16, 16))),
    "zuko/naf": row(
        Likelihood, real(4),
        make=_zuko("NAF", hidden_features=(16, 16), signal=4, transforms=2)),
    "nflows/maf": row(Likelihood, real(4), make=_nflows("MaskedAutoregressiveFlow")),
    "nflows/real_nvp": row(Likelihood, real(4), make=_nflows("SimpleRealNVP")),
    "nflows/spline": row(Likelihood, real(4), make=_nflows_spline),
    "normflows/coupling": row(Likelihood, real(4), make=_normflows(False)),
    "normflows/spline": row(Likelihood, real(4), make=_normflows(True)),
    "snntorch/leaky": row(Spiking, unit(12), neuron="Leaky", beta=0.9),
    "snntorch/leaky_hidden": row(Spiking, unit(12), neuron="Leaky", beta=0.9, hidden_state=True),
    "snntorch/leaky_learned": row(
        Spiking, unit(12), neuron="Leaky", beta=0.9, learn_beta=True, learn_threshold=True),
    "snntorch/synaptic": row(Spiking, unit(12), neuron="Synaptic", alpha=0.8, beta=0.9),
    "spikingjelly/convolutions": row(Jelly, unit(3, 16, 16), deep=False),
    "spikingjelly/sew_resnet18": row(Jelly, unit(3, 32, 32), deep=True),
    "torchdiffeq/rk4": row(Differential, real(4), solve="odeint", method="rk4"),
    "torchdiffeq/dopri5": row(Differential, real(4), solve="odeint"),
    "torchdiffeq/adjoint": row(Differential, real(4), solve="odeint_adjoint", method="rk4"),
    "gpytorch/variational": row(Deep, real(4)),
    "gpytorch/kernel": row(Kernel, real(4)),
}  # fmt: skip
