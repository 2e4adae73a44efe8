"Model cards: every fact of the header, nothing else, as text that stays text, with code that runs."
import contextlib
import hashlib
import io
import json
import os
import re

import pytest
import yaml
from torch import nn

from synthpi.models.cards import model_card, write_card
from synthpi.core.runs import environment
from synthpi.models.encoders import make_encoder
from synthpi.models.files import save_encoder

FACTS = dict(
    arm="trident",
    seed=3,
    steps=321,
    lr=0.00123,
    widths=[64, 32],
    clip=None,
    data="5f2b9c0d11aa7e34",
    n_tiles=77,
    classes=["ADI", "TUM"],
    data_licence="CC-BY-NC-SA-4.0",
    licence="apache-2.0",
    privileged="nuclear masks of a U-Net",
    evaluation={"accuracy": {"mean": 0.7123, "ci": [0.66, 0.75]}, "n_test": 240},
    synthpi="9.8.7",
)
SECTIONS = [
    "What it is",
    "Training data",
    "Training arguments",
    "Environment",
    "Evaluation",
    "Second images in training",
    "Intended use",
    "Not intended",
    "How to load",
]

def parts(card):
    "Front matter, and the text of each section"
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()
    pieces = re.split(r"^## (.+)$", body, flags=re.M)
    return yaml.safe_load(front), pieces[0], dict(zip(pieces[1::2], pieces[2::2]))

def rows(text): return dict(re.findall(r"^\| (.+?) \| (.*) \|$", text, re.M))

@pytest.fixture(scope="module")
def encoder(): return make_encoder("resnet10_narrow")

def card_of(encoder, folder, **facts):
    save_encoder(encoder, folder/"encoder.safetensors", card=True, **facts)
    return (folder/"encoder.md").read_text(encoding="utf-8")

def test_every_fact_has_its_place(encoder, tmp_path):
    env = environment()
    front, head, text = parts(card_of(encoder, tmp_path, environment=env, **FACTS))
    assert list(text) == SECTIONS
    assert front == {
        "license": "apache-2.0",
        "library_name": "synthpi",
        "tags": ["medical-imaging", "self-supervised-learning", "privileged-information"],
        "pipeline_tag": "image-feature-extraction",
    }
    assert rows(text["Training data"]) == {
        "fingerprint of the images": "5f2b9c0d11aa7e34",
        "number of tiles": "77",
        "classes": "ADI, TUM",
    }
    assert (
        "data: CC-BY-NC-SA-4.0." in text["Training data"]
        and "weights: apache-2.0." in text["Training data"]
    )
    assert rows(text["Training arguments"]) == {
        "arm": "trident",
        "seed": "3",
        "steps": "321",
        "lr": "0.00123",
        "widths": "64, 32",
        "clip": "none",
    }
    found = rows(text["Environment"])
    assert (
        found["synthpi"] == "9.8.7"
        and found["packages.torch"].replace("\\", "") == env["packages"]["torch"]
        and found["python"] == env["python"]
        and len(found) == len(env) - 1 + len(env["packages"]) + 1
    )
    assert rows(text["Evaluation"]) == {"accuracy": r"0.7123 \[0.66, 0.75\]", r"n\_test": "240"}
    assert (
        "nuclear masks of a U-Net" in text["Second images in training"]
        and "training aids, not findings" in text["Second images in training"]
    )
    assert hashlib.sha256((tmp_path/"encoder.safetensors").read_bytes()).hexdigest() in head
    count = sum(v.numel() for v in encoder.state_dict().values())
    assert (
        f"{count:,} weights" in text["What it is"]
        and r"name resnet10\_narrow; in\_channels 3; spatial\_dims 2" in text["What it is"]
    )
    assert "Not for clinical use" in text["Not intended"]

def test_nothing_is_invented(encoder, tmp_path):
    front, head, text = parts(card_of(encoder, tmp_path))
    assert (
        front["license"] == "unknown"
        and "privileged-information" not in front["tags"]
        and head.strip().startswith(r"# resnet10\_narrow")
    )
    for section in ("Training data", "Training arguments", "Environment", "Evaluation"):
        assert "unknown" in text[section] and not rows(text[section]), section
    assert "Licence of the data: unknown. Licence of the weights: unknown." in text[
        "Training data"
    ] and text["Second images in training"].strip().startswith("Unknown")

@pytest.mark.parametrize("about, said, caveat", [
    ({"arm": "siamese_unprivileged"}, "None: ", False),
    ({"arm": "isimed"}, "None: ", False),
    ({"arm": "trident", "privileged": None}, "None: ", False),
    ({"method": "siamese"}, "Unknown: ", False),
    ({}, "Unknown: ", False),
    ({"arm": "trident"}, "synthetic images.", True),
    ({"method": "trident"}, "synthetic images.", True),
    ({"arm": "trident_haematoxylin"}, "the haematoxylin", True),
    ({"method": "siamese", "privileged": ["CD3", "masks"]}, "CD3, masks.", True),
])
def test_the_caveat_stands_where_there_were_second_images(about, said, caveat, encoder, tmp_path):
    front, _, text = parts(card_of(encoder, tmp_path, **about))
    second = text["Second images in training"].strip()
    assert second.startswith(said) and ("training aids, not findings" in second) == caveat == (
        "privileged-information" in front["tags"]
    )

def test_arms_of_the_studies_are_known(encoder, tmp_path):
    "A new arm has to say whether it sees a second image"
    from synthpi.studies.tissue.arms import ARMS
    from synthpi.models.cards import _second_images
    from synthpi.studies.volumes.arms import VOLUME_ARMS
    for name, arm in ARMS.items():
        if arm.layout or name == "random_encoder":
            assert bool(_second_images({"arm": name})) == bool(
                {*arm.columns} - {"primary", "blank"}
            ), name
    for name in VOLUME_ARMS:
        if name not in ("position_atlas", "intensity_histogram"):
            assert _second_images({"arm": name}) == "", name

NASTY = "a|b `c` *d* _e_ [f](g) <script>h</script> & #i\n\n## j\n---\n![k](l) $m$ \\| n"

def test_what_comes_from_outside_stays_text(encoder, tmp_path):
    from html import unescape
    from html.parser import HTMLParser

    from nbconvert.filters import markdown2html
    card = card_of(
        encoder,
        tmp_path,
        **{
            "arm": NASTY,
            "data": NASTY,
            "licence": NASTY,
            "data_licence": NASTY,
            "privileged": NASTY,
            "classes": [NASTY, "ok"],
            "evaluation": {NASTY: NASTY},
            "environment": {"cpu": NASTY},
            NASTY: {NASTY: NASTY},
        },
    )
    front, _, text = parts(card)
    assert list(text) == SECTIONS and front["license"] == "other" and front["license_name"] == NASTY
    class Reader(HTMLParser):
        tags, words = set(), ""
        def handle_starttag(self, tag, attrs): self.tags.add((tag, dict(attrs).get("href")))
        def handle_data(self, data): self.words += data
    reader = Reader()
    reader.feed(markdown2html(card.split("---\n", 2)[2]))
    plain = " ".join(NASTY.split())
    assert {tag for tag, _ in reader.tags} <= {
        "h1",
        "h2",
        "p",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "a",
        "em",
        "strong",
        "div",
        "pre",
        "code",
        "span",
    }
    assert {href for tag, href in reader.tags if tag == "a"} <= {
        "https://github.com/synthpi/synthpi",
        *(h for _, h in reader.tags if h and h.startswith("#")),
    }
    assert unescape(" ".join(reader.words.split())).count(plain) >= 8, "shown as it was written"
    for section in ("Training data", "Training arguments", "Environment", "Evaluation"):
        for line in text[section].splitlines():
            if line.startswith("|"): assert len(re.findall(r"(?<!\\)\|", line)) == 3, line

def code_of(card): return re.search(r"```python\n(.*?)\n```", card, re.S)[1]

def run(code, folder, **names):
    out, here = io.StringIO(), os.getcwd()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(out): exec(code, names)
    finally: os.chdir(here)
    return out.getvalue().strip()

@pytest.mark.parametrize("dims, channels, size, shape", [
    (2, 3, 48, (2, 3, 48, 48)),
    (2, 1, None, (2, 1, 64, 64)),
    (3, 1, 24, (2, 1, 24, 24, 24)),
    (3, 2, None, (2, 2, 32, 32, 32)),
])
def test_the_code_of_the_card_runs(dims, channels, size, shape, tmp_path):
    card = card_of(
        make_encoder("resnet10_narrow", channels, dims),
        tmp_path,
        **({"size": size} if size else {}),
    )
    assert f"torch.rand({', '.join(map(str, shape))})" in code_of(card)
    assert run(code_of(card), tmp_path) == "torch.Size([2, 128])"
    assert parts(card)[0].get("pipeline_tag") == ("image-feature-extraction" if dims == 2 else None)

def test_the_code_for_a_module_of_ones_own_runs_with_that_module(tmp_path):
    def make(): return nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    card = card_of(make(), tmp_path, size=32)
    assert (
        "module: a Sequential of your own" in code_of(card)
        and run(code_of(card), tmp_path, module=make()) == "torch.Size([2, 6])"
    )

def test_a_header_cannot_bring_code_along(tmp_path):
    net = make_encoder("resnet10_narrow")
    net.spec = {"custom": "Net)\nimport os; os.system('x') #"}
    assert (
        "import os" not in code_of(card_of(net, tmp_path))
        and len(code_of(card_of(net, tmp_path)).splitlines()) == 6
    )

def test_transformers_and_their_sizes(tmp_path):
    pytest.importorskip("transformers")
    config = dict(
        model_type="vit",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
    )
    card = card_of(make_encoder("hf:tiny", config=config), tmp_path)
    assert run(code_of(card), tmp_path) == "torch.Size([2, 16])" and "hidden_size" not in card

def test_the_card_is_written_whole_or_not_at_all(encoder, tmp_path, monkeypatch):
    before = card_of(encoder, tmp_path, steps=1)
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr("pathlib.Path.write_text", full)
        write_card(tmp_path/"encoder.safetensors")
    assert (tmp_path / "encoder.md").read_text(encoding="utf-8") == before and {
        p.name for p in tmp_path.iterdir()
    } == {"encoder.safetensors", "encoder.md"}

def test_without_card_there_is_none_and_what_is_no_encoder_is_refused(encoder, tmp_path):
    save_encoder(encoder, tmp_path/"e.safetensors", steps=1)
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]
    assert write_card(tmp_path / "e.safetensors") == tmp_path / "e.md" and (
        tmp_path / "e.md"
    ).read_text(encoding="utf-8") == model_card(tmp_path / "e.safetensors")
    (tmp_path/"x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        write_card(tmp_path / "x.safetensors")
    assert not (tmp_path/"x.md").exists()
    with pytest.raises(FileNotFoundError): model_card(tmp_path/"missing.safetensors")

@pytest.mark.parametrize("facts, title", [
    (dict(title="Mine", arm="trident"), "Mine"),
    (dict(arm="trident"), r"resnet10\_narrow, trident"),
    (dict(method="simclr"), r"resnet10\_narrow, simclr"),
    (dict(title=None), r"resnet10\_narrow"),
])
def test_the_title_that_was_given_is_the_title(facts, title, encoder, tmp_path):
    assert parts(card_of(encoder, tmp_path, **facts))[1].strip().splitlines()[0] == f"# {title}"

def test_a_page_that_is_no_card_is_left_alone(encoder, tmp_path):
    path, page = tmp_path/"encoder.safetensors", tmp_path/"encoder.md"
    page.write_bytes("Notes, f\u00fcr mich.".encode("latin-1"))
    with pytest.raises(
        ValueError, match="encoder.md is there already and is no model card of synthpi.*move it"
    ):
        save_encoder(encoder, path, card=True)
    # refused before the weights were written
    assert not path.exists()
    save_encoder(encoder, path, steps=1)
    with pytest.raises(ValueError, match="is there already"): write_card(path)
    assert page.read_bytes() == "Notes, f\u00fcr mich.".encode("latin-1")
    page.unlink()
    page.mkdir()
    with pytest.raises(ValueError, match="is there already"): write_card(path)
    page.rmdir()
    write_card(path)
    # an older card gives way
    save_encoder(encoder, path, card=True, steps=2)
    assert rows(parts(page.read_text(encoding="utf-8"))[2]["Training arguments"]) == {"steps": "2"}
    with pytest.raises(ValueError, match="the card would replace it"):
        save_encoder(encoder, tmp_path / "x.md", card=True)
    assert {p.name for p in tmp_path.iterdir()} == {"encoder.safetensors", "encoder.md"}

@pytest.mark.parametrize("facts, message", [
    (dict(licence=3), "licence is 3, of type int; a model card needs a text, for example"),
    (dict(environment="x"), "environment is 'x', of type str; a model card needs a dictionary"),
    (dict(data_licence=["a"]), "data_licence is"),
    (dict(arm=["trident"]), "arm is"),
    (dict(method=1), "method is 1"),
    (dict(title=7), "title is 7"),
    (dict(synthpi=1.), "synthpi is 1.0"),
])
def test_facts_of_the_wrong_type_are_refused_before_anything_is_written(
    facts, message, encoder, tmp_path
):
    with pytest.raises(ValueError, match=message):
        save_encoder(encoder, tmp_path / "e.safetensors", card=True, **facts)
    assert not list(tmp_path.iterdir())
    # a header may hold what a card cannot
    save_encoder(encoder, tmp_path/"e.safetensors", **facts)
    with pytest.raises(ValueError, match=message): write_card(tmp_path/"e.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]

def test_results_of_any_form_are_shown(encoder, tmp_path):
    _, _, text = parts(
        card_of(
            encoder,
            tmp_path,
            evaluation={"a": {"mean": 0.5, "ci": 0.1}, "b": {"mean": None}, "c": [1, 2]},
        )
    )
    assert rows(text["Evaluation"]) == {"a": r"0.5 \[0.1\]", "b": "none", "c": "1, 2"}

def test_the_hub_reads_the_front_matter(encoder, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(card_of(encoder, tmp_path, **FACTS)).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "synthpi",
        "image-feature-extraction",
    )
    assert json.loads(json.dumps(data.to_dict()))["tags"][0] == "medical-imaging"
