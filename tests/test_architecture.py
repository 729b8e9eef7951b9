"""The house of docs/architecture.md, held against the imports of the code."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "emd_retrieval"


def floors_of_the_docs():
    """Room to floor, from the table whose header starts with ``floor`` and ``room``."""
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    tables = [
        number
        for number, line in enumerate(lines)
        if [cell.strip() for cell in line.split("|")[1:3]] == ["floor", "room"]
    ]
    assert len(tables) == 1, "docs/architecture.md needs one table '| floor | room | ...'"
    floors = {}
    for line in lines[tables[0] + 2 :]:
        if not line.startswith("|"):
            break
        floor, room = (cell.strip() for cell in line.split("|")[1:3])
        room = room.strip("`").removesuffix("/").removesuffix(".py")
        assert room not in floors, f"{room} is in the table twice"
        floors[room] = int(floor)
    return floors


def rooms_of_the_code():
    """Room to its modules. A room is a module or a folder of the package."""
    rooms = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            rooms.setdefault(room, []).append(file)
    return rooms


def imports_of(source, module):
    """``(line, module, name)`` of each import anywhere in a source, relative ones made absolute.

    ``import a.b`` has no name. ``module`` is the dotted name of the package that holds the source.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield node.lineno, base, alias.name


def target_room(module, name, rooms):
    """The room that an import reaches; ``"__init__"`` for the package's front door."""
    parts = module.split(".")
    if parts[0] != "emd_retrieval":
        return None
    if len(parts) > 1:
        return parts[1]
    return name if name in rooms else "__init__"


def edges(rooms):
    """``(room, target, where, module, name)`` of each import between rooms."""
    for room, files in rooms.items():
        for file in files:
            package = ".".join(file.relative_to(ROOT).parts[:-1])
            for line, module, name in imports_of(file.read_text(encoding="utf-8"), package):
                target = target_room(module, name, rooms)
                if target is not None and target != room:
                    yield room, target, f"{file.relative_to(ROOT)}:{line}", module, name


@pytest.fixture(scope="module")
def floors():
    return floors_of_the_docs()


@pytest.fixture(scope="module")
def rooms():
    return rooms_of_the_code()


def test_every_room_is_in_the_table_and_every_row_is_a_room(floors, rooms):
    assert sorted(floors) == sorted(rooms)


def test_nobody_imports_upwards(floors, rooms):
    upwards = [
        f"{where}: {room} (floor {floors[room]}) imports {target} (floor {floors[target]})"
        for room, target, where, _, _ in edges(rooms)
        if target in floors and floors[target] > floors[room]
    ]
    assert not upwards, "\n".join(upwards)


def test_rooms_form_no_cycle(rooms):
    graph = {room: set() for room in rooms}
    for room, target, _, _, _ in edges(rooms):
        if target in rooms:
            graph[room].add(target)
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_nobody_goes_through_the_front_door(rooms):
    """The package's own ``__init__`` is for users; inside it would hide who needs whom."""
    through = [
        f"{where}: from emd_retrieval import {name}"
        for _, target, where, _, name in edges(rooms)
        if target == "__init__" and name != "__version__"
    ]
    assert not through, "\n".join(through)


def test_every_import_reaches_a_room(rooms):
    known = {*rooms, "__init__"}
    lost = [where for _, target, where, _, _ in edges(rooms) if target not in known]
    assert not lost, "\n".join(lost)


def test_nobody_takes_the_private_names_of_another_room(rooms):
    taken = [
        f"{where}: {name} of {module}"
        for _, _, where, module, name in edges(rooms)
        if (name is not None and name.startswith("_") and not name.startswith("__"))
        or any(part.startswith("_") for part in module.split(".")[2:])
    ]
    assert not taken, "\n".join(taken)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import emd_retrieval.cli.main", "cli"),
        ("from emd_retrieval.cli import main", "cli"),
        ("from emd_retrieval import cli", "cli"),
        ("from emd_retrieval import emd", "__init__"),
        ("from ..cli.main import main", "cli"),
        ("from .. import cli", "cli"),
        ("def late():\n    from emd_retrieval.cli import main", "cli"),
        ("if TYPE_CHECKING:\n    import emd_retrieval.cli", "cli"),
        ("from .packing import pack", "features"),
        ("import torch", None),
    ],
)
def test_the_reader_sees_every_kind_of_import(source, expected, rooms):
    """The checks above are only as good as what they read."""
    found = [
        target_room(module, name, rooms)
        for _, module, name in imports_of(source, "emd_retrieval.features")
    ]
    assert found == [expected]
