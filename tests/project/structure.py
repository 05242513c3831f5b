"""Rules about the shape of the library, computed from its source with `ast`; none is imported.

Each rule takes the sources of modules by name and returns its offenders: where, and what was found
there.  `python -m tests.project.structure` prints today's.  `passes/` counts under the name by
which it is imported, `dni_fx.passes`.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import networkx as nx
from torch import Tensor, nn

Sources = Mapping[str, str]  # module -> text; a package is a module with modules beneath it
Offenders = dict[str, str]  # where -> what was found
Class = tuple[str, ast.ClassDef]  # the module it stands in, and its node
Function = ast.FunctionDef | ast.AsyncFunctionDef

ROOT = Path(__file__).resolve().parents[2]
TOP_MODULES = 12  # at the top of the library, packages not counted
CLASS_LINES = 250
CLASS_ATTRIBUTES = 20
FUNCTION_LINES = 60  # without the docstring
FILE_LINES = 400
LINE_LENGTH = 100
FOREIGN = {*dir(Tensor), *dir(nn.Module), *vars(nn.Module())}  # torch's own attributes
BIRTHPLACES = ("__init__", "__new__", "__post_init__", "__set_name__")
BY_NAME = ("getattr", "setattr", "hasattr", "delattr", "__setattr__", "__getattribute__")

# what stands above a folder, and uses it: it reaches none of that, not by way of others either
ABOVE = {
    "passes.trace": ("passes.cut", "passes.search", "sources", "runtime", "parallel"),
    "passes.cut": ("passes.search", "parallel", "through_time"),
    "passes.search": ("parallel", "through_time"),
    "reports": ("graphs", "sources", "passes.cut", "runtime", "parallel", "through_time"),
    "sources": ("graphs", "passes.cut", "runtime", "parallel", "through_time"),
    "graphs": ("parallel", "through_time"),
    "runtime": ("parallel", "through_time"),
    "residency": ("graphs", "passes.cut", "sources", "runtime", "parallel", "through_time"),
}

# {rule: {where: why it stays so}}
EXCEPTIONS: dict[str, dict[str, str]] = {}


def read_sources() -> dict[str, str]:
    """The library's modules."""
    found = {}
    for folder, package in ((ROOT / "dni_fx", "dni_fx"), (ROOT / "passes", "dni_fx.passes")):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).with_suffix("").parts
            if package == "dni_fx" and inside[0] == "passes":
                continue  # the link
            parts = inside[:-1] if inside[-1] == "__init__" else inside
            found[".".join((package, *parts))] = path.read_text(encoding="utf-8")
    return found


# Imports


def circles(sources: Sources) -> Offenders:
    """Modules that import themselves by way of others: imports inside functions and under
    `TYPE_CHECKING` count like all others.
    """
    graph = import_graph(sources)
    found = {}
    for component in nx.strongly_connected_components(graph):
        for module in sorted(component):
            if len(component) > 1 or graph.has_edge(module, module):
                found[module] = "imports itself: " + " -> ".join(round_trip(graph, module))
    return found


def round_trip(graph: nx.DiGraph[str], module: str) -> list[str]:
    """A shortest way from a module over its imports back to itself."""
    back = nx.single_target_shortest_path(graph, module)
    return [module, *min((back[name] for name in graph[module] if name in back), key=len)]


def import_graph(sources: Sources) -> nx.DiGraph[str]:
    """Who imports whom.  Python runs the packages above a module first, so they are imported,
    too; not those that the importing module lies in itself, which are under way already (and the
    library's own top is above every module).
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(sources)
    for module, text in sources.items():
        for named in imported(sources, module, ast.parse(text)):
            graph.add_edge(module, named)
            while named := named.rpartition(".")[0]:
                if not f"{module}.".startswith(f"{named}."):
                    graph.add_edge(module, named)
    return graph


def imported(sources: Sources, module: str, tree: ast.Module) -> Iterator[str]:
    """Modules of ours that import statements name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in sources)
        elif isinstance(node, ast.ImportFrom):
            origin = origin_of(sources, module, node)
            names = [alias.name for alias in node.names]
            inside = [f"{origin}.{name}" for name in names if f"{origin}.{name}" in sources]
            yield from inside
            if origin in sources and len(inside) < len(names):
                yield origin  # a name of its own, not only modules beneath it


def origin_of(sources: Sources, module: str, node: ast.ImportFrom) -> str:
    """The absolute name of what `from ... import` imports from."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    climbs = node.level - is_package(sources, module)
    base = parts[: len(parts) - climbs]
    return ".".join([*base, *([node.module] if node.module else [])])


def is_package(sources: Sources, module: str) -> bool:
    """Whether modules lie beneath it."""
    return any(name.startswith(f"{module}.") for name in sources)


def upward(sources: Sources) -> Offenders:
    """Modules that import what stands above their folder."""
    graph, found = import_graph(sources), {}
    for folder, above in ABOVE.items():
        for module in (m for m in sources if m.startswith(f"dni_fx.{folder}.")):
            ways = nx.single_source_shortest_path(graph, module)
            for place in above:
                ends = [m for m in ways if f"{m}.".startswith(f"dni_fx.{place}.")]
                if ends:
                    way = min((ways[m] for m in ends), key=len)
                    found[module] = f"reaches {place}: {' -> '.join(way)}"
    return found


# Private names


def private_reads(sources: Sources) -> Offenders:
    """Private names of other modules of ours that a module imports or reads from objects.

    Whose an attribute is cannot be known without types: it counts as another module's when a class
    of some other module defines the name and the reading module does not, unless torch's modules
    and tensors have it.
    """
    trees = {module: ast.parse(text) for module, text in sources.items()}
    members = {module: members_of(tree) - FOREIGN for module, tree in trees.items()}
    found: Offenders = {}
    for module, tree in trees.items():
        inside = members[module] | names_at_top(tree)
        for name, origin, line in private_uses(sources, module, tree):
            owners = [other for other in sources if other != module and name in members[other]]
            if origin or (owners and name not in inside):
                what = f"of {origin or ' or '.join(owners)}, line {line}"
                found.setdefault(f"{module}: {name}", what)
    return found


def private_uses(sources: Sources, module: str, tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Private names that a module takes from elsewhere: name, module of ours if known, line."""
    modules = imported_modules(sources, module, tree)
    for node in ast.walk(tree):
        origin = ""
        if isinstance(node, ast.ImportFrom):
            origin = origin_of(sources, module, node)
            names = [alias.name for alias in node.names] if origin in sources else []
        elif isinstance(node, ast.Attribute) and not is_own(node.value):
            origin = modules.get(ast.unparse(node.value), "")
            names = [node.attr]
        elif isinstance(node, ast.Call):
            names = [name] if (name := named_attribute(node)) else []
        else:
            continue
        yield from ((name, origin, node.lineno) for name in names if is_private(name))


def imported_modules(sources: Sources, module: str, tree: ast.Module) -> dict[str, str]:
    """The modules of ours that names of a module stand for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = origin_of(sources, module, node)
            found |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    return {name: target for name, target in found.items() if target in sources}


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_own(node: ast.expr) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def named_attribute(call: ast.Call) -> str | None:
    """The attribute in `getattr(other, "name")` and its like, of what is not `self`."""
    function = call.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", None)
    if name not in BY_NAME or len(call.args) < 2 or is_own(call.args[0]):
        return None
    constant = call.args[1]
    return str(constant.value) if isinstance(constant, ast.Constant) else None


def members_of(tree: ast.Module) -> set[str]:
    """Names that a module's classes define, attributes of `self` included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names |= names_at_top(node)
            names |= {name for name, _, _ in assigned_on_self(node)}
    return names


def names_at_top(tree: ast.Module | ast.ClassDef) -> set[str]:
    """Functions, classes and variables that a module or a class defines directly."""
    defined = {node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)}
    return defined.union(*(assigned_names(statement) for statement in tree.body))


def assigned_names(statement: ast.stmt) -> set[str]:
    """Plain names that a statement binds, those in its branches included."""
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


# Sizes


def top_modules(sources: Sources) -> Offenders:
    """More modules at the top of the library than one can take in; its `__init__` counts."""
    top = [module for module in sources if module.count(".") <= 1]
    files = [module for module in top if "." not in module or not is_package(sources, module)]
    limit = f"{len(files)} modules, at most {TOP_MODULES}: {', '.join(files)}"
    return {"dni_fx": limit} if len(files) > TOP_MODULES else {}


def file_sizes(sources: Sources) -> Offenders:
    """Files that are too long."""
    lines = {module: len(text.splitlines()) for module, text in sources.items()}
    return too_many(lines, FILE_LINES, "lines")


def line_lengths(sources: Sources) -> Offenders:
    """Lines that are too long."""
    found = {}
    for module, text in sources.items():
        lines = enumerate(text.splitlines(), 1)
        if long := [str(number) for number, line in lines if len(line) > LINE_LENGTH]:
            found[module] = f"line {', '.join(long)}: over {LINE_LENGTH} characters"
    return found


def function_sizes(sources: Sources) -> Offenders:
    """Functions that are too long, their docstring not counted, functions inside them counted."""
    lines = {
        where: length_of(node)
        for module, text in sources.items()
        for where, node in scopes(ast.parse(text), module)
        if isinstance(node, Function)
    }
    return too_many(lines, FUNCTION_LINES, "lines")


def class_sizes(sources: Sources) -> Offenders:
    """Classes that are too long, docstrings counted."""
    lines = {where: span(node) for where, _, node in classes(sources)}
    return too_many(lines, CLASS_LINES, "lines")


def class_attributes(sources: Sources) -> Offenders:
    """Classes with too many attributes: those assigned on `self` anywhere, and fields."""
    counts = {}
    for where, _, node in classes(sources):
        counts[where] = len({name for name, _, _ in assigned_on_self(node)} | fields_of(node))
    return too_many(counts, CLASS_ATTRIBUTES, "attributes")


def too_many(counts: Mapping[str, int], limit: int, unit: str) -> Offenders:
    """What exceeds a limit."""
    found = {where: count for where, count in counts.items() if count > limit}
    return {where: f"{count} {unit}, at most {limit}" for where, count in found.items()}


def length_of(function: Function) -> int:
    """Lines of a function from `def` on, without its docstring."""
    has_docstring = ast.get_docstring(function, clean=False) is not None
    return span(function) - (span(function.body[0]) if has_docstring else 0)


def span(node: ast.stmt) -> int:
    """Lines of a statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def classes(sources: Sources) -> Iterator[tuple[str, str, ast.ClassDef]]:
    """Every class: its place, its module, its node."""
    for module, text in sources.items():
        for place, node in scopes(ast.parse(text), module):
            if isinstance(node, ast.ClassDef):
                yield place, module, node


def scopes(tree: ast.AST, place: str) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Classes and functions of a tree by dotted name, at any depth."""
    for child in ast.iter_child_nodes(tree):
        below = place
        if isinstance(child, ast.ClassDef | Function):
            below = f"{place}.{child.name}"
            yield below, child
        yield from scopes(child, below)


# Attributes


def late_attributes(sources: Sources) -> Offenders:
    """Attributes that are assigned on `self` in a method, but born neither where objects are made
    (`BIRTHPLACES`), nor in the class, nor in a base class of ours.
    """
    by_name: dict[str, list[Class]] = defaultdict(list)
    for _, module, node in classes(sources):
        by_name[node.name].append((module, node))
    offenders: Offenders = {}
    for where, module, node in classes(sources):
        born = born_in((module, node), by_name, frozenset())
        for name, method, line in assigned_on_self(node):
            if name not in born:
                offenders.setdefault(f"{where}.{name}", f"born in {method}, line {line}")
    return offenders


def born_in(
    found: Class, by_name: Mapping[str, list[Class]], seen: frozenset[ast.ClassDef]
) -> set[str]:
    """Names that objects of a class have from the start, by its own code and its bases'."""
    module, node = found
    seen |= {node}
    names = {name for name, method, _ in assigned_on_self(node) if method in BIRTHPLACES}
    names |= names_at_top(node)  # properties with a setter, too
    for base in node.bases:
        bases = by_name.get(ast.unparse(base).split("[")[0].rpartition(".")[2], [])
        others = [other for other in bases if other[1] not in seen]
        near = [other for other in others if other[0] == module] or others
        for other in near:
            names |= born_in(other, by_name, seen)
    return names


def assigned_on_self(node: ast.ClassDef) -> list[tuple[str, str, int]]:
    """Attributes that the methods of a class assign on `self`: name, method, line."""
    return [
        (name, method.name, line)
        for method in node.body
        if isinstance(method, Function)
        for name, line in assigned_below(method)
    ]


def assigned_below(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Attributes of `self` that a piece of code assigns; classes inside it have their own."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            continue
        stored = isinstance(getattr(child, "ctx", None), ast.Store)
        if stored and isinstance(child, ast.Attribute) and is_own(child.value):
            yield child.attr, child.lineno
        if isinstance(child, ast.Call) and ast.unparse(child.func).endswith("setattr__"):
            target, *names = child.args[:2] if len(child.args) > 2 else [child]
            if is_own(target) and names and isinstance(names[0], ast.Constant):
                yield str(names[0].value), child.lineno
        yield from assigned_below(child)


def fields_of(node: ast.ClassDef) -> set[str]:
    """Fields of a dataclass or named tuple."""
    makers = [ast.unparse(maker) for maker in (*node.decorator_list, *node.bases)]
    if not any("dataclass" in maker or "NamedTuple" in maker for maker in makers):
        return set()
    return {
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and "ClassVar" not in ast.unparse(statement.annotation)
    }


SIZES = (file_sizes, line_lengths, function_sizes, class_sizes, class_attributes)
RULES: tuple[Callable[[Sources], Offenders], ...] = (
    circles, upward, private_reads, top_modules, *SIZES, late_attributes,
)  # fmt: skip


def main() -> None:
    """Print today's offenders, those that are excused or wait included."""
    sources = read_sources()
    for rule in RULES:
        found = rule(sources)
        print(f"{rule.__name__}: {len(found)}")
        print(*(f"    {where}  ({what})" for where, what in found.items()), sep="\n")


if __name__ == "__main__":
    main()
