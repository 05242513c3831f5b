"""The shape of the library: no circle, no reach into another module's privates, everything of a
size that one can take in.  Each rule has negative controls.
"""

from __future__ import annotations

import functools

import pytest

from . import structure
from .structure import EXCEPTIONS, RULES, Offenders, Sources


@functools.cache
def library() -> Sources:
    """The library's sources."""
    return structure.read_sources()


@functools.cache
def found(rule: str) -> Offenders:
    """What offends a rule in the library."""
    return getattr(structure, rule)(library())


@pytest.mark.parametrize("rule", [rule.__name__ for rule in RULES])
def test_the_library_keeps_every_rule(rule: str) -> None:
    allowed = set(EXCEPTIONS.get(rule, {}))
    new = [f"{where}: {what}" for where, what in found(rule).items() if where not in allowed]
    assert new == []


def test_every_exception_is_needed_and_has_its_reason() -> None:
    for rule, excused in EXCEPTIONS.items():
        assert [where for where in excused if where not in found(rule)] == []
        assert all(excused.values())


def test_the_rules_see_the_whole_library() -> None:
    assert {"dni_fx", "dni_fx.passes.cut.cutting", "dni_fx.runtime.in_turn"} <= library().keys()
    assert len(structure.import_graph(library()).edges) > 200
    assert sum(1 for _ in structure.classes(library())) > 100


# Circles


def circles(**sources: str) -> list[str]:
    """Modules in circles; `a__b` stands for `a.b`."""
    return sorted(structure.circles(modules(sources)))


def modules(sources: Sources) -> Sources:
    """Sources of made-up modules below `dni_fx`; `a__b` stands for `dni_fx.a.b`."""
    return {"dni_fx": ""} | {f"dni_fx.{k.replace('__', '.')}": v for k, v in sources.items()}


def test_modules_that_import_each_other_are_a_circle() -> None:
    assert circles(a="from .b import x", b="from .c import y", c="") == []
    assert circles(a="from .b import x", b="from . import a") == ["dni_fx.a", "dni_fx.b"]
    assert circles(a="import dni_fx.b", b="from dni_fx import a") == ["dni_fx.a", "dni_fx.b"]


def test_a_circle_names_the_way_around() -> None:
    sources = modules({"a": "from .b import x", "b": "from .c import y", "c": "from .a import z"})
    assert structure.circles(sources)["dni_fx.b"] == (
        "imports itself: dni_fx.b -> dni_fx.c -> dni_fx.a -> dni_fx.b"
    )


@pytest.mark.parametrize(
    "hidden",
    [
        "if TYPE_CHECKING:\n    from .a import A",
        "def f():\n    from .a import A",
        "def f():\n    import dni_fx.a as x",
        "try:\n    from . import a\nexcept ImportError:\n    pass",
    ],
)
def test_imports_for_types_and_inside_functions_count(hidden: str) -> None:
    assert circles(a="from .b import x", b=hidden) == ["dni_fx.a", "dni_fx.b"]
    assert circles(a="from .c import x", b=hidden, c="") == []


def test_importing_a_module_runs_the_packages_above_it() -> None:
    package = {"pkg": "from ..a import f", "pkg__x": ""}
    assert circles(a="from .pkg.x import y", **package) == ["dni_fx.a", "dni_fx.pkg"]
    assert circles(a="from .pkg import x", **package) == ["dni_fx.a", "dni_fx.pkg"]
    assert circles(a="", **package) == []


def test_a_package_and_its_modules() -> None:
    # the package above is under way already while its own module runs, unless it is asked for
    assert circles(pkg="from .x import f", pkg__x="from .y import g", pkg__y="") == []
    assert circles(pkg="from .x import f", pkg__x="from . import y", pkg__y="") == []
    assert circles(pkg="from .x import f", pkg__x="from . import g") == [
        "dni_fx.pkg", "dni_fx.pkg.x"
    ]  # fmt: skip
    assert circles(pkg="from .x import f", pkg__x="from ..pkg import g") == [
        "dni_fx.pkg", "dni_fx.pkg.x"
    ]  # fmt: skip


# Folders


def above(**sources: str) -> list[str]:
    return list(structure.upward(modules({"parallel__p": "", "runtime__r": "", **sources})))


def test_what_stands_above_a_folder_is_not_reached() -> None:
    assert above(parallel__p="from ..runtime.r import x") == []
    assert above(runtime__r="from ..parallel.p import x") == ["dni_fx.runtime.r"]
    by_way = {"runtime__r": "from ..top import x", "top": "from .parallel import p"}
    assert above(**by_way) == ["dni_fx.runtime.r"]
    assert structure.upward(modules({"parallel__p": "", **by_way}))["dni_fx.runtime.r"] == (
        "reaches parallel: dni_fx.runtime.r -> dni_fx.top -> dni_fx.parallel.p"
    )


def test_the_folders_that_stand_in_an_order_are_there() -> None:
    named = {*structure.ABOVE, *(f for above in structure.ABOVE.values() for f in above)}
    assert {f"dni_fx.{folder}" for folder in named} <= library().keys()


# Private names


def private(**sources: str) -> list[str]:
    """Private names read: module, name and whose it is."""
    found = structure.private_reads(modules(sources))
    return [f"{where} {what.partition(',')[0]}" for where, what in found.items()]


OWNER = (
    "class A:\n    def __init__(self):\n        self._x = 1\n    def _f(self): pass\ndef _g(): pass"
)


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        ("def f(a): return a._x", "_x"),
        ("def f(a): a._f()", "_f"),
        ("class B:\n    def f(self): return self.a._x", "_x"),
        ("def f(a): return getattr(a, '_x')", "_x"),
        ("def f(a): object.__setattr__(a, '_x', 1)", "_x"),
        ("from .a import _g", "_g"),
        ("from . import a\ndef f(): a._g()", "_g"),
        ("import dni_fx.a\ndef f(): dni_fx.a._g()", "_g"),
    ],
)
def test_private_names_of_other_modules_are_seen(reader: str, name: str) -> None:
    assert private(a=OWNER, b=reader) == [f"dni_fx.b: {name} of dni_fx.a"]


@pytest.mark.parametrize(
    "reader",
    [
        "class B(A):\n    def f(self): return self._x + super()._f()",
        "class B:\n    def __init__(self): self._x = 2\n    def same(self, other): return other._x",
        "def f(a): return a._replace(b=1), a.__dict__, getattr(a, '_other')",
        "def f(a): return a._g",  # a function of that module's, not an attribute of objects
        "def f(tensor): return tensor._version",
        "from torch import _C",
    ],
)
def test_what_is_not_another_modules_private_name(reader: str) -> None:
    assert private(a=OWNER, b=reader, c="class C:\n    def _version(self): pass") == []


# Sizes


def test_modules_at_the_top_are_counted_without_packages() -> None:
    top = {f"m{k}": "" for k in range(structure.TOP_MODULES - 1)}
    assert structure.top_modules(modules({**top, "pkg": "", "pkg__x": ""})) == {}
    assert "13 modules" in structure.top_modules(modules({**top, "more": ""}))["dni_fx"]


def test_long_files_and_lines() -> None:
    longest = "x = 1\n" * structure.FILE_LINES
    assert structure.file_sizes({"a": longest}) == {}
    assert structure.file_sizes({"a": longest + "y = 1"}) == {"a": "401 lines, at most 400"}
    widest = "x" * structure.LINE_LENGTH
    assert structure.line_lengths({"a": widest}) == {}
    assert list(structure.line_lengths({"a": f"\n{widest}x"})) == ["a"]


def test_long_functions_are_counted_without_their_docstring() -> None:
    body = "        x = 1\n" * (structure.FUNCTION_LINES - 1)
    documented = '        """One\n        two.\n        """\n' + body
    for text in (body, documented):
        assert structure.function_sizes({"a": f"class A:\n    def f(self):\n{text}"}) == {}
        longer = f"class A:\n    async def f(self):\n{text}        y = 1\n"
        assert structure.function_sizes({"a": longer}) == {"a.A.f": "61 lines, at most 60"}


def test_long_classes() -> None:
    text = "class A:\n" + "    x = 1\n" * (structure.CLASS_LINES - 1)
    assert structure.class_sizes({"a": text}) == {}
    assert list(structure.class_sizes({"a": f"{text}    y = 1"})) == ["a.A"]


def test_attributes_are_those_assigned_anywhere_and_fields() -> None:
    count = structure.CLASS_ATTRIBUTES
    names = [f"x{k}" for k in range(count)]
    assigned = "".join(f"        self.{name} = 1\n" for name in names)
    plain = f"class A:\n    def __init__(self):\n{assigned}    def f(self):\n        self.x0 = 2\n"
    assert structure.class_attributes({"a": plain}) == {}
    for one in (
        "self.more = 1",
        "self.x1, self.more = 1, 2",
        "object.__setattr__(self, 'more', 1)",
    ):
        found = structure.class_attributes({"a": f"{plain}        {one}\n"})
        assert found == {"a.A": "21 attributes, at most 20"}
    fields = "@dataclass\nclass A:\n    kind: ClassVar[int] = 1\n"
    fields += "".join(f"    {name}: int\n" for name in names)
    assert structure.class_attributes({"a": fields}) == {}
    assert list(structure.class_attributes({"a": f"{fields}    more: int\n"})) == ["a.A"]


# Attributes born late


def late(text: str, **others: str) -> list[str]:
    """Attributes born late."""
    return sorted(structure.late_attributes({"a": text, **others}))


@pytest.mark.parametrize(
    "born",
    [
        "    def __init__(self): self.x = None",
        "    def __new__(cls): return cls\n    def __post_init__(self): self.x: int = 1",
        "    def __set_name__(self, owner, name): self.x = name",
        "    x = None",
        "    x: int",
        "    @x.setter\n    def x(self, value): pass",
    ],
)
def test_attributes_are_born_where_objects_are_made(born: str) -> None:
    use = "    def f(self): self.x = 2"
    assert late(f"class A:\n{use}") == ["a.A.x"]
    assert late(f"class A:\n{born}\n{use}") == []
    assert late(f"class A:\n{born}\nclass B(A):\n{use}") == []
    assert late(f"import b\nclass B(b.A[int]):\n{use}", b=f"class A:\n{born}") == []
    assert late(f"import b\nclass A(b.A):\n{use}", b=f"class A:\n{born}") == []
    assert late(f"class B(C):\n{use}", b=f"class A:\n{born}") == ["a.B.x"]


def test_a_setup_called_by_the_constructor_is_late() -> None:
    assert late("class A:\n    def __init__(self): self.set()\n    def set(self): self.x = 1")
