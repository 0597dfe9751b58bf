"""The site of the docs: every page is in it, every link holds, and the quick start's examples run."""

import importlib.util
import math
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import quickstart_ranks
import torch
import yaml
from kept_ranks import run_ranks
from patience import patient

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
REMOTE = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
    r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
    r"|url\([\"']?(?:https?:)?//"
)


# ---- pages and links -------------------------------------------------------------------------------


def pages_of(nav):
    for entry in nav:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages_of(target)


def test_the_navigation_names_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(nav)) == [page.name for page in PAGES]


def anchors(page):
    """As mkdocs makes them of headings."""
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = unicodedata.normalize("NFKD", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
        words = re.sub(r"[^\w\s-]", "", text.encode("ascii", "ignore").decode()).strip().lower()
        yield re.sub(r"[-\s]+", "-", words)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_and_anchors_hold(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}: there is no such heading"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install '.[docs]'")
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patient(120))
    assert done.returncode == 0, done.stdout + done.stderr
    for file in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        assert not REMOTE.search(file.read_text()), f"{file.name} fetches something"
    api = (tmp_path / "api.html").read_text()
    assert "momentum_dtype" in api
    # Docstrings are read as Markdown: no role of Sphinx, and no power that would be bold.
    assert not re.search(r":(?:attr|class|func|meth|mod):|<strong>", api)


# ---- the quick start -------------------------------------------------------------------------------


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


START, *SECTIONS = re.split(r"^## ", (DOCS / "quickstart.md").read_text(), flags=re.MULTILINE)
EXAMPLES = {
    section.splitlines()[0]: (python, blocks("json", section))
    for section in SECTIONS
    for python in blocks("python", section)
}
ON_RANKS = {"FSDP2", "DeepSpeed"}


def run(title, folder):
    """Run an example after the lines that every one begins with, as the page has both."""
    python, configs = EXAMPLES[title]
    for config in configs:
        (folder / "deepspeed.json").write_text(config)
    (start,) = blocks("python", START)
    arguments = (start + python, str(folder))
    if title in ON_RANKS:
        return run_ranks(quickstart_ranks.train, 2, *arguments)
    return [quickstart_ranks.train(*arguments)]


def test_every_example_of_the_quick_start_is_run_here():
    assert set(EXAMPLES) == {
        *ON_RANKS,
        "PyTorch",
        "Accelerate",
        "Hugging Face Trainer",
        "See what you have",
    }
    assert sum(len(blocks("python", section)) for section in SECTIONS) == len(EXAMPLES)


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_of_the_quick_start_trains_with_novograd(title, tmp_path, request):
    if title == "DeepSpeed":
        request.getfixturevalue("deepspeed_operation")
    if title == "FSDP2" and torch.cuda.is_available():
        pytest.skip("as it stands the example is for CPUs: fully_shard moves the model to the GPU")
    for result in run(title, tmp_path):
        assert result["optimizer"] == "novoscale.optimizer.novograd.NovoGrad"
        assert set(result["preset"]) == {"adamw"}
        assert set(result["momentum_dtype"]) == {"int8"}
        if title != "See what you have":  # which only prints
            assert result["layers"] > 0
            assert math.isfinite(result["loss"])
