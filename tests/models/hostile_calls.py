"""What makes a model hard to trace in its calls: modes, sizes, values, arguments, what it keeps."""

from __future__ import annotations

from .hostile_features import Feature

MODES = (
    Feature("training", "h = h * 2 if self.training else h"),
    Feature("grad mode", "h = h * 2 if torch.is_grad_enabled() else h"),
    Feature("grad mode by a name", "h = h * 2 if is_grad_enabled() else h",
            helpers="from torch import is_grad_enabled"),
    Feature("requires grad", "h = h * 2 if h.requires_grad else h + 1"),
    Feature("input requires grad", "h = h * 2 if x.requires_grad else h + 1"),
    Feature("view", "h = h * 2 if x._is_view() else h + 1", rare=True),
    Feature("view of a value", "h = h * 2 if h._is_view() else h + 1", rare=True),
    Feature("leaf", "h = h * 2 if x.is_leaf else h + 1"),
    Feature("grad function", "h = h * 2 if h.grad_fn is None else h + 1"),
    Feature("autocast", "h = h * 2 if torch.is_autocast_enabled('cpu') else h + 1"),
    Feature("autocast dtype", "h = h.to(torch.get_autocast_dtype('cpu')).to(h.dtype)"),
    Feature("dtype", "h = h * 2 if h.dtype is torch.bfloat16 else h + 1"),
    Feature("input dtype", "h = h * 2 if x.dtype is torch.float64 else h + 1"),
    Feature("kind", "h = h * 2 if x.is_floating_point() else h + 1"),
    Feature("precision", "h = h + torch.finfo(h.dtype).eps * 1e3"),
    Feature("default dtype", "h = h * torch.ones(1).element_size()"),
    Feature("no grad", "with torch.no_grad():\n    k = h.tanh()\nh = h + k"),
    Feature("own autocast", "with torch.autocast('cpu', torch.bfloat16, self.training):\n"
            "    k = F.linear(h, torch.ones(2, h.shape[-1], dtype=h.dtype))\nh = h + k.sum()"),
    Feature("no autocast", "with torch.autocast('cpu', enabled=False):\n"
            "    k = h.float() @ torch.ones(h.shape[-1], 1)\nh = h + k"),
)  # fmt: skip

SIZES = (
    Feature("size", "h = h * 2 if x.shape[0] > 3 else h"),
    Feature("size as text", "h = h * len(str(x.shape[0] * 5))"),
    Feature("shape as text", "h = h * (2 if '(4' in str(x.shape) else 1)"),
    Feature("size in a key", "h = h * {'n4': 2.0}.get(f'n{x.shape[0]}', 1.0)"),
    Feature("size in a set", "h = h * 2 if x.shape[0] in {3, 4} else h"),
    Feature("size divided", "h = h / x.size(0)"),
    Feature("root of a size", "h = h / math.sqrt(h.shape[-1] * x.shape[0])"),
    Feature("size as a number", "h = h * torch.tensor(float(x.shape[0]))"),
    Feature("loop over a batch", "h = torch.stack([row * i for i, row in enumerate(h)])"),
    Feature("loop over a size", "for i in range(len(x)):\n    h = h + i"),
    Feature("elements", "h = h + x.numel() % 3"),
    Feature("shapes compared", "h = h * 2 if x.shape == torch.Size([3, 4]) else h"),
    Feature("unpacked", "n, *rest = h.shape\nh = h.reshape(n, -1).reshape(n, *rest) * n"),
    Feature("largest size", "h = h * max(x.shape[0], 3)"),
    Feature("sum of sizes", "h = h * sum(x.shape)"),
    Feature("cached by size", "h = h * factor$(x.shape[0])",
            helpers="@functools.lru_cache\ndef factor$(n):\n    return n + 0.5"),
    Feature("cached by shape", "if x.shape not in C$:\n    C$[x.shape] = sum(x.shape) * 0.5\n"
            "h = h * C$[x.shape]", helpers="C$ = {}"),
    Feature("kept by size", "if x.shape[0] not in self.cache$:\n"
            "    self.cache$[x.shape[0]] = torch.arange(x.shape[0]).float()\n"
            "h = h + self.cache$[x.shape[0]].sum()", init="self.cache$ = {}"),
    Feature("contiguous", "h = h if x.is_contiguous() else h * 2"),
    Feature("stride", "h = h * (x.stride(0) + 1)"),
    Feature("strides", "h = h * 2 if x.stride() == (4, 1) else h"),
    Feature("offset", "h = h * (x.storage_offset() + 1)"),
    Feature("computed strides", "h = h * 2 if h.is_contiguous() else h + 1"),
    Feature("strides of a copy", "h = h * (x.clone().stride(0) + 1)"),
    Feature("as strided", "h = h + torch.as_strided(x.float(), (1,), (1,)).sum()"),
)  # fmt: skip

_MASK = "torch.rand(n, 1) > ? / 4"
_LENGTHS = "torch.randint(1, 4, (n,))"

VALUES = (
    Feature("all", "h = h if arg$.all() else h * arg$ - 1", argument=_MASK),
    Feature("any", "h = h + 1 if bool(arg$.any()) else h", argument=_MASK),
    Feature("count", "h = h * (2 if arg$.sum() > 2 else 1)", argument=_MASK),
    Feature("item", "h = h * arg$.max().item()", argument=_LENGTHS),
    Feature("whole number", "h = h * int(arg$.max())", argument=_LENGTHS),
    Feature("list", "h = h * sum(arg$.tolist())", argument=_LENGTHS),
    Feature("range", "for _ in range(arg$.max()):\n    h = h + 1", argument=_LENGTHS),
    Feature("equal", "h = h * 2 if torch.equal(arg$, arg$.sort()[0]) else h", argument=_LENGTHS),
    Feature("nonzero", "h = h * arg$.nonzero().shape[0]", argument=_MASK),
    Feature("masked", "h = h + h[arg$[:, 0]].sum()", argument=_MASK),
    Feature("selected", "k = h[arg$[:, 0]]\nh = h + k.sum() if len(k) else h", argument=_MASK),
    Feature("unique", "h = h * arg$.unique().numel()", argument=_LENGTHS),
    Feature("where", "h = h + len(torch.where(arg$)[0])", argument=_MASK),
    Feature("float of the input", "h = h * 2 if x.sum() > 0 else h"),
    Feature("float of a value", "h = h * 2 if h.sum() > 0 else h", place="block"),
    Feature("float of a value at the top", "h = h * 2 if h.sum() > 0 else h", place="top",
            rare=True),
    Feature("value of a parameter", "h = h * 2 if self.w$ > 1.5 else h",
            init="self.w$ = nn.Parameter(torch.ones(()))", changes=("m.w$.data.fill_(?)",)),
    Feature("value of a buffer", "h = h * 2 if self.w$ > 1.5 else h",
            init="self.register_buffer('w$', torch.ones(()))",
            changes=("m.w$.fill_(?)", "m.w$ = torch.tensor(?)")),
    Feature("value of an attribute", "h = h * 2 if self.w$ > 1.5 else h",
            init="self.w$ = torch.ones(())", changes=("m.w$.fill_(?)", "m.w$ = torch.tensor(?)")),
    Feature("value of a global", "h = h * 2 if W$ > 1.5 else h", helpers="W$ = torch.ones(())",
            changes=("W$.fill_(?)", "W$ = torch.tensor(?)")),
    Feature("text of a value", "h = h * len(str(arg$.tolist()))", argument=_LENGTHS),
    Feature("array", "h = h * float(arg$.numpy().sum())", argument=_LENGTHS),
)  # fmt: skip

ARGUMENTS = (
    Feature("number given", "h = h * arg$", argument="?"),
    Feature("flag given", "h = h * 2 if arg$ else h", argument="? > 1"),
    Feature("text given", "h = h * len(arg$)", argument="'ab' if ? > 1 else 'abc'"),
    Feature("object given", "h = h * arg$.k", argument="types.SimpleNamespace(k=?)"),
    Feature("object of slots given", "h = h * arg$.k", argument="Slots$(?)",
            helpers="class Slots$:\n    __slots__ = ('k',)\n"
            "    def __init__(self, k):\n        self.k = k"),
    Feature("dict given", "h = h * arg$['k'] if 'k' in arg$ else h + arg$['t']",
            argument="{'k': ?} if ? > 1 else {'t': torch.ones(1)}"),
    Feature("list given", "h = h + sum(arg$)", argument="[torch.ones(1)] * int(? + 1)"),
    Feature("tensor or none", "h = h if arg$ is None else h * arg$",
            argument="None if ? > 1 else torch.ones(1)"),
    Feature("dict that is read by keys", "for k in arg$:\n    h = h * arg$[k] + len(k)",
            argument="{'a': torch.ones(1), 'class': torch.ones(1)}"),
    Feature("mapping given", "h = h * arg$['k']", argument="collections.UserDict(k=torch.ones(1))"),
    Feature("one tensor twice", "h = h * 2 if arg$ is x else h + arg$.float().sum()",
            argument="x if ? > 1 else x.clone()"),
    Feature("generator given", "h = h + torch.rand(1, generator=arg$)",
            argument="torch.Generator().manual_seed(int(? * 4))"),
    Feature("sparse given", "h = h + torch.sparse.mm(arg$, torch.ones(arg$.shape[1], 1)).sum()",
            argument="(torch.rand(n, 3) > ? / 4).float().to_sparse()"),
    Feature("stored values", "h = h / (arg$._nnz() + 1)",
            argument="(torch.rand(n, 3) > ? / 4).float().to_sparse()"),
    Feature("packed given", "h = h + arg$.data.sum() + arg$.batch_sizes[0]",
            argument="nn.utils.rnn.pack_sequence([torch.ones(k, 1) for k in (3, 2, 1)])"),
    Feature("function given", "h = arg$(h)", argument="torch.tanh if ? > 1 else torch.sigmoid"),
    Feature("argument written", "arg$.add_(1)\nh = h * arg$", argument="torch.ones(1)"),
    Feature("list filled", "arg$.append(h.detach())", argument="[]", rare=True),
)  # fmt: skip

KEPT = (
    Feature("counter", "self.n$ = self.n$ + 1\nh = h * self.n$", init="self.n$ = 0",
            place="block"),
    Feature("counter at the top", "self.n$ += 1\nh = h * self.n$", init="self.n$ = 0",
            place="top", rare=True),
    Feature("made by the first call", "if not hasattr(self, 'n$'):\n    self.n$ = 2.0\n"
            "h = h * self.n$", changes=("m.n$ = ?", "vars(m).pop('n$', None)")),
    Feature("made where there was none", "if self.n$ is None:\n    self.n$ = x.shape[-1]\n"
            "h = h * self.n$", init="self.n$ = None", changes=("m.n$ = int(?)", "m.n$ = None")),
    Feature("size written", "self.n$ = x.shape[0]\nh = h * self.n$", init="self.n$ = 0",
            changes=("m.n$ = int(?)",)),
    Feature("mode written", "self.n$ = 'train' if self.training else 'eval'",
            init="self.n$ = ''", changes=("m.n$ = 'none'",)),
    Feature("memory", "h = h + self.n$\nself.n$ = h.detach().mean()",
            init="self.n$ = torch.zeros(())"),
    Feature("memory and history", "h = h + self.n$.detach()\nself.n$ = h.mean()",
            init="self.n$ = torch.zeros(())"),
    Feature("buffer written", "self.n$.mul_(0.5).add_(h.detach().mean())\nh = h + self.n$",
            init="self.register_buffer('n$', torch.zeros(()))"),
    Feature("buffer exchanged", "self.n$ = self.n$ * 0.5 + h.detach().mean()\nh = h + self.n$",
            init="self.register_buffer('n$', torch.zeros(()))"),
    Feature("buffer resized", "self.n$.resize_(h.shape[-1]).fill_(0.5)\nh = h + self.n$",
            init="self.register_buffer('n$', torch.zeros(1))"),
    Feature("attribute written in place", "self.n$.add_(1)\nh = h * self.n$",
            init="self.n$ = torch.zeros(())"),
    Feature("list kept", "self.n$.append(h.detach().mean())\nh = h + self.n$[-1]",
            init="self.n$ = []"),
    Feature("features kept", "self.n$ = h\nh = h + 1", init="self.n$ = None"),
    Feature("auxiliary loss", "self.n$ = h.square().mean()", init="self.n$ = None",
            loss="m.n$"),
    Feature("write through data", "h = h * 1\nh.data.mul_(2)\nh = h + 1"),
    Feature("buffer through data", "self.n$.data.add_(1)\nh = h * self.n$",
            init="self.register_buffer('n$', torch.zeros(()))"),
    Feature("parameter through data", "self.p$.data.mul_(0.9)\nh = h * self.p$",
            init="self.p$ = nn.Parameter(torch.ones(1))"),
    Feature("parameter under no grad", "with torch.no_grad():\n    self.p$.mul_(0.9)\n"
            "h = h * self.p$", init="self.p$ = nn.Parameter(torch.ones(1))"),
    Feature("weight normed", "self.p$.data = F.normalize(self.p$.data, dim=0)\n"
            "h = h * self.p$", init="self.p$ = nn.Parameter(torch.ones(1))"),
    Feature("generator held", "h = h + torch.rand(1, generator=self.g$)",
            init="self.g$ = torch.Generator().manual_seed(1)",
            changes=("m.g$.manual_seed(int(? * 4))",)),
    Feature("generator of the file", "h = h + torch.rand(1, generator=G$)",
            helpers="G$ = torch.Generator().manual_seed(1)"),
    Feature("draw", "h = h + torch.rand(())"),
    Feature("Python's draw", "h = h * random.random()", place="block"),
    Feature("Python's draw at the top", "h = h * random.random()", place="top", rare=True),
    Feature("Python's own generator", "h = h * self.r$.random()",
            init="self.r$ = random.Random(1)", rare=True),
    Feature("NumPy's draw", "h = h * numpy.random.rand()", rare=True),
    Feature("gradient kept", "h = h * 2 if self.p$.grad is None else h + self.p$",
            init="self.p$ = nn.Parameter(torch.ones(1))",
            changes=("m.p$.grad = torch.ones(1)", "m.p$.grad = None")),
    Feature("odd names", "h = getattr(self, 'class')(h) + self.get_parameter('lambda')",
            init="self.add_module('class', nn.Tanh())\n"
            "self.register_parameter('lambda', nn.Parameter(torch.ones(1)))"),
    Feature("very odd names", "h = self._modules['a\\'\"\\\\b'](h)",
            init="self.add_module('a\\'\"\\\\b', nn.Linear(1, 1))"
            "\nself._modules['a\\'\"\\\\b'] = nn.Tanh()"),
    Feature("sparse buffer", "h = h + torch.sparse.mm(self.s$, torch.ones(3, 1)).sum()",
            init="self.register_buffer('s$', torch.eye(3).to_sparse())"),
)  # fmt: skip

_FUNCTION = """class Own$(torch.autograd.Function):
    by = 1.0
    @staticmethod
    def forward(ctx, h):
        return h.clone()
    @staticmethod
    def backward(ctx, g):
        return (g * Own$.by).clamp(-0.01, 0.01)
own$ = Own$.apply"""

GRADIENTS = (
    Feature("own function", "h = Own$.apply(h)", helpers=_FUNCTION, changes=("Own$.by = ?",)),
    Feature("own function by a name", "h = own$(h)", helpers=_FUNCTION),
    Feature("two functions of one name", "h = (one$ if self.training else two$).apply(h)",
            helpers="def make$(by):\n    class Scale(torch.autograd.Function):\n"
            "        @staticmethod\n        def forward(ctx, h):\n            return h * by\n"
            "        @staticmethod\n        def backward(ctx, g):\n            return g * by\n"
            "    return Scale\none$, two$ = make$(1.0), make$(2.0)"),
    Feature("hook on a value", "h = h * 1\nif h.requires_grad:\n"
            "    h.register_hook(lambda g: g.clamp(-0.01, 0.01))"),
    Feature("gradient inside", "with torch.enable_grad():\n"
            "    k = h if h.requires_grad else h.detach().requires_grad_()\n"
            "    (g,) = torch.autograd.grad(k.square().sum(), k, create_graph=True)\nh = h + g"),
    Feature("checkpoint", "h = torch.utils.checkpoint.checkpoint(lambda v: v.tanh() * 2, h,"
            " use_reentrant=False)"),
    Feature("detached", "h = h + h.detach().tanh()"),
    Feature("saved tensors' hooks", "with torch.autograd.graph.save_on_cpu():\n    h = h.tanh()"),
    Feature("graph cut by data", "h = h + h.data"),
    Feature("old constructor", "h = h * torch.FloatTensor([1.0, 2.0]).sum()"),
    Feature("list of constants", "h = h * torch.tensor([1.0, 2.0]).sum()"),
    Feature("array of constants", "h = h * torch.from_numpy(numpy.ones(1)).to(h.dtype)"),
    Feature("new tensor", "h = h + h.new_tensor([0.5])"),
)  # fmt: skip

ALL = (*MODES, *SIZES, *VALUES, *ARGUMENTS, *KEPT, *GRADIENTS)
