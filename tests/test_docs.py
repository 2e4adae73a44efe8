"""The documentation builds: nbdev's own processing of every page, the real _quarto.yml, and quarto
itself where there is one."""
import ast
import json
import posixpath
import re
import shutil
import sys
from pathlib import Path
from subprocess import run
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from nbconvert import HTMLExporter

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
REPOSITORY, DOCS = (
    re.search(rf'^{key} = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    for key in ("Repository", "Documentation")
)

@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    "A copy of the repository as nbdev-docs hands it to quarto, without needing quarto"
    src = tmp_path_factory.mktemp("src")
    for name in ("nbs", "synthpi", "pyproject.toml", "_quarto.yml", "settings.ini", "CHANGELOG.md"):
        p = ROOT/name
        shutil.copytree(p, src/name) if p.is_dir() else shutil.copy2(p, src/name)
    process = (
        "from nbdev.serve import proc_nbs; from nbdev.quarto import refresh_quarto_yml as r; r(); "
        "proc_nbs(n_workers=0)"
    )
    run([sys.executable, "-c", process], cwd=src, check=True)
    return src/"_proc"

def _hrefs(x):
    if isinstance(x, dict):
        for k, v in x.items(): yield from [v] if k == "href" and isinstance(v, str) else _hrefs(v)
    elif isinstance(x, list):
        for v in x:
            yield from (
                [v] if isinstance(v, str) and re.search(r"\.(ipynb|qmd|md)$", v) else _hrefs(v)
            )

def test_every_page_is_rendered_and_in_the_sidebar():
    nbs = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if not any(o[0] in "._" for o in p.relative_to(ROOT).parts)
    }
    rendered = {
        p.relative_to(ROOT).as_posix() for g in SITE["project"]["render"] for p in ROOT.glob(g)
    }
    assert rendered == nbs | {"CHANGELOG.md"}
    assert sorted(_hrefs(SITE["website"]["sidebar"])) == sorted(rendered)
    assert len({s["id"] for s in SITE["website"]["sidebar"]}) == len(SITE["website"]["sidebar"]), (
        "several sidebars need ids"
    )

def test_the_parts_of_the_site_can_be_reached_from_everywhere():
    entries = {e["text"]: e["href"] for e in SITE["website"]["navbar"]["left"]}
    assert list(entries) == [
        "Home",
        "Get started",
        "Tutorials",
        "Evidence",
        "API",
        "About the methods",
        "Benchmarks",
        "Changelog",
    ]
    for sidebar in SITE["website"]["sidebar"]:
        inside = [*_hrefs(sidebar)]
        assert inside[0] in entries.values(), (
            f"{sidebar['id']}: the first page is what the navbar opens"
        )
    folders = {
        s["id"]: {h.split("/")[1] for h in _hrefs(s)}
        for s in SITE["website"]["sidebar"]
        if s["id"] in ("tutorials", "evidence")
    }
    assert folders == {"tutorials": {"tutorials"}, "evidence": {"evidence"}}
    html = SITE["format"]["html"]
    assert (
        SITE["website"]["navbar"]["search"]
        and html["code-copy"]
        and {*html["theme"]} == {"light", "dark"}
        and SITE["website"]["repo-actions"] == ["issue"]
        and SITE["website"]["page-footer"]
    )

@pytest.mark.slow
def test_every_page_becomes_html(pages):
    for p in sorted(pages.glob("nbs/**/*.ipynb")):
        nb = nbformat.read(p, as_version=4)
        keep = {
            "id",
            "cell_type",
            "metadata",
            "source",
            "outputs",
            "execution_count",
            "attachments",
        }
        # nbdev's own marks are not part of the format
        for c in nb.cells: [c.pop(k) for k in set(c) - keep] + [c.metadata.pop("execution", None)]
        html, _ = HTMLExporter().from_notebook_node(nb)
        assert "<h1" in html or "output-file" in html, p

def test_every_page_about_synthetic_images_says_what_they_are():
    about = [
        "index",
        "get_started",
        "methods",
        "models/cards",
        "tutorials/does_it_help",
        "tutorials/siamese_or_trident",
        "tutorials/make_and_judge",
        "tutorials/your_own_data",
        "evidence/tiles",
        "pairs/*",
        "studies/generator",
        "studies/synthesise",
        "studies/pretraining",
        "studies/tissue/arms",
        "studies/tissue/study",
        "studies/tissue/report",
        "cli/tissue",
    ]
    silent = [
        p.name
        for g in about
        for p in (ROOT / "nbs").glob(f"{g}.ipynb")
        if "Synthetic images are training aids, not findings" not in p.read_text(encoding="utf-8")
    ]
    assert not silent

# ---- every link and image leads somewhere

class Page:
    """What of a page other pages can link to, and what it links to itself: `cells` is a list of
    (markdown, attachments)"""
    def __init__(self, cells):
        self.text = "\n\n".join(source for source, _ in cells)
        self.attachments = {name for _, names in cells for name in names}
        plain = re.sub(
            r"<!--.*?-->",
            "",
            re.sub(r"^ *(```+|~~~+).*?^ *\1", "", self.text, flags=re.M | re.S),
            flags=re.S,
        )
        self.anchors = _anchors(plain)
        plain = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", plain, flags=re.S)
        inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)", plain)
        self.links = [
            *inline,
            *re.findall(r"^ *\[[^\]]+\]:\s*(\S+)", plain, re.M),
            *re.findall(r"<(?:a|img|source|video)\b[^>]*?\b(?:href|src)=[\"']([^\"']+)", plain),
            *re.findall(r"<(https?://[^>\s]+)>", plain),
        ]

def _anchors(text):
    """What pandoc calls the headings of a page: lower case, letters, digits and `_-.`, from the
    first letter on, counted when they repeat; and ids given by hand"""
    found = []
    for heading in re.findall(r"^ {0,3}#{1,6} +(.+?)(?: +#+)? *$", text, re.M):
        by_hand = re.search(r"\{#([\w.-]+)[^}]*\}$", heading)
        heading = re.sub(
            r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"\s*\{[^}]*\}$|<[^>]+>", "", heading)
        )
        # pandoc makes dashes of them
        heading = re.sub(r"--+", "", re.sub(r"\\(.)", r"\1", heading))
        slug = "-".join(re.sub(r"[^\w\s.-]", "", heading).lower().split())
        slug = by_hand[1] if by_hand else re.sub(r"^[^a-z]+", "", slug) or "section"
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
        if slug != found[-1]: found.append(slug)
    return {*found, *re.findall(r"<[^>]+\bid=[\"']([^\"']+)", text)}

def _of_notebook(path):
    "The page of a notebook, its front matter as the heading, and what it is called on the site"
    nb = nbformat.read(path, 4)
    cells = [(c.source, [*c.get("attachments", {})]) for c in nb.cells if c.cell_type == "markdown"]
    cells += [
        ("".join(o.data["text/markdown"]), [])
        for c in nb.cells
        for o in c.get("outputs", [])
        if "text/markdown" in o.get("data", {})
    ]
    front = (
        yaml.safe_load(nb.cells[0].source.strip().strip("-"))
        if nb.cells[0].cell_type == "raw"
        else {}
    )
    return Page([*cells, (f"# {front['title']}", [])] if front.get("title") else cells), (
        front or {}
    ).get("output-file", path.with_suffix(".html").name)

def _broken(link, here, site, names, files, on_site=True):  # noqa: C901 one branch a kind of link
    """Why a link on the page `here` leads nowhere, or None. `site`: pages by path; `names`: paths
    by the page's name on the site; `files`: what the repository holds; `on_site=False`: a text
    that is read in the repository"""
    if re.match(r"https?:", link):
        url = urlsplit(link)
        for base, kind in (
            (DOCS, "page"),
            (f"{REPOSITORY}/blob/main", "file"),
            (f"{REPOSITORY}/tree/main", "file"),
            ("https://colab.research.google.com/github/synthpi/synthpi/blob/main", "file"),
        ):
            if not (link + "/").startswith(base + "/"):
                continue
            rest = unquote(url.path[len(urlsplit(base).path) :]).strip("/")
            if kind == "file":
                return (
                    None
                    if rest in files or any(f.startswith(rest + "/") for f in files)
                    else f"{rest} is not in the repository"
                )
            rest = rest.removesuffix(".md") if rest.endswith(".html.md") else rest
            if not rest:
                return None
            if rest not in names:
                return f"{rest} is no page of the site"
            # nbdev links methods and private names in backticks to their module's page, where they
            # have no heading of their own
            of_a_name = re.match(r"_|\w+\.", url.fragment)
            return (
                None
                if not url.fragment or of_a_name or url.fragment in site[names[rest]].anchors
                else f"{rest} has no heading #{url.fragment}"
            )
        good = re.fullmatch(r"([\w-]+\.)+[a-z]{2,}(:\d+)?", url.netloc) and not re.search(
            r"example\.(com|org)|OWNER|USER|[<>{}\s]", link
        )
        return None if good else "is not a well-formed address"
    if link.startswith("mailto:"): return None
    if re.match(r"[a-z][a-z+.-]*:", link):
        return (
            None
            if link.startswith("attachment:") and unquote(link[11:]) in site[here].attachments
            else "attachment that is not there"
            if link.startswith("attachment:")
            else "an address of an unknown kind"
        )
    target, _, anchor = link.partition("#")
    path = (
        posixpath.normpath(posixpath.join(posixpath.dirname(here), unquote(target)))
        if target
        else here
    )
    if on_site: path = names.get(path, path)
    if path.startswith(".."): return "leaves the repository"
    if re.search(r"\.(png|svg|jpe?g|gif|webp)$", path):
        return None if path in files else "no such picture"
    if not on_site and path not in files and not any(f.startswith(path + "/") for f in files):
        return f"{path} is not in the repository"
    if path not in site: return f"{path} is not a page of the site" if on_site else None
    return (
        None if not anchor or anchor in site[path].anchors else f"{path} has no heading #{anchor}"
    )

@pytest.fixture(scope="session")
def site():
    """All pages and the texts of the repository, by path; what each
    page is called on the site; what the repository holds"""
    site, names = {}, {}
    for p in sorted((ROOT/"nbs").rglob("*.ipynb")):
        path = p.relative_to(ROOT).as_posix()
        site[path], name = _of_notebook(p)
        name = posixpath.join(posixpath.dirname(path), name)
        assert name not in names, f"{path} and {names.get(name)} would both be {name}"
        names[name] = path
    site["CHANGELOG.md"], names["CHANGELOG.html"] = (
        Page([((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), [])]),
        "CHANGELOG.md",
    )
    listed = run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    files = (
        set(listed.stdout.split("\n"))
        if listed.returncode == 0
        else {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file()}
    )
    return site, names, files

def test_links_of_every_page_lead_somewhere(site):
    pages_, names, files = site
    assert sum(len(page.links) for page in pages_.values()) > 400
    assert not [
        f"{here}: {link}: {why}"
        for here, page in pages_.items()
        for link in page.links
        if (why := _broken(link, here, pages_, names, files))
    ]

@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_texts_lead_somewhere(text, site):
    pages_, names, files = site
    page = Page([((ROOT/text).read_text(encoding="utf-8"), [])])
    assert not [
        f"{link}: {why}"
        for link in page.links
        if (why := _broken(link, text, pages_ | {text: page}, names, files, on_site=False))
    ]

def test_links_of_the_frame_lead_somewhere(site):
    "Navbar, footer: addresses in _quarto.yml"
    pages_, names, files = site
    links = [h for part in ("navbar", "page-footer") for h in _hrefs(SITE["website"][part])]
    assert links and not [
        f"{link}: {why}"
        for link in links
        if (why := _broken(link, "_quarto.yml", pages_, names, files))
    ]

SMALL = {
    "nbs/a.ipynb": Page(
        [
            (
                "# A page\n\n## What's 2.5x, `code_x` & more?\n## Twice\n## Twice\n## 3. Third "
                "{#mine}\n![p](attachment:p.png)",
                ["p.png"],
            )
        ]
    ),
    "nbs/02_b.ipynb": Page([("### show_it\n", [])]),
}
NAMES, FILES = (
    {"nbs/a.html": "nbs/a.ipynb", "nbs/b.html": "nbs/02_b.ipynb"},
    {"nbs/a.ipynb", "nbs/02_b.ipynb", "nbs/images/p.png", "tests/t.py", "CITATION.cff"},
)

@pytest.mark.parametrize(
    "link",
    [
        "02_b.ipynb",
        "02_b.ipynb#show_it",
        "b.html",
        "b.html#show_it",
        "#whats-2.5x-code_x-more",
        "#twice-1",
        "#mine",
        "#a-page",
        "images/p.png",
        "../nbs/a.ipynb",
        "attachment:p.png",
        "mailto:a@b.c",
        "{docs}",
        "{docs}/nbs/b.html#show_it",
        "{docs}/nbs/b.html.md",
        "{repo}/blob/main/CITATION.cff",
        "{repo}/tree/main/tests",
        "{repo}/issues",
        "https://arxiv.org/abs/2403.05220",
        "https://colab.research.google.com/github/synthpi/synthpi/blob/main/nbs/a.ipynb",
    ],
)
def test_a_good_link_is_taken(link):
    assert (
        _broken(link.format(docs=DOCS, repo=REPOSITORY), "nbs/a.ipynb", SMALL, NAMES, FILES) is None
    )

@pytest.mark.parametrize(
    "link",
    [
        "b.ipynb",
        "02_b.ipynb#show",
        "02_b.html",
        "b.html#nothing",
        "#twice-2",
        "#third",
        "#3.-third",
        "images/q.png",
        "attachment:q.png",
        "../../a.ipynb",
        "../tests/t.py",
        "nbs/a.ipynb",
        "javascript:x",
        "{docs}/nbs/02_b.html",
        "{docs}/nbs/b.html#nothing",
        "{repo}/blob/main/LICENCE",
        "{repo}/tree/main/tests2",
        "https://github.com/OWNER/x",
        "https://nothing",
        "http:/arxiv.org/abs/1",
        "https://example.org",
        "https://colab.research.google.com/github/synthpi/synthpi/blob/main/nbs/q.ipynb",
    ],
)
def test_a_broken_link_is_found(link):
    assert _broken(link.format(docs=DOCS, repo=REPOSITORY), "nbs/a.ipynb", SMALL, NAMES, FILES)

def test_every_way_to_write_a_link_is_seen():
    text = (
        "[a](1.ipynb) ![b](2.png) [c](<3.ipynb> 'title') <img src='4.png'> <a "
        "href=\"5.html\">x</a> [d]: no\n\n[e]: 6.ipynb\n\n[![f](7.svg)](8.html) "
        "<https://nine.org>\n```md\n[x](no.ipynb)\n```\n`[y](no.ipynb)` <!-- [z](no.ipynb) -->"
    )
    assert sorted(Page([(text, [])]).links) == [
        "1.ipynb",
        "2.png",
        "3.ipynb",
        "4.png",
        "5.html",
        "6.ipynb",
        "7.svg",
        "8.html",
        "https://nine.org",
    ]

def _public(module):
    "The functions and classes that `module` exports, read without importing it"
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = next(
        ast.literal_eval(s.value)
        for s in tree.body
        if isinstance(s, ast.Assign) and s.targets[0].id == "__all__"
    )
    return {s.name for s in tree.body if isinstance(s, (ast.FunctionDef, ast.ClassDef))} & set(
        names
    )

@pytest.mark.slow
def test_every_public_name_is_documented(pages):
    shown = "".join(p.read_text(encoding="utf-8") for p in pages.glob("nbs/**/*.ipynb"))
    public = {
        (m.stem, name)
        for m in (ROOT / "synthpi").rglob("*.py")
        if m.name[0] != "_"
        for name in _public(m)
    }
    assert public and not {(m, name) for m, name in public if f"show_doc({name})" not in shown}

@pytest.mark.slow
def test_every_signature_is_shown(pages):
    """A default whose truth is not defined, an array for example, makes show_doc leave nothing and
    no error"""
    cells = [
        (p.stem, c)
        for p in pages.glob("nbs/**/*.ipynb")
        for c in nbformat.read(p, 4).cells
        if c.cell_type == "code" and "show_doc(" in c.source
    ]
    assert len(cells) > 200 and not [
        (page, c.source)
        for page, c in cells
        if not any(
            "```python" in "".join(o.get("data", {}).get("text/markdown", "")) for o in c.outputs
        )
    ]

# ---- an API page teaches

API = [
    p
    for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if p.stem != "index" and "default_exp" in p.read_text(encoding="utf-8")
]
LESSON = re.compile(r"\bassert |\btest_(eq|close|ne|fail|warns|stdout)\(|\bexpect_fail\(")

def _cells(path):
    return [
        (c["cell_type"], "".join(c["source"]), c.get("outputs", []))
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if "".join(c["source"]).strip()
    ]

IMPORTS = re.compile(r"((from|import) .*\n?|\n| .*\n?)*")

def _untold(cells):
    """First lines of exported cells that no prose leads up to: since the last lesson, or for a
    whole row of more than four"""
    told, row, found = False, 0, []
    for kind, source, _ in cells:
        if kind == "markdown":
            if not all(
                re.match(r"#+ |#\|", line) or not line.strip() for line in source.splitlines()
            ):
                told, row = True, 0
        elif re.match(r"#\| *export\b", source):
            body = re.sub(r"^#\|.*\n", "", source)
            if not re.search(r"^(def|class|@|\w+ *=)", body, re.M): continue      # imports
            row += 1
            if not told or row > 4: found.append(body.split("\n")[0])
        elif not source.startswith("#|") and not IMPORTS.fullmatch(source): told, row = False, 0
    return found

@pytest.mark.parametrize("path", API, ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_an_api_page_teaches(path):
    cells = _cells(path)
    module = ROOT/"synthpi"/path.relative_to(ROOT/"nbs").with_suffix(".py")
    assert re.match(r"# \S.*\n+> \S", cells[1][1]), "a title, and in one line what the module is"
    assert len(ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "") > 150, (
        "a summary, which is also the module's docstring"
    )
    assert not _untold(cells), "why comes before what: prose leads up to every exported cell"
    lessons = [
        source
        for kind, source, _ in cells
        if kind == "code" and not re.match(r"#\| *export\b", source) and LESSON.search(source)
    ]
    assert lessons, "a lesson that would fail if the code were wrong"
    assert any(outputs for kind, source, outputs in cells), (
        "a figure or a value is shown, and stored"
    )
    assert not any(o["output_type"] == "error" for *_, outputs in cells for o in outputs)

@pytest.mark.parametrize(
    "cells, found",
    [
        ([("markdown", "why", 0), ("code", "#| export\ndef f(): pass", 0)], []),
        (
            [("markdown", "## Only a heading", 0), ("code", "#| export\ndef f(): pass", 0)],
            ["def f(): pass"],
        ),
        ([("code", "#| export\nimport x", 0)], []),
        (
            [
                ("markdown", "why", 0),
                ("code", "assert f()", 0),
                ("code", "#| export\nclass A: pass", 0),
            ],
            ["class A: pass"],
        ),
        (
            [
                ("markdown", "why", 0),
                ("code", "#| hide\nimport x", 0),
                ("code", "#| export\nA = 1", 0),
            ],
            [],
        ),
        (
            [
                ("markdown", "why", 0),
                *[("code", f"#| export\ndef f{k}(): pass", 0) for k in range(5)],
            ],
            ["def f4(): pass"],
        ),
    ],
)
def test_exported_cells_without_prose_are_found(cells, found): assert _untold(cells) == found

# ---- benchmarks, citation, workflow

def test_the_benchmarks_page_shows_the_stored_numbers():
    sys.path.insert(0, str(ROOT/"tests/benchmarks"))
    try: import table
    finally: sys.path.pop(0)
    nb = nbformat.read(ROOT/"nbs/benchmarks.ipynb", 4)
    shown = "\n".join(
        "".join(o.data["text/markdown"])
        for c in nb.cells
        for o in c.get("outputs", [])
        if "text/markdown" in o.get("data", {})
    )
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    for path in sorted((ROOT/"tests/benchmarks/results").glob("*.json")):
        r = json.loads(path.read_text(encoding="utf-8"))
        assert not [line for line in getattr(table, r["benchmark"])(r) if line not in shown], (
            f"{path.name} is newer: run nbs/benchmarks.ipynb again"
        )
        assert f"tests/benchmarks/results/{path.name}" in text or path.stem not in (
            "losses",
            "trainer",
            "loader",
            "pairs",
            "volumes",
            "crossval",
            "startup",
        ), "the command stands beside each"
    assert len(
        re.findall(r"Measured [\d-]+ on .+, \d+ threads?, Python [\d.]+, torch \d", shown)
    ) == len([*(ROOT / "tests/benchmarks/results").glob("*.json")]), (
        "each with its machine, threads and versions"
    )

def test_the_benchmarks_page_says_when_it_has_nothing(tmp_path):
    "Run on its own, away from the repository"
    shutil.copy2(ROOT/"nbs/benchmarks.ipynb", tmp_path)
    code = (
        "import nbformat, sys; from nbclient import NotebookClient; nb = "
        "nbformat.read('benchmarks.ipynb', 4); NotebookClient(nb, resources={'metadata': {'path': "
        "'.'}}).execute(); print(str(nb.cells))"
    )
    out = run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert (
        "run it in a clone of the repository" in out
        and out.count("was not found: run this page in a clone") >= 7
    )

def test_the_citation_is_whole():
    facts = yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))
    # what the schema asks for
    assert (
        {"cff-version", "message", "title", "authors"} <= facts.keys()
        and facts["cff-version"] == "1.2.0"
        and facts["type"] == "software"
    )
    known = {
        "cff-version",
        "message",
        "title",
        "authors",
        "abstract",
        "type",
        "license",
        "version",
        "repository-code",
        "url",
        "keywords",
        "references",
        "date-released",
        "doi",
        "identifiers",
        "commit",
        "contact",
        "license-url",
        "preferred-citation",
        "repository",
        "repository-artifact",
    }
    assert facts.keys() <= known, "the schema has no other keys"
    ini = (ROOT/"settings.ini").read_text(encoding="utf-8")
    assert (
        facts["version"] == re.search(r"^version = (.*)$", ini, re.M)[1]
        and facts["license"] == re.search(r"^license = (.*)$", ini, re.M)[1]
    )
    assert facts["repository-code"] == REPOSITORY and facts["url"] == DOCS
    people = [a for source in (facts, *facts["references"]) for a in source["authors"]]
    assert people and all(
        {"name"} == a.keys() or {"family-names", "given-names"} <= a.keys() for a in people
    )
    papers = {i["value"] for r in facts["references"] for i in r["identifiers"]}
    assert papers == {"arXiv:2403.05220", "arXiv:2410.16947", "arXiv:2312.02111"}
    for r in facts["references"]:
        assert (
            r["type"] == "article"
            and r["title"]
            and isinstance(r["year"], int)
            and r["url"].endswith(r["identifiers"][0]["value"].split(":")[1])
            and r["identifiers"][0]["type"] == "other"
        )

def test_the_workflow_builds_on_pull_requests_and_publishes_from_main():
    flow = yaml.safe_load((ROOT/".github/workflows/docs.yml").read_text(encoding="utf-8"))
    triggers = flow[True]                                   # YAML 1.1 reads `on` as true
    assert (
        triggers["push"] == {"branches": ["main"]}
        and "pull_request" in triggers
        and flow["permissions"] == {"contents": "read"}
    )
    build, publish = flow["jobs"]["build"], flow["jobs"]["publish"]
    steps = [s.get("uses", s.get("run", "")) for s in build["steps"]]
    order = [
        next(k for k, s in enumerate(steps) if word in s)
        for word in (
            "actions/checkout@",
            "actions/setup-python@",
            "quarto-dev/quarto-actions/setup@",
            "pip install",
            "nbdev-docs",
            "actions/upload-pages-artifact@",
        )
    ]
    assert order == sorted(order), "each step needs those before it"
    upload = build["steps"][order[-1]]
    assert (
        upload["with"]["path"]
        == re.search(
            r'^doc_path = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
        )[1]
        and "pull_request" in upload["if"]
    )
    assert (
        "permissions" not in build
        and publish["needs"] == "build"
        and publish["permissions"] == {"pages": "write", "id-token": "write"}
        and "pull_request" in publish["if"]
    )
    assert (
        publish["environment"]["name"] == "github-pages"
        and publish["environment"]["url"] == "${{ steps.deploy.outputs.page_url }}"
    )
    deploy, = [s for s in publish["steps"] if "actions/deploy-pages@" in s["uses"]]
    assert deploy["id"] == "deploy" and all(
        job["runs-on"] == "ubuntu-latest" and job["timeout-minutes"] <= 60
        for job in (build, publish)
    )
    assert all(
        re.fullmatch(r"[\w-]+/[\w/-]+@v\d+", s["uses"])
        for job in (build, publish)
        for s in job["steps"]
        if "uses" in s
    )

@pytest.mark.skipif(not shutil.which("quarto"), reason="quarto is not installed")
@pytest.mark.slow
def test_site_builds(pages):
    run(["quarto", "render"], cwd=pages, check=True)
    assert (pages/"_docs/nbs/core/index.html").exists()

DEFECTS = 35       # found in the published code, as the page numbers them

def test_the_differences_name_every_defect_and_a_test_for_each():
    text = "\n".join(c.source for c in nbformat.read(ROOT/"nbs/differences.ipynb", 4).cells)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| \d", line)
    ]
    assert all(len(row) == 5 for row in rows) and {
        int(n) for row in rows for n in row[0].split(",")
    } == set(range(1, DEFECTS + 1))
    assert not [
        row[1] for row in rows if not re.search(r"`test_\w+\.py::test_\w+`|\(#[\w-]+\)", row[4])
    ]
    assert not [row[1] for row in rows if not re.search(r"\*\((run|read|run, read)\)\*", row[1])], (
        "each says how it was found"
    )

def test_the_tests_that_the_differences_name_are_there():
    text = "".join(c.source for c in nbformat.read(ROOT/"nbs/differences.ipynb", 4).cells)
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    assert named and not [
        n
        for n in named
        if not re.search(
            rf"^def {n[1]}\(",
            next((ROOT / "tests").rglob(f"{n[0]}.py")).read_text(encoding="utf-8"),
            re.M,
        )
    ]

def test_pictures_of_the_pages_to_read_are_described_in_words():
    silent = []
    for p in (
        [
            ROOT / f"nbs/{name}.ipynb"
            for name in ("index", "get_started", "methods", "differences", "benchmarks")
        ]
        + sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))
        + sorted((ROOT / "nbs/evidence").glob("*.ipynb"))
    ):
        for c in nbformat.read(p, 4).cells:
            if not any("image/png" in o.get("data", {}) for o in c.get("outputs", [])):
                continue
            # `#| fig-alt: ...`, beside directives without a value such as `#| slow`
            pairs = [line for line in c.source.splitlines() if re.match(r"#\| *[\w-]+:", line)]
            said = yaml.safe_load("\n".join(line[2:] for line in pairs)) or {}
            if len(str(said.get("fig-alt", "")).split()) < 5:
                silent.append(f"{p.name}: {c.source[:60]}")
    assert not silent

def test_no_page_stores_widget_state():
    "It would fetch code from elsewhere to draw progress bars that ended long ago"
    assert not [
        p.name for p in (ROOT / "nbs").rglob("*.ipynb") if "widgets" in nbformat.read(p, 4).metadata
    ]
