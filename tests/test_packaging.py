"""The distribution is whole, its edges are light, and its texts agree with its version."""

import ast
import json
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
FOLDERS = [package.removeprefix("onlooker.") for package in PACKAGES]
HEAVY = {"torch", "transformers", "accelerate", "cv2", "av", "pydantic"}
# The files of tools/ that are loaded once `onlooker web` serves its page.
PAGE = {"web_page", "web_server"}
# What each folder may import of the others.
ALLOWED = {"protocol": set(), "node": {"protocol"}, "tools": {"protocol"}, "training": {"protocol", "node", "tools"}}
# The files of node/ that compute; all others run on a machine without torch.
COMPUTING = {
    *(
        "answer",
        "answering",
        "arena",
        "attention",
        "branch",
        "choice",
        "decoding",
        "engine",
        "forecast",
        "graphs",
        "local",
        "machine",
    ),
    *("memory", "pieces", "reading", "rehearsal", "shown", "storage"),
    *("model", "native_answers", "passes", "preprocess", "random_checkpoint", "reference", "verify", "vram"),
    *("bench", "bench_engine", "bench_naive", "bench_profile", "bench_report", "bench_wire"),
    *("ceilings", "published", "published_node", "stopwatch"),
    *("compilation", "language", "pace", "split_kv", "split_kv_kernels", "steps", "token_drop", "upload", "vision"),
}


def test_every_package_is_listed() -> None:
    found = {f"onlooker.{init.parent.name}" for init in ROOT.glob("*/__init__.py")}
    nested = [init for folder in FOLDERS for init in (ROOT / folder).glob("*/**/__init__.py")]
    assert found == set(PACKAGES)
    assert nested == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel that is built from the sdist, as a packager would."""
    work = tmp_path_factory.mktemp("dist")
    tree = work / "tree"
    tree.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    with tarfile.open(_build("build_sdist", tree, work)) as sdist:
        # Python 3.11 has filters from its fourth release on; others know no such attribute, and pass it by.
        sdist.extraction_filter = getattr(tarfile, "data_filter", None)
        sdist.extractall(work / "unpacked")
    (unpacked,) = (work / "unpacked").iterdir()
    with zipfile.ZipFile(_build("build_wheel", unpacked, work)) as built:
        return set(built.namelist())


def _build(hook: str, tree: Path, target: Path) -> Path:
    """Call a hook of the build backend in `tree`, and return the file it made."""
    call = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
    run = subprocess.run([sys.executable, "-c", call], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target / run.stdout.splitlines()[-1]


def test_the_wheel_holds_every_file_of_the_packages(wheel: set[str]) -> None:
    expected = {
        f"onlooker/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected == {name for name in wheel if ".dist-info/" not in name}


def test_the_wheel_holds_the_license(wheel: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_the_bare_install_needs_three_packages() -> None:
    names = {re.split(r"[<>=~! ]", requirement)[0] for requirement in PYPROJECT["project"]["dependencies"]}
    assert names == {"pyzmq", "msgspec", "numpy"}


def _loaded_by(folder: str, modules: set[str]) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after importing some modules of a folder."""
    names = ", ".join(f"onlooker.{folder}.{module}" for module in sorted(modules))
    code = f"import {names}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout)) & HEAVY


def _modules(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("__")}


def test_the_protocol_is_light() -> None:
    assert _loaded_by("protocol", _modules("protocol")) == set()


def test_the_tools_start_light() -> None:
    assert _loaded_by("tools", _modules("tools") - PAGE) == set()


def test_only_the_files_of_the_node_that_compute_load_torch() -> None:
    assert _modules("node") >= COMPUTING
    assert _loaded_by("node", _modules("node") - COMPUTING) & {"torch", "transformers", "accelerate"} == set()


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_between_folders_go_one_way(folder: str) -> None:
    imported = {name for path in (ROOT / folder).glob("*.py") for name in _folders_imported(path)}
    assert imported <= ALLOWED[folder]


def _folders_imported(path: Path) -> set[str]:
    """The other folders that a file imports from, at its top or within."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    relative = [node.module for node in nodes if node.level == 2 and node.module]
    absolute = [node.module for node in nodes if node.level == 0 and node.module]
    named = [module.removeprefix("onlooker.") for module in absolute if module.startswith("onlooker.")]
    return {module.partition(".")[0] for module in (*relative, *named)}


def test_help_takes_less_than_a_second_of_the_processor() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "onlooker.tools.cli", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_version_is_the_changelog_s_first() -> None:
    versions = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == PYPROJECT["project"]["version"]


def test_every_requirement_is_pinned() -> None:
    pinned = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    wanted = [*PYPROJECT["project"]["dependencies"], *(requirement for extra in extras for requirement in extra)]
    names = {_normal(re.split(r"[<>=~! \[]", requirement)[0]) for requirement in wanted}
    assert names - {_normal(name) for name in pinned} == {"onlooker"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
