"""Chinese and English API reference prose from the Tencent Cloud SDKs (Apache-2.0): one document an API class.

The packages tencentcloud-sdk-python (Chinese) and tencentcloud-sdk-python-intl-en (English) install into the same
folder: where both are there, a service that both describe is in the language of the one installed last. Which one that
is shows in the file itself, so each source takes the files of its language. `root` reads an SDK installed elsewhere
(`pip install --no-deps --target FOLDER tencentcloud-sdk-python-intl-en`), where nothing is overwritten.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from infra.errors import InputError
from stages.corpus.languages import identify
from stages.corpus.sources import Raw

_CLASS = re.compile(r"^class (\w+)\(AbstractModel\):\n", re.MULTILINE)
_DOCSTRING = re.compile(r'\s*r?"""(.*?)"""', re.DOTALL)
_INIT = re.compile(r'def __init__\(self\):\n\s*r?"""(.*?)"""', re.DOTALL)
_PARAMETER = re.compile(r":param _?(\w+): (.*?)(?=\n\s*:type )", re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^>]*>")
_PACKAGES = {"zh": "tencentcloud-sdk-python", "en": "tencentcloud-sdk-python-intl-en"}
MIN_CHARACTERS = 60
PROBE = 32_000  # characters of a file that tell its language


@dataclass(frozen=True)
class ApiReference:
    language: str
    root: str | None = None
    domain: str = "reference"
    license: str = "Apache-2.0"

    @property
    def name(self) -> str:
        return f"api_reference_{self.language}"

    @property
    def folder(self) -> Path:
        if self.root is not None:
            folder = Path(self.root) / "tencentcloud"
            if not folder.is_dir():
                raise InputError(
                    f"source.root: {self.root} holds no folder tencentcloud: pip install --target it there"
                )
            return folder
        spec = find_spec("tencentcloud")
        if spec is None or not spec.submodule_search_locations:
            package = _PACKAGES[self.language]
            raise InputError(f"{self.name} reads the package {package}: pip install 'fathom-line[corpus]'")
        return Path(spec.submodule_search_locations[0])

    def versions(self) -> dict[str, str]:
        """Of both packages, for the one installed last overwrites files of the other."""
        found = distributions() if self.root is None else distributions(path=[self.root])
        return {d.name: d.version for d in found if d.name in _PACKAGES.values()}

    def units(self) -> list[str]:
        return sorted(path.relative_to(self.folder).parent.as_posix() for path in self.folder.glob("*/*/models.py"))

    def read(self, unit: str) -> list[Raw]:
        with (self.folder / unit / "models.py").open(encoding="utf-8") as file:
            code = file.read(PROBE)
            if identify(" ".join(_DOCSTRING.findall(code))) != self.language:
                return []
            code += file.read()
        pieces = _CLASS.split(code)
        texts = (
            (name, _describe(name, body, self.language)) for name, body in zip(pieces[1::2], pieces[2::2], strict=True)
        )
        return [Raw(f"{unit}/{name}", text) for name, text in texts if len(text) >= MIN_CHARACTERS]


def _describe(name: str, body: str, language: str) -> str:
    """The class's purpose and its fields' descriptions, as a reader of the manual sees them."""
    colon = "：" if language == "zh" else ": "
    lines = [name]
    if (purpose := _DOCSTRING.match(body)) and (text := _plain(purpose[1])):
        lines.append(text)
    if parameters := _INIT.search(body):
        fields = ((field, _plain(text)) for field, text in _PARAMETER.findall(parameters[1]))
        lines += [f"{field}{colon}{text}" for field, text in fields if text]
    return "\n".join(lines) if len(lines) > 1 else ""


def _plain(text: str) -> str:
    """Text without tags, entities and the indentation of the code around it."""
    return "\n".join(line.strip() for line in html.unescape(_TAG.sub("", text)).splitlines() if line.strip())
