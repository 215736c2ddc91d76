"""Every error code that a user can meet has its heading where the error's link points."""

import re
from pathlib import Path

from api.errors import STATUS
from tunery.states import FailureCode

ROOT = Path(__file__).parent.parent
HEADINGS = set(re.findall(r"^### (\w+)$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE))


def test_every_code_of_the_api_and_of_a_failed_job_is_explained():
    assert set(STATUS) - HEADINGS == set()
    assert set(FailureCode) - HEADINGS == set()


def test_every_code_of_the_command_line_is_explained():
    sources = [*(ROOT / "tunery/cli").glob("*.py"), *(ROOT / "tunery/client").glob("*.py")]
    codes = {code for path in sources for code in re.findall(r"code=\"([a-z_]+)\"", path.read_text())}
    assert len(codes) > 5
    assert codes - HEADINGS == set()


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
