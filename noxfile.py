"""Every check of the repository, one session each; `nox -l` is the manual.

A session does all of its set-up. The CPU sessions pin what they install in `constraints.txt`; the `gpu` sessions use
the Python they are run with, since driver, torch and NCCL belong to the machine.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
# In the order of their dependencies.
PACKAGES = ("deep_ep_core", "deep_ep_ep", "deep_ep_pp", "deep_ep_cp", "deep_ep_engram", "deep_ep_legacy")
CONSTRAINTS = ("-c", str(ROOT / "constraints.txt"))
# What a package may ask for besides its siblings.
ALLOWED_REQUIREMENTS = {
    "deep_ep_core": {"torch", "nvidia-ml-py", "platformdirs"},
    "deep_ep_ep": {"torch", "deep-ep-core", "nvidia-ml-py"},
    "deep_ep_pp": {"torch", "deep-ep-core"},
    "deep_ep_cp": {"torch", "deep-ep-core"},
    "deep_ep_engram": {"torch", "deep-ep-core"},
    "deep_ep_legacy": {"torch", "deep-ep-core"},
}

# pip finds a machine's own wheels and settings; uv would not look there.
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "tests", "docs", "wheels"]
nox.options.error_on_missing_interpreters = True


def install_tree(session: nox.Session, *extra: str) -> None:
    """Install all packages from the tree, editable, with what else the session needs."""
    packages = [f"packages/{name}{'[demo]' if name == 'deep_ep_ep' else ''}" for name in PACKAGES]
    editable = [argument for package in packages for argument in ("-e", package)]
    session.install("-q", *CONSTRAINTS, *editable, *extra)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small MoE language model with its experts on 4 ranks; ends non-zero if it differs from one process."""
    install_tree(session)
    session.run("python", "-m", "deep_ep_ep.demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests on CPU ranks; arguments after -- go to pytest."""
    install_tree(session, "pytest>=8", "pytest-timeout", "numpy")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install("-q", *CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of all public code with mypy --strict."""
    install_tree(session, "mypy")
    session.run("mypy", *[f"packages/{name}/src" for name in PACKAGES])


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation strictly: a broken link or a missing page is an error."""
    install_tree(session, "mkdocs", "mkdocs-material", "mkdocstrings[python]")
    session.run("mkdocs", "build", "--strict", "--site-dir", str(Path(session.create_tmp()) / "site"))


@nox.session
@nox.parametrize("package", PACKAGES)
def wheels(session: nox.Session, package: str) -> None:
    """Install one package alone from built wheels, away from the tree, import all of it and use it."""
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.install("-q", "build")
    # A package may bring its core, never a sibling.
    needed = ["deep_ep_core", package] if package != "deep_ep_core" else [package]
    for name in needed:
        session.run("python", "-m", "build", "-q", "--wheel", "--outdir", str(dist), f"packages/{name}", silent=True)
    third_party = sorted(set().union(*(ALLOWED_REQUIREMENTS[name] for name in needed)) - {"deep-ep-core"})
    session.install("-q", *CONSTRAINTS, *third_party)
    session.install("-q", "--no-index", "--find-links", str(dist), package.replace("_", "-"))
    siblings = ",".join(name for name in PACKAGES if name not in needed)
    allowed = ",".join(sorted(ALLOWED_REQUIREMENTS[package]))
    program = str(ROOT / "tests" / "programs" / "use_wheel.py")
    session.chdir(session.create_tmp())
    # -I keeps the tree and the user's site off the path.
    session.run("python", "-I", program, package, siblings, allowed)
    if package == "deep_ep_legacy":
        # Its extra: the names of V2 come from the sibling.
        sibling = str(ROOT / "packages" / "deep_ep_ep")
        session.run("python", "-m", "build", "-q", "--wheel", "--outdir", str(dist), sibling, silent=True)
        session.install("-q", *CONSTRAINTS, "nvidia-ml-py")
        session.install("-q", "--no-index", "--find-links", str(dist), "deep-ep-legacy[ep]")
        check = "import deep_ep, deep_ep_ep; assert deep_ep.ElasticBuffer is deep_ep_ep.ElasticBuffer"
        session.run("python", "-I", "-c", check)


@nox.session(venv_backend="none")
@nox.parametrize("num_ranks", [1, 2, 4, 8])
def gpu(session: nox.Session, num_ranks: int) -> None:
    """Run the GPU tests with the machine's own torch: with 1, all on one GPU; with more, those of one rank a GPU.

    Skips where there are too few GPUs. `python tests/multi_gpu/run.py` measures such a machine as well.
    """
    count = "import torch; print(torch.cuda.device_count())"
    output = session.run(sys.executable, "-c", count, silent=True, success_codes=[0, 1], external=True)
    num_gpus = int(output) if isinstance(output, str) and output.strip().isdigit() else 0
    if num_gpus < num_ranks:
        reason = f"needs {num_ranks} GPUs, has {num_gpus}"
        if os.environ.get("CI_REQUIRE_GPU") == "1":
            session.error(f"{reason}, and CI_REQUIRE_GPU=1 forbids to skip")
        session.skip(reason)
    plugin = str(ROOT / "tests" / "multi_gpu")
    paths = os.pathsep.join([plugin, *(str(ROOT / "packages" / name / "src") for name in PACKAGES)])
    # Ranks that share GPUs are tested on one GPU.
    options = ["-p", "one_rank_a_gpu"] if num_ranks > 1 else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--gpu-ranks", str(num_ranks), *options, *session.posargs]
    session.run(*command, env={"PYTHONPATH": paths}, external=True)
