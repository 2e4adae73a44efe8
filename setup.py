"Reads settings.ini, the single source of package metadata; name and URLs come from pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lines = lambda key: [l.strip() for l in cfg.get(key, "").splitlines() if l.strip()]

setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license_expression=cfg["license"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("dev", "diffusion", "presets", "volumes")},
    packages=find_packages(include=["synthpi", "synthpi.*"]),
    package_data={"synthpi": ["phantom_encoder.safetensors"]},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["synthpi = synthpi._modidx:d"]},
)
