"""README.md says what its notebook says, its links lead somewhere, and its commands are the ones
that are run."""
import re
import subprocess

import pytest
import typer.main
from readme import IMAGES, ROOT, render

README = (ROOT/"README.md").read_text(encoding="utf-8")

def block(name):
    "The fenced block after `<!-- command: NAME -->`"
    return re.search(rf"^<!-- command: {name} -->\n```sh\n(.*?)\n```$", README, re.M | re.S)[1]

def test_readme_is_the_notebook():
    text, images = render()
    assert text == README, "run python tests/readme.py"
    assert {ROOT / p: data for p, data in images.items()} == {
        p: p.read_bytes() for p in IMAGES.glob("index_*")
    }, "run python tests/readme.py"

def test_links_lead_somewhere():
    links = [
        link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not re.match(r"[a-z]+:|#", link)
    ]
    assert links and not [link for link in links if not (ROOT/link.split("#")[0]).exists()]
    pictures = [ROOT/link for link in links if link.endswith(".png")]
    assert pictures and all(p.stat().st_size < 200_000 for p in pictures)
    anchors = {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", README, re.M)
    }
    assert set(re.findall(r"\]\(#([^)\s]+)\)", README)) <= anchors

@pytest.mark.parametrize("name, last", [("main", "synthpi demo"), ("tests", "pytest")])
def test_commands_do_their_own_set_up(name, last):
    first, *_, end = block(name).split(" && ")
    assert (first, end) == ("python3 -m venv .venv", last)

@pytest.mark.parametrize("name", ["main", "tests"])
def test_the_newcomers_run_takes_its_commands_from_here(name):
    function = re.search(
        r"^command_of\(\).*?^}$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M | re.S
    )[0]
    found = subprocess.run(
        ["bash", "-c", f"{function}\ncommand_of {name}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert found.strip() == block(name)
    assert f"run {name}\n" in (ROOT/".ci/run").read_text(encoding="utf-8")

def test_the_workflow_runs_the_same_tests():
    assert f"- run: {block('tests')}\n" in (ROOT / ".github/workflows/test.yml").read_text(
        encoding="utf-8"
    )

def test_options_in_the_text_exist():
    from synthpi.cli import app
    commands = typer.main.get_command(app).commands
    shell = "\n".join(re.findall(r"```sh\n.*?```", README, re.S))
    used = [
        (m[1], set(re.findall(r"--[\w-]+", m[2])))
        for m in re.finditer(r"\bsynthpi (\w+)((?: [^\n`&]*)?)", shell)
    ]
    assert {"demo", "tissue"} <= {name for name, _ in used}
    for name, options in used:
        assert options <= {
            o for p in commands[name].params for o in (*p.opts, *p.secondary_opts)
        }, name
