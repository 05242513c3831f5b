"""What a model's code asks of tensors and gets as a plain value: a guard each, or an error."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...errors import DataDependentError, TracingError
from .held import GRAD, Reads
from .modules import Visits
from .prefixes import example_sizes, is_by_value, obstacle, run_prefix, sizes_behind
from .provenance import Provenance
from .symbols import Looks

DATA_QUERIES = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__",
    "is_nonzero", "equal", "allclose", "__contains__", "__array__", "__format__", "data_ptr",
    "_is_view", "_base", "_version",
}  # fmt: skip
_YES_OR_NO = {"__bool__", "is_nonzero", "equal", "allclose", "__contains__"}
_WHOLE_NUMBERS = {"item", "tolist", "__int__", "__index__"}
_PLAIN_ANSWERS = bool | int | float | complex | str | tuple | torch.dtype | torch.device
# facts that go with dtype, rank and device of what a value was computed from; with shapes and
# strides, too; and with whether gradients are asked for
_OF_KINDS = {
    "dim", "ndim", "ndimension", "dtype", "device", "layout", "is_floating_point", "is_complex",
    "is_signed", "element_size", "itemsize", "is_sparse", "is_cuda", "is_cpu", "is_meta", "is_mps",
    "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "get_device", "is_inference", "is_conj",
    "is_neg", "result_type", "can_cast", "promote_types", "is_tensor", "is_storage", "type",
    "is_sparse_csr", "names", "has_names", "__class__", "is_vulkan", "is_xla", "is_ipu", "is_maia",
}  # fmt: skip
_OF_SHAPES = {"is_same_size", "nbytes", "nelement", "is_contiguous", "stride", "storage_offset"}
OF_GRADIENTS = {"requires_grad", "is_leaf", "retains_grad", "grad_fn"}
_LIKE = {
    *(f"{n}_like" for n in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")),
    *(f"new_{n}" for n in ("zeros", "ones", "empty", "full", "tensor", "empty_strided")),
}
BY_KIND = _OF_KINDS | _OF_SHAPES | _LIKE  # what does not depend on the values of the operand
# where a tensor comes from; what a stage takes in is a view of a leaf of its own
_TENSOR: Any = torch.Tensor
HISTORY = {_TENSOR._is_view: "_is_view"} | {
    getattr(_TENSOR, name).__get__: name for name in ("_base", "is_leaf", "grad_fn")
}


class Questions:
    """Answers of one recording.

    Args:
        known: the graph, and the nodes of tensors.
        looks: takes the guards.
        visits: the modules on the way.
        reads: takes those that are no affair of tensors.
        inputs: the example's tensors, by placeholder.
    """

    def __init__(
        self,
        known: Provenance,
        looks: Looks,
        visits: Visits,
        reads: Reads,
        inputs: dict[fx.Node, torch.Tensor],
    ) -> None:
        self._known, self._looks, self._visits = known, looks, visits
        self._reads, self._inputs = reads, inputs

    def read_value(self, short: str, args: Any, kwargs: Any) -> Any:
        """Yes or no, read off the values of inputs: a guard, for which a part of the graph is run
        before each call. At the top level, which cannot be opaque, whole numbers likewise.
        """
        if short == "equal" and args[0] is args[1]:
            return True  # whatever it holds
        asked = short in _YES_OR_NO or (
            len(self._visits.stack) == 1
            and short in _WHOLE_NUMBERS
            and not (args[0].is_floating_point() or args[0].is_complex())
        )
        node = self._known.graph.call_method(short, *self._known.arguments(args, kwargs))
        node.meta["by_value"] = True
        if not asked or obstacle(node) is not None:
            self._known.graph.erase_node(node)
            raise DataDependentError(
                f"the model reads the values of a tensor (by '{short}') while it runs"
            )
        with unset_fake_temporarily(), self._reads.around():
            sizes = example_sizes(sizes_behind([node]))
            answer = run_prefix([node], self._known.attributes, self._inputs, sizes)[node]
        self._looks.guard(node, answer)
        return answer

    def check_history(self, function: Any, tensor: torch.Tensor) -> None:
        """A module that is called as a whole asks where a tensor comes from.

        Raises:
            TracingError: it was given to the module, and a stage would answer something else.
        """
        node = self._known.nodes.get(id(tensor))
        if node is None or node.op == "get_attr":
            return
        given = node.op == "placeholder" and tensor.requires_grad
        if given or HISTORY[function] in ("_is_view", "_base"):
            raise TracingError(
                f"the model asks a tensor for its history (by '{HISTORY[function]}'), which is "
                "another one where a stage begins"
            )

    def guard_identity(self, node: fx.Node, output: Any, args: Any, known: Any) -> None:
        """A function that gave back what it was given (``h.to(dtype)``): from here on both names
        lead to its node, which is right only where it does so again.
        """
        for value, origin in zip(args, known, strict=True):
            if value is not output or not isinstance(value, torch.Tensor):
                continue
            fixed = origin.op == "get_attr" or (origin.op == "placeholder" and node.target == "to")
            if not fixed and not is_by_value(node):
                same = node.graph.call_function(operator.is_, (node, origin))
                self._looks.guard(same, True)

    def answer(self, op: str, target: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """A plain value, told about tensors: the graph holds where it is the same."""
        if not isinstance(output, _PLAIN_ANSWERS):
            return output
        name = args[1] if target is getattr else getattr(target, "__name__", target)
        if name in OF_GRADIENTS:
            self._reads.mode(GRAD)
            return output
        nodes = [a for a in (*args, *kwargs.values()) if isinstance(a, fx.Node)]
        fixed = ("placeholder", "get_attr") if name in _OF_KINDS else ("get_attr",)
        if all(n.op in fixed for n in nodes):
            return output
        node = self._known.graph.create_node(op, target, args, kwargs)
        node.meta["by_value"] = name not in _OF_SHAPES and name not in _OF_KINDS
        if node.meta["by_value"] and (why := obstacle(node)) is not None:
            raise DataDependentError(
                f"the model reads a plain value off a tensor (by '{name}' of '{why.name}') while "
                "it runs"
            )
        self._looks.guard(node, output)
        return output
