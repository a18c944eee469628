"""docs/upstream.md is true: vLLM has what it lists, as we use it, and it lists everything we use.

The page's tables are the list of cases, so a seam is added, moved or dropped in one place. No
engine is started.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest

from repository import ROOT

PAGE = ROOT / "docs/upstream.md"
HEADER = ["vLLM's", "used here", "how", "in"]
HOW = ("subclassed", "overridden", "called", "wrapped", "read", "set", "replaced", "relied on")

CALLS = ("called", "wrapped", "overridden")

# Our packages; some of them live in the stock package's namespace.
PACKAGES = [path.parent for path in (ROOT / "vllm").glob("**/__init__.py")]
OURS = re.compile(
    "|".join(rf"{'.'.join(p.relative_to(ROOT / 'vllm').parts)}(\.|$)" for p in PACKAGES)
)
STOCK = re.compile(r"(vllm|triton)(\.|$)")
# Two names for one thing: ours and a kernel's.
SAME = {"temp": "temperature", "seed": "seeds", "batch_idx_to_req_idx": "idx_mapping"}
SAME["expanded_idx_mapping"] = "idx_mapping"
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
METHODS = (FunctionType, staticmethod, classmethod, property)
BASES = (ROOT / "vllm/vllm", ROOT / "vllm", ROOT)
SOURCES = [
    path
    for folder in ("vllm", "harness", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


class Seam(NamedTuple):
    """One name of a row.

    Args:
        owner: the dotted path of vLLM's module, class or object.
        name: what we use of it.
        arguments: those that we pass or take; None: the page names none.
        keywords: the arguments that we pass by keyword.
        how: one of HOW.
        files: the files that the page names.
    """

    owner: str
    name: str
    arguments: tuple[str, ...] | None
    keywords: tuple[str, ...]
    how: str
    files: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"{self.owner}.{self.name}"

    def __str__(self) -> str:
        return f"{self.how.replace(' ', '-')}:{self.path.removeprefix('vllm.')}"


def read_seams(page: str) -> list[Seam]:
    """All rows of the tables that have the header."""
    seams, inside = [], False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        if not cells or cells == HEADER:
            inside = cells == HEADER
        elif inside and set(line) - set("|-: "):
            owner, used, how, files = cells
            for spec in spans(used):
                seams.append(Seam(spans(owner)[0], *parse(spec), how, tuple(spans(files))))
    return seams


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def parse(spec: str) -> tuple[str, tuple[str, ...] | None, tuple[str, ...]]:
    """`name(a, b, *, c)`: the name, the arguments, and those by keyword."""
    name, bracket, inner = spec.partition("(")
    if not bracket:
        return spec, None, ()
    by_place, star, by_keyword = inner.rstrip(")").partition("*")
    words = [re.findall(r"\w+", part) for part in (by_place, by_keyword if star else "")]
    return name, (*words[0], *words[1]), tuple(words[1])


SEAMS = read_seams(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def cpu_worker_first() -> None:
    """Import the CPU worker first: it replaces parts of torch that the other modules must find.

    On a GPU it must not be imported.
    """
    if on_cpu():
        importlib.import_module("vllm.v1.worker.cpu_worker")


# What is listed is there


@pytest.mark.parametrize("seam", SEAMS, ids=str)
def test_seam(seam: Seam) -> None:
    """A failure names what vLLM has moved, and what was expected of it."""
    assert seam.how in HOW, f"{seam.path}: unknown word '{seam.how}'; use one of {HOW}"
    check_used(seam)
    if is_of_cpu(seam) and not on_cpu():
        pytest.skip("vLLM's CPU worker replaces parts of torch when it is imported")
    check_stock(seam)


def check_stock(seam: Seam) -> None:
    owner = resolve(seam.owner)
    if seam.how == "relied on":
        assert seam.name in inspect.getsource(owner), f"{seam.owner} no longer names {seam.name}"
        return
    assert has(owner, seam.name), f"vLLM has no {seam.path} any more"
    if seam.how in CALLS and seam.arguments is not None:
        check_call(seam, getattr(owner, seam.name), skip=takes_self(owner, seam.name))
    if seam.how == "overridden":
        check_overrides(seam, owner)
    elif seam.how == "subclassed":
        check_subclassed(seam, getattr(owner, seam.name))
    elif seam.how == "replaced":
        check_replaced(seam, getattr(owner, seam.name))


@pytest.mark.parametrize(
    ("used", "complaint"),
    [
        ("gone", "no textwrap.gone any more"),
        ("indent(line, prefix)", "textwrap.indent: its arguments by place"),
        ("indent(text, *, gone)", "textwrap.indent: takes no 'gone'"),
        ("indent(text)", "textwrap.indent: needs 'prefix'"),
    ],
)
def test_what_has_moved_is_named(used: str, complaint: str) -> None:
    page = f"| {' | '.join(HEADER)} |\n|---|---|---|---|\n| `textwrap` | `{used}` | called | `x` |"
    (seam,) = read_seams(page)
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        check_stock(seam)


def check_used(seam: Seam) -> None:
    """Check that the files that the page names use what it lists."""
    name = seam.name.lstrip("_") if seam.how == "replaced" else seam.name
    for file in seam.files:
        path = next((base / file for base in BASES if (base / file).is_file()), None)
        assert path is not None, f"{seam.path}: there is no file {file}"
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", path.read_text(encoding="utf-8")), (
            f"{file} does not use {name}; mend the row of {seam.owner}"
        )


def resolve(path: str) -> Any:
    """The module, class or object of a dotted path."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for at, part in enumerate(parts[count:], start=count):
            assert hasattr(found, part), f"vLLM has no {'.'.join(parts[: at + 1])} any more"
            found = getattr(found, part)
        return found
    raise AssertionError(f"vLLM has no {path} any more")


def has(owner: Any, name: str) -> bool:
    """Whether `owner` has the attribute; for a class, also its instances."""
    if hasattr(owner, name):
        return True
    return inspect.isclass(owner) and any(name in instance_names(c) for c in owner.__mro__)


@cache
def instance_names(cls: type) -> frozenset[str]:
    """What instances have: annotated in the class's body, or assigned to `self` in methods."""
    names = set(vars(cls).get("__annotations__", {}))
    if dataclasses.is_dataclass(cls):
        names |= {field.name for field in dataclasses.fields(cls)}
    tree = class_tree(cls)
    return frozenset(names | (stored_names(tree) if tree else set()))


def stored_names(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def class_tree(cls: type) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # built in, or made at run time
        return None


def takes_self(owner: Any, name: str) -> bool:
    return inspect.isclass(owner) and not isinstance(
        inspect.getattr_static(owner, name), (staticmethod, classmethod)
    )


def check_call(seam: Seam, function: Callable[..., Any], skip: bool) -> None:
    """Our arguments have the row's names and places, and no further argument is needed."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[skip:]
    by_place = seam.arguments[: len(seam.arguments) - len(seam.keywords)]
    places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    assert tuple(places[: len(by_place)]) == by_place, (
        f"{seam.path}: its arguments by place are {places}, the page has {list(by_place)}"
    )
    names = {p.name for p in parameters}
    for name in seam.keywords:
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        assert name in names or takes_any, f"{seam.path}: takes no '{name}' any more"
    for p in parameters:
        is_needed = p.default is p.empty and p.kind not in VARIADIC
        assert not is_needed or p.name in seam.arguments, f"{seam.path}: needs '{p.name}' now"


def check_overrides(seam: Seam, owner: type) -> None:
    """Every override of ours takes what vLLM may pass; arguments that ours passes on are exempt."""
    ours = [cls for cls, name, _ in overrides() if name == seam.name and issubclass(cls, owner)]
    assert ours, f"none of our classes overrides {seam.path}; mend the row"
    stock = inspect.signature(getattr(owner, seam.name)).parameters
    for cls in ours:
        taken = inspect.signature(getattr(cls, seam.name)).parameters
        kinds = {p.kind for p in taken.values()}
        for name in stock.keys() - seam.keywords:
            p = stock[name]
            takes_more = p.VAR_KEYWORD if p.kind is p.KEYWORD_ONLY else p.VAR_POSITIONAL
            fits = name in taken or p.kind in VARIADIC or takes_more in kinds
            assert fits, f"{cls.__qualname__}.{seam.name} does not take '{name}' of {seam.path}"


def check_subclassed(seam: Seam, stock: type) -> None:
    assert inspect.isclass(stock), f"{seam.path} is no class any more"
    ours = [cls for cls in our_classes() if issubclass(cls, stock)]
    assert ours, f"none of our classes derives from {seam.path}; mend the row"


def is_of_cpu(seam: Seam) -> bool:
    return seam.owner.startswith("vllm.v1.worker.cpu")


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def check_replaced(seam: Seam, kernel: Any) -> None:
    """Kernels are called by place: ours have the same names, except for pointer endings."""
    replacements = cpu_kernels()
    assert seam.path in replacements, f"we do not replace {seam.path}; mend the row"
    taken = inspect.signature(replacements[seam.path]).parameters
    ours = [plain(name) for name in taken]
    stock = [plain(name) for name in kernel_arguments(kernel)]
    assert ours == stock, f"{seam.path} takes {stock}, ours {ours}"


def kernel_arguments(kernel: Any) -> list[str]:
    return list(getattr(kernel, "arg_names", None) or inspect.signature(kernel).parameters)


def plain(name: str) -> str:
    name = name.strip("_").removesuffix("_ptr").lower()
    return SAME.get(name, name)


# What is used is listed


def test_every_import_is_listed() -> None:
    listed = {seam.path for seam in SEAMS} | {seam.owner for seam in SEAMS}
    missing = {path: file for path, file in imports() if path not in listed}
    assert not missing, f"docs/upstream.md does not list: {shown(missing)}"


def test_every_override_is_listed() -> None:
    listed = [seam for seam in SEAMS if seam.how == "overridden"]
    for cls, name, stock in overrides():
        assert any(s.name == name and issubclass(cls, resolve(s.owner)) for s in listed), (
            f"docs/upstream.md does not list that {cls.__qualname__} overrides "
            f"{stock.__module__}.{stock.__qualname__}.{name}"
        )


def test_every_inherited_attribute_is_listed() -> None:
    """What our classes use of themselves and vLLM's classes have made."""
    named = {seam.name for seam in SEAMS}
    for cls in our_classes():
        known = set().union(*(own_names(base) for base in cls.__mro__ if is_ours(base)))
        known |= set().union(*(set(dir(b)) for b in cls.__mro__ if not is_ours(b) | is_stock(b)))
        used = set().union(*(used_of_self(base) for base in cls.__mro__ if is_ours(base)))
        missing = used - known - named
        assert not missing, f"docs/upstream.md does not list, of {cls.__qualname__}: {missing}"


def test_every_private_attribute_is_listed() -> None:
    """`something._name`, which is vLLM's unless one of our files defines it."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    known = {seam.name for seam in SEAMS}
    for tree in trees.values():
        known |= stored_names(tree)
        for node in ast.walk(tree):
            known |= {getattr(node, "name", None), getattr(node, "id", None)}
    for path, tree in trees.items():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        private = {name for name in used if re.match(r"_[a-z]", name)}
        # Methods of named tuples; Python gives them these names.
        missing = private - known - {"_fields", "_replace", "_asdict", "_exit"}  # Python's own
        assert not missing, f"docs/upstream.md does not list, of {path.name}: {missing}"


def test_every_replaced_kernel_is_listed() -> None:
    listed = {seam.path for seam in SEAMS if seam.how == "replaced"}
    assert set(cpu_kernels()) == listed


def imports() -> Iterator[tuple[str, str]]:
    """The dotted path of everything that our files import from vLLM or Triton, with the file."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if "." in alias.name]
            else:
                continue
            for name in names:
                if STOCK.match(name) and not OURS.match(name):
                    yield name, str(path.relative_to(ROOT))


def shown(found: dict[str, str]) -> str:
    return ", ".join(f"{path} ({file})" for path, file in sorted(found.items()))


@cache
def our_modules() -> list[ModuleType]:
    names = set()
    for package in PACKAGES:
        for path in package.glob("*.py"):
            parts = path.relative_to(ROOT / "vllm").with_suffix("").parts
            names.add(".".join(parts).removesuffix(".__init__"))
    return [importlib.import_module(name) for name in sorted(names)]


@cache
def our_classes() -> list[type]:
    """Our classes that derive from one of vLLM's, or that will be mixed into one."""
    classes = [
        cls
        for module in our_modules()
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__
    ]
    return [cls for cls in classes if any(is_stock(base) for base in cls.__mro__)]


@cache
def overrides() -> list[tuple[type, str, type]]:
    """Our class, the method, and the class of vLLM that has it."""
    found = []
    for cls in our_classes():
        own = [base for base in cls.__mro__ if is_ours(base)]
        stock = [base for base in cls.__mro__ if is_stock(base)]
        for name in sorted({name for base in own for name in vars(base)}):
            bases = [base for base in stock if isinstance(vars(base).get(name), METHODS)]
            if bases and not name.startswith("__"):
                found.append((cls, name, bases[0]))
    return found


def own_names(cls: type) -> set[str]:
    return set(vars(cls)) | instance_names(cls)


def used_of_self(cls: type) -> set[str]:
    """`self.name` and `super().name` in the bodies of the class."""
    tree = class_tree(cls)
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__") and is_self(node)
    }


def is_self(node: ast.Attribute) -> bool:
    if isinstance(node.value, ast.Call):
        return getattr(node.value.func, "id", None) == "super"
    return getattr(node.value, "id", None) == "self"


def is_ours(cls: type) -> bool:
    return bool(OURS.match(cls.__module__))


def is_stock(cls: type) -> bool:
    return bool(STOCK.match(cls.__module__)) and not is_ours(cls)


def cpu_kernels() -> dict[str, Callable[..., None]]:
    """Our implementations by the full name of the kernel that each replaces."""
    name = "kernels_by_name"
    return next(vars(module)[name] for module in our_modules() if name in vars(module))()
