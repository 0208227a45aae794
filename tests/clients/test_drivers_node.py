"""node's `pg` through the proxy, with its defaults; each case is in node/cases.mjs.

Skipped where node, npm or their registry is missing, unless `--require-node` says that it may not be.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from front import Front

SCRIPTS = Path(__file__).parent / "node"
CASES = (
    "values",
    "errors",
    "transactions",
    "named",
    "pool",
    "cursors",
    "copies",
    "notifications",
    "cancel",
    "torn",
)


@pytest.fixture(scope="session")
def scripts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the scripts with their packages installed."""
    folder = tmp_path_factory.mktemp("node")
    problem = "node and npm are not installed"
    if shutil.which("node") and shutil.which("npm"):
        for name in ("package.json", "cases.mjs"):
            shutil.copy(SCRIPTS / name, folder)
        try:
            install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
            done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
            problem = "" if done.returncode == 0 else f"npm install failed: {done.stderr}"
        except subprocess.TimeoutExpired:
            problem = "npm install did not end within 120 s"
    if problem:
        (pytest.fail if request.config.getoption("--require-node", default=False) else pytest.skip)(problem)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_node_pg(scripts: Path, front: Front, case: str) -> None:
    done = subprocess.run(
        ["node", "cases.mjs", case],
        cwd=scripts,
        env=front.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_case_of_the_script_is_run() -> None:
    text = (SCRIPTS / "cases.mjs").read_text()
    found = [line.split()[1].split("(")[0] for line in text.splitlines() if line.startswith("  async ")]
    assert tuple(found) == CASES
