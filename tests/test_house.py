"""The house: who may import whom, what stands alone, how long a file may be, and what each one offers."""

import ast
import graphlib
import importlib
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from smooth_gradcam import compute_token_maps

ROOT = Path(__file__).parent.parent
MINE = {"common", "studies", "demo_model", "tests", "smooth_gradcam", "visualization_utils", "test_gradcam"}
TOP = ("smooth_gradcam", "visualization_utils", "test_gradcam")
FLOORS = (["smooth_gradcam.py"], ["common"], ["visualization_utils.py"], ["studies"], ["test_gradcam.py"])  # from below
CORE_LINES = 1375
MOST_LINES = {"smooth_gradcam": CORE_LINES, "common": 450, "studies": 450}
ANY_FILE = 850
PUBLIC_NAMES = 60
MEASURES = ("answers", "chair", "coco", "decoder", "faithfulness", "fastv", "flow", "heads", "knockout", "localization")
MEASURES += ("questions", "randomization", "tables")


def modules_of(place):
    path = ROOT / place
    return [path] if path.suffix else sorted(path.glob("*.py"))


FLOOR = {path: number for number, floor in enumerate(FLOORS) for place in floor for path in modules_of(place)}
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FLOOR}


def imported(path):
    """The full names of all that a file imports, inside functions too, with the names of what it takes from there."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


OURS = {path: {NAMES[name] for name in imported(path) & NAMES.keys()} for path in FLOOR}


# imports


def test_imports_run_one_way():
    """Driver -> studies -> figures -> common -> core."""
    upwards = {path.name: [other.name for other in ours if FLOOR[other] > FLOOR[path]] for path, ours in OURS.items()}
    assert {name: others for name, others in upwards.items() if others} == {}


def test_no_file_needs_itself():
    graphlib.TopologicalSorter(OURS).prepare()


def test_the_core_imports_nothing_of_ours():
    assert {name.split(".")[0] for name in imported(ROOT / "smooth_gradcam.py")} & MINE == set()


def test_flags_need_only_the_standard_library():
    """Torch takes seconds to load; --help must not."""
    found, todo = set(), [ROOT / "common/flags.py"]
    while todo:
        path = todo.pop()
        todo += OURS[path]
        found |= {name.split(".")[0] for name in imported(path)} - {"common"}
    assert found <= sys.stdlib_module_names


def test_files_of_measures_draw_nothing():
    drawing = re.compile(r"matplotlib|visualization_utils|common\.page|.*_figures")
    drawn = {name: [*filter(drawing.match, imported(ROOT / f"studies/{name}.py"))] for name in MEASURES}
    assert drawn == dict.fromkeys(MEASURES, [])


def test_only_their_own_mode_uses_the_figures_of_a_study():
    others = {"flow_figures": {"knockout_figures"}}  # the same groups of tokens have the same colours
    for figures in (ROOT / "studies").glob("*_figures.py"):
        users = {path.stem for path, ours in OURS.items() if figures in ours}
        assert users == {"test_gradcam"} | others.get(figures.stem, set())


# what is copied


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A function that copies the lowest floors and imports from the copies only; what is imported is undone."""

    def copy(count):
        for place in sum(FLOORS[:count], []):
            path = ROOT / place
            shutil.copy(path, tmp_path) if path.suffix else shutil.copytree(path, tmp_path / place)
        for name in [name for name in sys.modules if name.split(".")[0] in MINE]:
            monkeypatch.delitem(sys.modules, name)
        rest = [path for path in sys.path if not Path(path).resolve().is_relative_to(ROOT)]
        monkeypatch.setattr(sys, "path", [str(tmp_path), *rest])
        importlib.invalidate_caches()
        names = [name for name, path in NAMES.items() if FLOOR[path] == count - 1]
        return [importlib.import_module(name) for name in names]

    before = dict(sys.modules)
    yield copy
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


@pytest.mark.parametrize("count", range(1, len(FLOORS) + 1), ids=["/".join(floor) for floor in FLOORS])
def test_a_floor_stands_on_those_below_it_alone(copied, tmp_path, count):
    for module in copied(count):
        assert Path(module.__file__).is_relative_to(tmp_path)


def test_the_core_alone_makes_the_map(copied, model, processor, image):
    given = (model, processor, image, "What is it?", [1])
    expected = compute_token_maps(*given, answer="the red cat", num_samples=2)
    (core,) = copied(1)
    found = core.compute_token_maps(*given, answer="the red cat", num_samples=2)
    assert type(found).__module__ == "smooth_gradcam"
    assert type(found) is not type(expected)
    assert expected.maps[1].any()
    np.testing.assert_array_equal(found.maps[1], expected.maps[1])


# sizes and names


def test_files_are_short():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in NAMES.items()}
    most = {name: MOST_LINES.get(name.split(".")[0], ANY_FILE) for name in NAMES}
    assert {name: count for name, count in lines.items() if count > most[name]} == {}


def test_every_module_says_what_it_offers_and_has_it():
    for name in NAMES:
        module = importlib.import_module(name)
        assert getattr(module, "__all__", []), name
        assert [missing for missing in module.__all__ if not hasattr(module, missing)] == []


def test_the_three_modules_offer_few_names():
    assert sum(len(importlib.import_module(name).__all__) for name in TOP) <= PUBLIC_NAMES
