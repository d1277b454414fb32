"""The files of ``docker/``, read and compared with the package: nothing is built here.

What pip does in the image runs in ``.ci/run``, whose lines are compared with the Dockerfile's.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from prompt_lab.__main__ import COMMANDS, TRAINER_COMMANDS, make_parser
from prompt_lab.commands.fit import ParseOnly

tomllib = pytest.importorskip("tomllib", reason="the pins are for Python 3.11 and newer")

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with their words, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [tuple(line.split(None, 1)) for line in joined if line.strip()]


def given(name: str) -> list[str]:
    """What follows each instruction of a name."""
    return [rest for instruction, rest in instructions() if instruction == name]


def pins() -> dict[str, Version]:
    """The versions of ``constraints.txt`` by canonical name."""
    lines = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines if line[:1] != "#"]
    assert all(found)
    versions = {canonicalize_name(pin[1]): Version(pin[2]) for pin in found if pin}
    assert len(versions) == len(found)
    return versions


def dependencies() -> list[Requirement]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [Requirement(line) for line in content["project"]["dependencies"]]


# ---- the Dockerfile ------------------------------------------------------------------------------


def test_every_file_that_is_copied_is_there_and_reaches_the_builder():
    """Reference: .dockerignore leaves out all but the lines that begin with !."""
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if "!" in line]
    copied = [source for line in given("COPY") for source in shlex.split(line)[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert any(Path(source).is_relative_to(name) for name in sent)


def test_the_image_installs_by_the_lines_that_run_before_every_test():
    lines = [line for line in given("RUN") if "pip" in line]
    assert lines == re.findall(r"^pip install.*", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert all(line.startswith("pip install -c docker/constraints.txt ") for line in lines[:-1])
    assert lines[-1] == "pip install --no-deps ."
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0


def test_the_image_runs_prompt_lab_as_a_user_without_rights():
    (user,) = given("USER")
    assert user != "root"
    assert re.search(rf"useradd --uid [1-9]\d{{3,}} .*\b{user}\b", DOCKERFILE)
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert given("ENTRYPOINT") == ['["prompt-lab"]']


def test_the_hub_cache_and_the_runs_are_volumes_that_every_service_has():
    kept = yaml.safe_load(given("VOLUME")[0])
    assert f"HF_HOME={kept[0]}" in given("ENV")
    assert kept[1] == f"{given('WORKDIR')[-1]}/runs"
    for service in SERVICES.values():
        volumes = service["volumes"]
        targets = [v.split(":")[1] if isinstance(v, str) else v["target"] for v in volumes]
        assert set(targets) >= set(kept)


def test_images_have_a_tag_that_stays():
    images = [*given("FROM"), *(service["image"] for service in SERVICES.values())]
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+", image) for image in images)
    assert not [image for image in images if image.endswith(":latest")]
    assert all(re.search(r":\d+\.\d+\.\d+-", image) for image in given("FROM"))


def test_no_secret_is_written_down():
    words = [word for name in ("ENV", "ARG") for line in given(name) for word in shlex.split(line)]
    assert not [word for word in words if SECRET.search(word.split("=")[0])]
    for service in SERVICES.values():
        variables = service["environment"]
        names = list(variables) if isinstance(variables, dict) else []
        assert not [name for name in names if SECRET.search(name)]
        assert not [word for word in variables if "=" in word]


# ---- the constraints -----------------------------------------------------------------------------


def test_dependencies_and_what_they_need_are_pinned_within_their_bounds():
    """Reference: the requirements of those of the pinned libraries that are installed here."""
    versions, waiting, seen = pins(), dependencies(), set()
    for dependency in waiting:
        pin = versions[canonicalize_name(dependency.name)]
        assert dependency.specifier.contains(pin)
        assert pin.local is None  # so that it fits the CUDA build and the CPU build of torch
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), ("", *sorted(requirement.extras))
        assert name in versions
        if (name, extras) in seen or not is_installed(name, versions[name]):
            continue
        seen.add((name, extras))
        waiting += [
            other
            for other in map(Requirement, requires(name) or [])
            if other.marker is None or any(other.marker.evaluate({"extra": e}) for e in extras)
        ]


def is_installed(name: str, pin: Version) -> bool:
    try:
        return Version(version(name)).public == pin.public
    except PackageNotFoundError:
        return False


# ---- the commands --------------------------------------------------------------------------------


def documented() -> list[str]:
    """What the ``docker run`` lines in the comments give to ``prompt-lab``."""
    text = re.sub(r"^#? *", "", f"{DOCKERFILE}\n{COMPOSE}", flags=re.MULTILINE)
    text = re.sub(r"\\\n", "", text)
    return re.findall(r"^docker run .* prompt-lab:local (.*)", text, re.MULTILINE)


def test_every_command_parses(monkeypatch):
    """The words that the services and the comments give to ``prompt-lab``."""
    monkeypatch.chdir(ROOT)
    own = [service["command"] for service in SERVICES.values() if "entrypoint" not in service]
    for words in [*own, *map(shlex.split, documented())]:
        if words[0] in COMMANDS.keys() - TRAINER_COMMANDS.keys():
            assert Path(make_parser(words[0]).parse_args(words[1:]).file).is_file()
        else:
            config = ParseOnly(words).config
            assert config[config.subcommand].run_dir.startswith("runs/")


def test_there_are_services_for_one_gpu_several_gpus_and_sweeps():
    def gpus(name: str) -> Any:
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        return device["count"]

    assert len(documented()) == 2
    assert (gpus("gpu"), gpus("gpus"), gpus("agent")) == (1, "all", 1)
    assert SERVICES["gpus"]["command"][-4:] == [
        *("--trainer.devices", "auto"),
        *("--trainer.strategy", "ddp"),
    ]
    assert "shm_size" in SERVICES["gpus"]
    assert SERVICES["quickstart"]["network_mode"] == "none"
    assert SERVICES["agent"]["entrypoint"] == ["wandb", "agent"]
    assert {"WANDB_API_KEY", "WANDB_MODE"} <= set(SERVICES["agent"]["environment"])
    for service in SERVICES.values():
        build = service["build"]
        assert (ROOT / "docker" / build["context"] / build["dockerfile"]).is_file()
        assert service["init"]
