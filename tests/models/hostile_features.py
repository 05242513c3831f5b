"""What makes a model hard to trace: some lines each, that a random program takes up.

In the text of a feature ``h`` is the value at hand, ``x`` the model's input as it came, ``arg$`` an
argument of its own, ``$`` the feature's number and ``?`` one of a few numbers. A change is made
between calls, to ``m``, the module that the feature stands in, or to what its file holds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """Lines of a model.

    Attributes:
        name: for people.
        lines: in ``forward``.
        init: in ``__init__``.
        helpers: beside the class.
        body: in the class.
        changes: statements, one of which is run between two calls.
        argument: an expression for an argument, made for every call; ``n`` is the batch.
        place: ``"any"``, ``"top"`` or ``"block"``: where it may stand.
        loss: an expression of ``m`` that the training loss adds.
        rare: whether it is refused nearly always, and so seldom taken up.
    """

    name: str
    lines: str
    init: str = ""
    helpers: str = ""
    body: str = ""
    changes: tuple[str, ...] = ()
    argument: str = ""
    place: str = "any"
    loss: str = ""
    rare: bool = False


def _attribute(name: str, value: str, lines: str, *changes: str, **more: str) -> Feature:
    return Feature(name, lines, init=f"self.at$ = {value}", changes=changes, **more)


_SET = "m.at$ = ?"

ATTRIBUTES = (
    _attribute("number", "1.0", "h = h * self.at$", _SET),
    _attribute("number compared", "1.0", "h = h * 2 if self.at$ > 1 else h", _SET),
    _attribute("rate", "0.5", "h = F.dropout(h, min(self.at$ / 4, 0.9))", _SET),
    _attribute("count", "1", "for _ in range(self.at$):\n    h = h + 0.5", "m.at$ = int(?)"),
    _attribute("text", "'a'", "h = h.tanh() if self.at$ == 'a' else h - 1", "m.at$ = 'ab'[? > 1]"),
    _attribute(
        "object",
        "types.SimpleNamespace(inner={'k': [1.0]})",
        "h = h * self.at$.inner['k'][0]",
        "m.at$.inner['k'][0] = ?",
        "m.at$ = types.SimpleNamespace(inner={'k': [?]})",
    ),
    _attribute(
        "object with slots",
        "Slots$(1.0)",
        "h = h * self.at$.value",
        "m.at$.value = ?",
        helpers="class Slots$:\n    __slots__ = ('value',)\n"
        "    def __init__(self, value):\n        self.value = value",
    ),
    _attribute("array", "numpy.ones(1)", "h = h * float(self.at$[0])", "m.at$[0] = ?"),
    _attribute("tensor", "torch.ones(1)", "h = h * self.at$", "m.at$ = torch.full((1,), ?)",
               "m.at$.fill_(?)", "m.at$ = torch.full((1, 1), ?)", "m.at$ = torch.tensor(?)",
               "m.at$ = torch.tensor(?, dtype=torch.float64)"),
    _attribute("tensors in a list", "[torch.ones(1)]", "h = h * self.at$[0]",
               "m.at$[0] = torch.full((1,), ?)", "m.at$[0].fill_(?)"),
    _attribute("tensors in a dict", "{'k': torch.ones(1)}", "h = h * self.at$['k']",
               "m.at$['k'] = torch.full((1,), ?)", "m.at$ = {'k': torch.full((1,), ?)}"),
    _attribute("partial", "functools.partial(torch.mul, other=1.0)", "h = self.at$(h)",
               "m.at$ = functools.partial(torch.mul, other=?)"),
    _attribute("partial in place", "functools.partial(scaled$, by=1.0)", "h = self.at$(h)",
               "m.at$.keywords['by'] = ?",
               helpers="def scaled$(h, by):\n    return h * by"),
    _attribute("partials in a list", "[functools.partial(torch.mul, other=1.0) for _ in range(2)]",
               "h = self.at$[1](self.at$[0](h))",
               "m.at$[1] = functools.partial(torch.mul, other=?)"),
    _attribute("one list twice", "[[1.0], [2.0], [1.0]]",
               "h = h * self.at$[2][0]", "m.at$[2] = m.at$[? > 1]", "m.at$[1][0] = ?"),
    _attribute("function", "lambda h: h * 1.0", "h = self.at$(h)", "m.at$ = lambda h: h * ?"),
    _attribute("closure", "closure$()", "h = self.at$[0](h)", "m.at$[1](?)",
               helpers="def closure$():\n    by = 1.0\n    def use(h):\n        return h * by\n"
               "    def change(value):\n        nonlocal by\n        by = value\n"
               "    return use, change"),
    _attribute("property", "1.0", "h = h * self.doubled$", _SET,
               body="@property\ndef doubled$(self):\n    return self.at$ * 2"),
    _attribute("of the class", "0", "h = h * self.factor$", "type(m).factor$ = ?",
               body="factor$ = 1.0"),
    _attribute("added later", "0", "h = h * getattr(self, 'extra$', 1.0)",
               "m.extra$ = ?", "vars(m).pop('extra$', None)"),
    _attribute("asked for", "0", "if hasattr(self, 'extra$'):\n    h = h * 2", "m.extra$ = 1",
               "vars(m).pop('extra$', None)"),
    _attribute("table", "1.0", "h = h * vars(self)['at$']", _SET),
    _attribute("by name", "1.0", "h = h * getattr(self, 'a' + 't$')", _SET),
    Feature("buffer or none", "if self.buf$ is not None:\n    h = h * self.buf$",
            init="self.register_buffer('buf$', None)",
            changes=("m.buf$ = torch.full((1,), ?)", "m.buf$ = None")),
    Feature("parameter frozen", "h = h * self.p$ if self.p$.requires_grad else h + self.p$",
            init="self.p$ = nn.Parameter(torch.ones(1))",
            changes=("m.p$.requires_grad_(? > 1)",)),
    Feature("parameter replaced", "h = h * self.p$",
            init="self.p$ = nn.Parameter(torch.ones(1))",
            changes=("m.p$ = nn.Parameter(torch.full((1,), ?))", "m.p$.data.fill_(?)",
                     "m.p$.data = torch.full((1,), ?)")),
)  # fmt: skip

MODULES = (
    Feature("mode of a child", "h = F.dropout(h, self.d$.p, self.d$.training)",
            init="self.d$ = nn.Dropout(0.5)",
            changes=("m.d$.eval()", "m.d$.train()", "m.d$.p = 0.25")),
    Feature("child exchanged", "h = self.c$(h)", init="self.c$ = nn.Tanh()",
            changes=("m.c$ = nn.Sigmoid()", "m.c$ = nn.Tanh()", "m.c$ = Half$()"),
            helpers="class Half$(nn.Module):\n    def forward(self, h):\n        return h / 2"),
    Feature("children added", "for layer in self.c$:\n    h = layer(h)",
            init="self.c$ = nn.ModuleList([nn.Tanh()])",
            changes=("m.c$.append(nn.Sigmoid())", "m.c$[0] = nn.Sigmoid()",
                     "del m.c$[1:]")),
    Feature("sequence grows", "h = self.c$(h)", init="self.c$ = nn.Sequential(nn.Tanh())",
            changes=("m.c$.append(nn.Sigmoid())", "m.c$[0] = nn.Hardtanh()")),
    Feature("number of children", "h = h * len(self.c$)",
            init="self.c$ = nn.ModuleList([nn.Tanh()])", changes=("m.c$.append(nn.Tanh())",)),
    Feature("hook", "h = self.c$(h)", init="self.c$ = Inner$()",
            helpers="class Inner$(nn.Module):\n    def forward(self, h):\n        return h.tanh()",
            changes=("m.hook$ = m.c$.register_forward_hook(lambda m, a, o: o * ?)",
                     "m.c$._forward_hooks.clear()",
                     "m.c$.register_forward_pre_hook(lambda m, a: (a[0] * ?,))",
                     "m.c$.register_full_backward_hook(lambda m, i, o: (i[0] * ?,))",
                     "m.c$.forward = lambda h: h * ?", "vars(m.c$).pop('forward', None)")),
    Feature("hook on a leaf", "h = self.c$(h)", init="self.c$ = nn.Tanh()",
            changes=("m.c$.register_forward_hook(lambda m, a, o: o * ?)",
                     "m.c$._forward_hooks.clear()",
                     "m.c$.forward = lambda h: h * ?", "vars(m.c$).pop('forward', None)")),
    Feature("method exchanged", "h = self.change$(h)",
            body="def change$(self, h):\n    return h * 2",
            changes=("m.change$ = lambda h: h - ?", "vars(m).pop('change$', None)",
                     "type(m).change$ = lambda self, h: h + ?")),
    Feature("class exchanged", "h = self.c$(h)", init="self.c$ = One$()",
            helpers="class One$(nn.Module):\n    def forward(self, h):\n        return h * 2\n"
            "class Two$(One$):\n    def forward(self, h):\n        return h * 3",
            changes=("m.c$.__class__ = Two$", "m.c$.__class__ = One$")),
    Feature("forward of the class", "h = self.c$(h)", init="self.c$ = One$()",
            helpers="class One$(nn.Module):\n    def forward(self, h):\n        return h * 2",
            changes=("One$.forward = lambda self, h: h * ?",)),
)  # fmt: skip

GLOBALS = (
    Feature("global", "h = h * G$", helpers="G$ = 1.0", changes=("G$ = ?",)),
    Feature("global in a method", "h = self.change$(h)", helpers="G$ = 1.0", changes=("G$ = ?",),
            body="def change$(self, h):\n    return h * G$"),
    Feature("global in helpers", "h = outer$(h)", changes=("G$['k'] = ?",),
            helpers="G$ = {'k': 1.0}\ndef inner$(h):\n    return h * G$['k']\n"
            "def outer$(h):\n    return inner$(h)"),
    Feature("global object", "h = h * G$.k", helpers="G$ = types.SimpleNamespace(k=1.0)",
            changes=("G$.k = ?", "G$ = types.SimpleNamespace(k=?)")),
    Feature("global class", "h = h * G$.k", helpers="class G$:\n    k = 1.0",
            changes=("G$.k = ?",)),
    Feature("global helper object", "h = G$.use(h)", changes=("G$.k = ?",),
            helpers="class Helper$:\n    k = 1.0\n    def use(self, h):\n"
            "        return h * self.k\nG$ = Helper$()"),
    Feature("static method", "h = Helper$.use(h)", changes=("G$ = ?",),
            helpers="G$ = 1.0\nclass Helper$:\n    @staticmethod\n    def use(h):\n"
            "        return h * G$"),
    Feature("global function", "h = use$(h)", helpers="def use$(h):\n    return h * 1.0",
            changes=("use$ = lambda h: h * ?",)),
    Feature("global function attribute", "h = use$(h)", changes=("use$.k = ?",),
            helpers="def use$(h):\n    return h * use$.k\nuse$.k = 1.0"),
    Feature("global default", "h = use$(h)", changes=("use$.__defaults__ = (?,)",),
            helpers="def use$(h, by=1.0):\n    return h * by"),
    Feature("global tensor", "h = h * G$", helpers="G$ = torch.ones(1)",
            changes=("G$ = torch.full((1,), ?)", "G$.fill_(?)")),
    Feature("module of settings", "h = h * G$.k", changes=("G$.k = ?",),
            helpers="G$ = types.ModuleType('settings')\nG$.k = 1.0"),
    Feature("module of functions", "h = G$.use(h)", changes=("G$.use = lambda h: h * ?",),
            helpers="G$ = types.ModuleType('functions')\nG$.use = lambda h: h * 1.0"),
    Feature("context variable", "h = h * V$.get()",
            helpers="V$ = contextvars.ContextVar('V$', default=1.0)", changes=("V$.set(?)",)),
    Feature("environment", "h = h * float(os.environ.get('HOSTILE$', '1.0'))",
            changes=("os.environ['HOSTILE$'] = '?'", "os.environ.pop('HOSTILE$', None)")),
    Feature("environment by a function", "h = h * 2 if os.getenv('HOSTILE$') == '2.0' else h",
            changes=("os.environ['HOSTILE$'] = '?'",)),
    Feature("of a thread", "h = h * L$.k", helpers="L$ = threading.local()\nL$.k = 1.0",
            changes=("L$.k = ?",)),
    Feature("decorated", "h = use$(h)", changes=("G$ = ?",),
            helpers="G$ = 1.0\ndef deco$(f):\n    @functools.wraps(f)\n    def call(h):\n"
            "        return f(h) + G$\n    return call\n@deco$\ndef use$(h):\n    return h * G$"),
    Feature("global in a block of its own", "h = [G$ * h for _ in range(2)][1]",
            helpers="G$ = 1.0", changes=("G$ = ?",)),
    Feature("comparing a global list", "h = h * 2 if 2.0 in G$ else h", helpers="G$ = [1.0]",
            changes=("G$[0] = ?",)),
)  # fmt: skip

ALL = (*ATTRIBUTES, *MODULES, *GLOBALS)
