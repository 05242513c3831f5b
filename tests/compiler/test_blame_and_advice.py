"""What a tracer cannot follow is one node where that helps, else an error that says where it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, distributions, nn

import dni_fx
from dni_fx.errors import CutError, DecouplingError, PlanMismatchError
from dni_fx.graphs import blame, pipeline
from dni_fx.passes.trace import recorder, routing

from ..helpers.comparing import assert_bits_equal


def grads_of(model: nn.Module, called: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Output, gradients and buffers of one training call."""
    model.zero_grad()
    torch.manual_seed(3)
    output = called(*args)
    leaves = output if isinstance(output, tuple) else (output,)
    tensors = [t.to_dense() for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    sum(t.square().sum() for t in tensors).backward()  # type: ignore[union-attr]
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.to_dense().clone() for n, b in model.named_buffers()}
    return {"output": [t.to_dense() for t in leaves if isinstance(t, Tensor)], **found, **buffers}


def decoupled_alike(model: nn.Module, cuts: Any, *args: Any) -> tuple[dni_fx.Decoupled, str]:
    """Decouples, compares a training call on other values, and gives the plan's notes."""
    decoupled = dni_fx.decouple(model, cuts, example_inputs=args, gradients="exact")
    other = tuple(torch.randn_like(a) if a.is_floating_point() else a for a in args)
    before = [(b, b.clone()) for b in model.buffers()]
    expected = grads_of(model, model, other)
    for buffer, content in before:
        buffer.copy_(content)
    assert_bits_equal(grads_of(model, decoupled, other), expected, "training call")
    return decoupled, "\n".join(decoupled.plan.report.notes)


# ---- what does something to gradients or buffers that no graph shows -----------------------------


class Hooked(nn.Module):
    """Halves a gradient on its way back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if h.requires_grad:
            h.register_hook(lambda g: g * 0.5)
        result: Tensor = self.b(h)
        return result


class Checkpointed(nn.Module):
    """Batch norm counts twice: its block is run again for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.utils.checkpoint.checkpoint(self.n, x, use_reentrant=False)
        return result


class Saved(nn.Module):
    """Keeps what its backward needs in half the bits."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(Tensor.bfloat16, Tensor.float):
            return torch.tanh(self.a(x)).exp()


class Graded(nn.Module):
    """A hook at a node of autograd's, which is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.grad_fn is not None:
            h.grad_fn.register_prehook(lambda g: (g[0] * 0.25,))
        return torch.tanh(h)


class Shy(nn.Module):
    """Computes something else while it is watched, in a way that no guard can see."""

    def __init__(self, what: str = "output") -> None:
        super().__init__()
        self.a, self.what = nn.Linear(6, 6), what

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.a(x)
        if not torch.overrides._get_current_function_mode_stack():
            h = h * 2 if self.what == "output" else h + h.detach() - h * 0.5
        return torch.tanh(h)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "hook": Hooked,
    "checkpoint": Checkpointed,
    "saved": Saved,
    "node hook": Graded,
    "output": Shy,
    "gradient": lambda: Shy("gradient"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_submodule_that_does_more_than_it_shows_stays_one_node(kind: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), KINDS[kind](), nn.Linear(6, 3))
    decoupled, notes = decoupled_alike(model, ["0", "1"], torch.randn(4, 6))
    assert "'1' is one opaque node" in notes
    assert f"{__file__}:" in notes
    assert decoupled.plan.report.rung != "export"
    inner = "1.n.0" if kind == "checkpoint" else "1.a"
    with pytest.raises(CutError, match="lies in '1', which is one opaque node"):
        dni_fx.decouple(model, [inner], example_inputs=(torch.randn(4, 6),))


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_top_level_the_error_says_where(kind: str) -> None:
    if kind == "checkpoint":  # a checkpointed submodule can be the one node
        return
    model = KINDS[kind]()
    code = type(model).forward.__code__
    lines = range(code.co_firstlineno, code.co_firstlineno + 8)
    with pytest.raises(DecouplingError) as caught:
        dni_fx.decouple(model, ["a"], example_inputs=(torch.randn(4, 6),))
    assert any(f"{__file__}:{line}" in str(caught.value) for line in lines)
    assert type(model).__name__ in str(caught.value)


def test_the_innermost_culprits_are_found_wherever_they_are() -> None:
    def block(*inner: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), *inner, nn.Tanh())

    clean = [block(block(block())) for _ in range(3)]
    model = nn.Sequential(
        *clean, block(block(Shy()), block()), block(block(block(Shy("gradient")))), nn.Linear(6, 3)
    )
    x = torch.randn(4, 6)
    decoupled, notes = decoupled_alike(model, ["1.1", "3", "4.0"], x)
    opaque = re.findall(r"^'([\w.]+)' is one opaque node", notes, re.MULTILINE)
    assert opaque == ["3.1.1", "4.1.1.1"]
    decoupled = dni_fx.decouple(model, decoupled.plan, example_inputs=(x,))  # its plan is followed
    assert "'3.1.1' is one opaque node" in "\n".join(decoupled.plan.report.notes)
    plan = dni_fx.plan_cuts(model, (x,), cuts=["1.1", "4.0"])  # made without a check
    decoupled = dni_fx.decouple(model, plan, example_inputs=(x,))
    assert decoupled.plan.cuts == plan.cuts


def test_trials_end_and_what_is_still_closed_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "_MOST_TRIALS", 3)
    inner = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Shy(), nn.Linear(6, 6)))
    model = nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 3))
    _, notes = decoupled_alike(model, ["0"], torch.randn(4, 6))
    assert re.search(r"'1[.\d]*' is one opaque node", notes)


def test_without_blame_such_a_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the self-check alone."""
    monkeypatch.setattr(pipeline, "find_culprits", lambda *_: None)
    model = nn.Sequential(nn.Linear(6, 6), Shy(), nn.Linear(6, 3))
    with pytest.raises(DecouplingError, match="the traced model is not the model"):
        dni_fx.decouple(model, ["0"], example_inputs=(torch.randn(4, 6),))


def test_hooks_are_seen_where_the_self_check_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that clips only large gradients; the control switches the guard off."""

    class Clipped(Hooked):
        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.a(x)
            h.register_hook(lambda g: g.clamp(-1e3, 1e3))
            return h

    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 6), Clipped(), nn.Linear(6, 3))
    decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), gradients="exact")
    found = []
    for called in (model, decoupled):
        model.zero_grad()
        (called(x).sum() * 1e6).backward()
        found.append(model[0].weight.grad.clone())
    assert_bits_equal(found[1], found[0], "clipped")
    monkeypatch.setattr(recorder, "GRADIENT_HOOKS", set())
    decoupled = dni_fx.decouple(model, ["0"], example_inputs=(x,), gradients="exact")
    model.zero_grad()
    (decoupled(x).sum() * 1e6).backward()
    assert not torch.equal(model[0].weight.grad, found[0])


# ---- models whose backward exists in one mode only -----------------------------------------------


class Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.recorded = module.training
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if not ctx.recorded:
            raise TypeError("no state was recorded")
        return gradient * 2, None


class Reversible(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Recorded.apply(x, self)
        return result


class InTraining(nn.Module):
    """Asserts in evaluation instead, deeper down."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone() if self.training else Recorded.apply(x, self) * 1.0


@pytest.mark.parametrize("block", [Reversible, InTraining])
def test_gradients_that_evaluation_lacks_are_not_compared(block: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), block(), nn.Linear(6, 6), nn.Linear(6, 3))
    decoupled, notes = decoupled_alike(model, ["0", "2"], torch.randn(4, 6))
    assert "in evaluation mode the model's own backward fails" in notes
    assert "no state was recorded" in notes
    model.eval()
    x = torch.randn(5, 6)
    assert_bits_equal(decoupled(x), model(x), "evaluation")


def test_outputs_are_compared_where_gradients_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a wrong graph of evaluation is still found."""
    model = nn.Sequential(nn.Linear(6, 6), Reversible(), nn.Linear(6, 3))
    call = pipeline.call_stages

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) + (0 if model.training else 1)

    monkeypatch.setattr(pipeline, "call_stages", wrong)
    with pytest.raises(DecouplingError, match="output 0: differs by 1"):
        dni_fx.decouple(model, ["0"], example_inputs=(torch.randn(4, 6),))


def test_a_backward_that_training_lacks_is_the_models_own_fault() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Reversible(), nn.Linear(6, 3)).eval()
    with pytest.raises(DecouplingError, match="own backward fails: TypeError: no state") as caught:
        dni_fx.decouple(model, ["0"], example_inputs=(torch.randn(4, 6),))
    assert f"{__file__}:" in str(caught.value)


# ---- sparse values, distributions, lists of varying length ---------------------------------------


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}


class Convolved(nn.Module):
    """A graph convolution; its own part returns a sparse tensor and reads values if asked to."""

    def __init__(self, adjacency: Tensor, reads: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.reads = nn.Linear(6, 6), nn.Linear(6, 3), reads
        self.register_buffer("adjacency", adjacency)
        self.weigh = Weighed(reads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(torch.sparse.mm(self.adjacency, self.a(x)))
        weights = self.weigh(h)
        return self.b(torch.sparse.mm(weights, h)), weights


class Weighed(nn.Module):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.scale, self.reads = nn.Parameter(torch.ones(1)), reads

    def forward(self, h: Tensor) -> Tensor:
        i = torch.arange(len(h))
        values = h.sum(1) * self.scale
        if self.reads and values.sum().item() < -1e9:
            values = values * 0
        return torch.sparse_coo_tensor(torch.stack([i, i]), values, (len(h), len(h)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reads", [False, True], ids=["looked into", "opaque"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_buffers_values_and_outputs(layout: str, reads: bool) -> None:
    model = Convolved(LAYOUTS[layout](torch.eye(4)), reads)
    _, notes = decoupled_alike(model, ["a"], torch.randn(4, 6))
    assert ("'weigh' is one opaque node" in notes) == reads
    with pytest.raises(CutError, match=r"'weigh': '[a-z_]+' is sparse"):
        dni_fx.decouple(model, ["weigh"], example_inputs=(torch.randn(4, 6),))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_every_place_that_is_said_to_be_legal_trains() -> None:
    x = torch.randn(4, 6)
    legal = [
        p.name for p in dni_fx.list_cut_points(Convolved(torch.eye(4).to_sparse()), (x,)) if p.legal
    ]
    assert legal == ["a", "_sparse_mm", "relu", "sum_1", "mul"]
    for name in legal:
        model = Convolved(torch.eye(4).to_sparse())
        decoupled = dni_fx.decouple(model, [name], example_inputs=(x,), gradients="exact")
        assert_bits_equal(grads_of(model, decoupled, (x,)), grads_of(model, model, (x,)), name)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_difference_in_a_sparse_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    call = pipeline.call_stages

    def wrong(*args: Any, **kwargs: Any) -> Any:
        output, weights = call(*args, **kwargs)
        return output, weights * 1.01

    monkeypatch.setattr(pipeline, "call_stages", wrong)
    with pytest.raises(DecouplingError, match="output 1: differs by"):
        dni_fx.decouple(
            Convolved(torch.eye(4).to_sparse()), ["a"], example_inputs=(torch.randn(4, 6),)
        )


POLICIES: dict[str, Callable[[Tensor, Tensor], distributions.Distribution]] = {
    "categorical": lambda h, s: distributions.Categorical(logits=h),
    "normal": lambda h, s: distributions.Independent(distributions.Normal(h, s.exp()), 1),
    "beta": lambda h, s: distributions.Beta(h.exp() + 1, s.exp() + 1),
    "gaussian": lambda h, s: distributions.MultivariateNormal(
        h, torch.diag_embed(s.exp().expand_as(h))
    ),
}


class Policy(nn.Module):
    def __init__(self, kind: str, checked: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.s = nn.Linear(6, 6), nn.Linear(6, 3), nn.Parameter(torch.zeros(3))
        self.kind, self.checked = kind, checked

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.checked:
            distributions.Normal(self.b(x), self.s.exp(), validate_args=True)
        policy = POLICIES[self.kind](self.b(torch.tanh(self.a(x))), self.s)
        action = policy.rsample() if policy.has_rsample else policy.sample()
        return action, policy.log_prob(action), policy.entropy()


class Acts(nn.Module):
    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.pre, self.policy = nn.Linear(6, 6), policy

    def forward(self, x: Tensor) -> Any:
        return self.policy(torch.tanh(self.pre(x)))


@pytest.mark.parametrize("kind", POLICIES)
def test_policies_check_their_arguments_outside_of_tracing_only(kind: str) -> None:
    decoupled_alike(Policy(kind), ["a"], torch.randn(4, 6))
    decoupled_alike(Acts(Policy(kind)), ["pre", "policy.a"], torch.randn(4, 6))
    _, notes = decoupled_alike(Acts(Policy(kind, checked=True)), ["pre"], torch.randn(4, 6))
    assert "'policy' is one opaque node" in notes
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        distributions.Normal(torch.zeros(1), -torch.ones(1))


def test_policies_that_check_their_arguments_cannot_be_looked_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: with the checks left on."""
    monkeypatch.setattr(routing, "unvalidated", torch.enable_grad)
    with pytest.raises(DecouplingError, match="reads the values of a tensor"):
        dni_fx.decouple(Policy("normal"), ["a"], example_inputs=(torch.randn(4, 6),))


class Detects(nn.Module):
    """Returns as many tensors as it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, h: Tensor) -> list[Tensor]:
        h = self.layer(h)
        return [row for row in h if row.sum().item() > 0] + [h[0]]


class Merges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.find, self.head = Detects(), nn.Linear(6, 3)

    def forward(self, h: Tensor) -> Tensor:
        result: Tensor = self.head(torch.stack(self.find(h)).sum(0))
        return result


def test_lists_of_varying_length() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Merges())
    decoupled, notes = decoupled_alike(model, ["0"], torch.randn(4, 6))
    assert "'1' is one opaque node: '1.find' returns a list" in notes
    for _ in range(6):
        x = torch.randn(4, 6)
        assert_bits_equal(decoupled(x), model(x), "another length")


def test_at_the_top_level_another_length_is_an_error_that_names_the_module() -> None:
    torch.manual_seed(0)
    model, x = Merges(), torch.randn(4, 6)
    decoupled = dni_fx.decouple(model, ["find"], example_inputs=(x,))
    counts = set()
    for _ in range(8):
        x = torch.randn(4, 6)
        try:
            assert_bits_equal(decoupled(x), model(x), "the same length")
            counts.add("same")
        except PlanMismatchError as error:
            assert "'find' returns" in str(error)  # noqa: PT017
            counts.add("other")
    assert counts == {"same", "other"}
