"""README.md and its pictures, made from nbs/index.ipynb without quarto: `python tests/readme.py`
writes them, tests/test_readme.py compares."""
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parents[1]
IMAGES = ROOT/"nbs/images"
NOTE = "<!-- Made from nbs/index.ipynb by tests/readme.py: edit the notebook. -->\n\n"

def _from_root(link):
    "A markdown link as it reads one folder further up"
    return (
        link[0] if re.match(r"[a-z]+:|#", link[1]) else f"]({posixpath.normpath('nbs/' + link[1])})"
    )

def render():
    """The text of README.md, and the pictures of the notebook's outputs: `{path: bytes}`, paths
    relative to the repository"""
    nb = nbformat.read(ROOT/"nbs/index.ipynb", as_version=4)
    # nbdev-clean removes it; the exporter writes it on the code's fences
    nb.metadata.language_info = {"name": "python"}
    nb.cells = [c for c in nb.cells if not re.match(r"#\|\s*hide\b", c.source)]
    alt = [m[1] for c in nb.cells for m in re.finditer(r"^#\| fig-alt: (.*)$", c.source, re.M)]
    for c in nb.cells:
        c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
        if c.cell_type == "markdown": c.source = re.sub(r"\]\(([^)\s]+)\)", _from_root, c.source)
    names = Config(
        {
            "ExtractOutputPreprocessor": {
                "output_filename_template": "{unique_key}_{cell_index}_{index}{extension}"
            }
        }
    )
    text, resources = MarkdownExporter(config=names).from_notebook_node(
        nb, {"unique_key": "index", "output_files_dir": "nbs/images"}
    )
    for words in alt: text = text.replace("![png](", f"![{words}](", 1)
    return NOTE + re.sub(r"\n\s*\n", "\n\n", text).strip() + "\n", {
        Path(p): data for p, data in resources.get("outputs", {}).items()
    }

if __name__ == "__main__":
    text, images = render()
    (ROOT/"README.md").write_text(text, encoding="utf-8")
    for old in IMAGES.glob("index_*"): old.unlink()
    for path, data in images.items():
        IMAGES.mkdir(exist_ok=True)
        (ROOT/path).write_bytes(data)
    print("wrote README.md", *images)
