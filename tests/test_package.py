"""The wheel: what is in it, and that it works where nothing else of the checkout is."""

import email
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import distattn
from tests.jobs import ended_well, inherited

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Return the output of a command, without the caller's paths and JAX settings in its environment."""
    env = inherited("PYTHONPATH", "PYTHONHOME", "XLA_FLAGS")
    done = ended_well(command, cwd=cwd, env=env, timeout_s=300)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ("build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    run(sys.executable, "-m", *build, cwd=folder)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Return the Python of an empty environment in which only the wheel is installed.

    It finds the dependencies of the running Python through a .pth file, without a network. The
    editable form of this checkout, in the same folder, stays hidden: a .pth file is not read in a
    folder that another one names.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    scripts, site = (Path(sysconfig.get_path(key, "venv", paths)) for key in ("scripts", "purelib"))
    exe = scripts / "python"
    install = ("--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    run(sys.executable, "-m", "pip", "--python", exe, "install", *install, cwd=folder)
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    return exe


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        info = f"distattn-{distattn.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        license_text = archive.read(f"{info}/licenses/LICENSE").decode()

    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "distattn").rglob("*.py")}
    data = {"distattn/py.typed", "distattn/local/kernels/block_sizes.json"}
    assert modules | data == {file for file in files if not file.startswith(info)}
    assert metadata["Version"] == distattn.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert license_text == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in license_text
    assert "END OF TERMS AND CONDITIONS" in license_text


def test_every_public_name_comes_from_the_installed_wheel(python, tmp_path):
    code = """
import importlib.metadata, pathlib, sys
import distattn
for name in distattn.__all__:
    getattr(distattn, name)
assert pathlib.Path(distattn.__file__).is_relative_to(sys.prefix), distattn.__file__
assert importlib.metadata.version("distattn") == distattn.__version__
print(*distattn.__all__)
"""
    assert run(python, "-c", code, cwd=tmp_path).split() == list(distattn.__all__)


def test_import_starts_no_backend_and_says_nothing(python, tmp_path):
    # The number of devices can be set only while no backend has started; nothing public tells it
    # more directly. JAX itself is imported first: what it logs is not ours.
    code = """
import logging
import jax
records = []
handler = logging.Handler(0)
handler.emit = records.append
logging.basicConfig(level=0, handlers=[handler])
import distattn
assert records == [], [record.getMessage() for record in records]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3
"""
    assert run(python, "-c", code, cwd=tmp_path) == ""
