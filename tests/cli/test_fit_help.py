"""The checked-in help of `fit` is up to date, and is printed without importing torch."""

import subprocess
import sys

from gpdit_lightning.cli.fit_help import HELP, rendered


def test_the_text_is_up_to_date() -> None:
    text = HELP.read_text(encoding="utf-8")
    assert text == rendered(), "an option changed: python -m gpdit_lightning.cli.fit_help"


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from gpdit_lightning.cli import main; status = main(['validate', '--help']); "
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules); sys.exit(status)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("usage: python -m gpdit_lightning validate --config")
    assert "--data.SOURCE.batch_size" in shown
