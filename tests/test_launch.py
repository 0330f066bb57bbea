"""What stands in launch/ would start: its commands exist, its files are there, and its numbers agree."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import FakeEngine
from nodes import FREE_PORTS
from prometheus import needs_prometheus

from onlooker.node.__main__ import EXIT_CONFIG, _parser
from onlooker.node.config import load as load_config
from onlooker.node.node import ENGINE_CHECK_S, Node
from onlooker.node.state import MAX_PROGRESS_AGE_MS
from onlooker.tools.commands import COMMANDS, load
from onlooker.tools.metrics import LISTEN

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
UNITS = sorted((LAUNCH / "systemd").glob("*.service"))
COMPOSE = yaml.safe_load((LAUNCH / "compose.yaml").read_text())
DOCKERFILE = (LAUNCH / "Dockerfile").read_text()
DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")
OURS = {name: service for name, service in COMPOSE["services"].items() if service["image"].startswith("onlooker-")}


def check_command(arguments: list[str]) -> None:
    """Parse a command line of `onlooker` without running it; a mistake ends the test."""
    name, *rest = arguments
    assert name in COMMANDS
    if name == "node":
        _parser().parse_args(rest)
    else:
        load(name).make_context(name, rest)


def command_lines() -> list[str]:
    """Everything that a reader of the folder would paste."""
    texts = [README, *(path.read_text() for path in LAUNCH.rglob("*.toml"))]
    found = [re.findall(r"^(?:#? {4,}|)onlooker (.+)$|`onlooker ([^`]+)`", text, re.MULTILINE) for text in texts]
    return sorted({indented or quoted for lines in found for indented, quoted in lines})


@pytest.mark.parametrize("line", command_lines())
def test_a_command_that_is_shown_can_be_run(line: str) -> None:
    words = shlex.split(line.partition(" > ")[0], comments=True)
    if len(words) == 1:  # spoken of, not shown
        assert words[0] in COMMANDS
    else:
        check_command(words)


def test_commands_are_found() -> None:
    assert len(command_lines()) > 10


def test_what_the_readme_links_to_is_there() -> None:
    paths = [path for path in re.findall(r"\]\(([^)]+)\)", README) if not path.startswith("#")]
    assert all((LAUNCH / path).exists() for path in paths)
    titles = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", README, re.MULTILINE)}
    assert {anchor for anchor in re.findall(r"\]\(#([^)]+)\)", README)} <= titles


# systemd


def settings(unit: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_unit(tmp_path: Path, unit: Path) -> None:
    executable = shutil.which("true")
    assert executable
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"^(Exec\w+=[+-]*)\S+", rf"\g<1>{executable}", unit.read_text(), flags=re.MULTILINE))
    check = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (check.returncode, check.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_runs_a_command_that_there_is(unit: Path) -> None:
    executable, *arguments = shlex.split(settings(unit)["ExecStart"])
    assert executable == "/opt/onlooker/bin/onlooker"
    check_command(arguments)


def test_the_watchdog_waits_longer_than_an_engine_may_take_and_a_mistake_is_not_tried_again() -> None:
    node = settings(LAUNCH / "systemd" / "onlooker.service")
    assert node["Type"] == "notify"
    assert float(node["WatchdogSec"]) > MAX_PROGRESS_AGE_MS / 1e3 + 2 * ENGINE_CHECK_S
    assert int(node["RestartPreventExitStatus"]) == EXIT_CONFIG


# Docker


def test_the_images_hold_every_package_and_their_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert all((ROOT / source).exists() for source in sources)
    assert sources >= {name.removeprefix("onlooker.") for name in project["tool"]["setuptools"]["packages"]}
    assert sources == {
        line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    extras = {extra for extras in re.findall(r"\.whl\)\[([^]]+)\]", DOCKERFILE) for extra in extras.split(",")}
    assert {"node", "tools", "metrics"} <= extras <= set(project["project"]["optional-dependencies"])


def test_the_commands_of_the_images_can_be_run() -> None:
    for command in re.findall(r"^CMD (\[.+\])$", DOCKERFILE, re.MULTILINE):
        arguments = json.loads(command)
        if arguments != ["--help"]:
            check_command(arguments)
    health = re.findall(r"^    CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    assert [json.loads(command)[:2] for command in health] == [["python", "-c"]]


def test_an_image_is_healthy_if_the_node_is_ready() -> None:
    """There is no node at the default address of a test, so it must not be."""
    (command,) = re.findall(r"^    CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    code = json.loads(command)[2].replace("C()", "C('ipc:///nowhere/at/all', 'ipc:///nowhere/else')")
    code = code.replace("timeout_s=5", "timeout_s=0.05")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "NoReplyError" in run.stderr


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_service_belongs_to_a_profile_and_finds_its_files(name: str) -> None:
    service = COMPOSE["services"][name]
    assert set(service["profiles"]) <= {"cpu", "gpu", "cameras", "monitoring"}
    mounted = [volume.split(":")[0] for volume in service.get("volumes", [])]
    assert all((LAUNCH / path).exists() if path.startswith(".") else path in COMPOSE["volumes"] for path in mounted)


@pytest.mark.parametrize("name", OURS)
def test_a_service_of_ours_is_built_and_runs_a_command_that_there_is(name: str) -> None:
    build: dict[str, Any] = OURS[name]["build"]
    assert (LAUNCH / build["context"] / build["dockerfile"]).read_text() == DOCKERFILE
    assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, re.MULTILINE)
    check_command([DEFAULT.sub(r"\1", str(word)) for word in OURS[name]["command"]])


def test_prometheus_asks_where_the_exporter_listens_and_grafana_where_prometheus_does() -> None:
    services = COMPOSE["services"]
    scraped = yaml.safe_load((LAUNCH / "prometheus" / "prometheus.yml").read_text())
    (targets,) = scraped["scrape_configs"][0]["static_configs"]
    assert targets["targets"] == [LISTEN] == [services["metrics"]["command"][2]]
    (source,) = yaml.safe_load((LAUNCH / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in services["prometheus"]["command"]
    (provider,) = yaml.safe_load((LAUNCH / "grafana" / "dashboards.yaml").read_text())["providers"]
    assert any(f"{provider['options']['path']}/onlooker.json" in volume for volume in services["grafana"]["volumes"])


@needs_prometheus
def test_promtool_takes_the_configuration() -> None:
    check = subprocess.run(
        ["promtool", "check", "config", str(LAUNCH / "prometheus" / "prometheus.yml")], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


# The two cameras


def test_a_node_with_two_cameras_starts() -> None:
    config = load_config(LAUNCH / "two_cameras.toml", FREE_PORTS | {"limits.max_memory_bytes": "4GiB"})
    with FakeEngine() as engine, Node(config, engine):
        assert sorted(engine.streams()) == ["front", "yard"]
