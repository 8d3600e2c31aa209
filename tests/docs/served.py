"""The export that docs/serve.md uses: factors of an ingested log, compiled. Made once per run of the tests."""

import tempfile
from functools import cache
from pathlib import Path

from recpress.trainer.export.config import ExportConfig
from recpress.trainer.export.stage import export
from tests.trainer.export.models import write_factors, write_log


@cache
def exported() -> Path:
    """A folder with the export in `export`."""
    folder = Path(tempfile.mkdtemp(prefix="served-"))
    factors = write_factors(write_log(folder), folder / "factors")
    export(ExportConfig(model=factors, out=str(folder / "export"), aot=True, triton=True))
    return folder
