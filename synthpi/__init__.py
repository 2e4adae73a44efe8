"""Modules:

- `synthpi.core`: Seeds, pictures and files: the small things that every other notebook uses"""

from importlib.metadata import PackageNotFoundError, version as _version

try: __version__ = _version("synthpi")
except PackageNotFoundError: __version__ = "0+unknown"  # a clone on sys.path, not installed
