"""No key of the command line is there for nothing: each field of the settings is read by some module."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

from config import settings

ROOT = Path(settings.__file__).parent.parent
ACCEPTED: set[str] = set()


def test_every_field_is_read_somewhere():
    files = [*ROOT.glob("*.py"), *(ROOT / "trainers").rglob("*.py"), *(ROOT / "safer_instruct").rglob("*.py")]
    assert len(files) > 80, "a glob misses folders of the packages"
    files += [ROOT / "config" / "schema.py"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    kinds = [kind for kind in vars(settings).values() if isinstance(kind, type) and is_dataclass(kind)]
    names = {f"{kind.__name__}.{field.name}" for kind in kinds for field in fields(kind)}
    read = set(re.findall(r"\.(\w+)", code)) | set(re.findall(r'\bconfig\["(\w+)"\]', code))  # or of a config as a dict
    unread = {name for name in names if name.split(".")[1] not in read}
    assert unread == ACCEPTED
