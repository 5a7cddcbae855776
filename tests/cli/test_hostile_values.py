"""Values that no option can use: each option of each verb accepts or refuses them with one clear sentence."""

import re

import pytest

from gpdit_lightning.cli import VERBS, record_of
from gpdit_lightning.cli.parsing import option_names, parser_of
from gpdit_lightning.errors import InputError

VALUES = ("-1", "nan", str(10**30), "abc", "{}", "null")
# Words of jsonargparse and Python that mean nothing to a user.
JARGON = re.compile(
    r"<class|object at 0x|Expected |jsonargparse|NoneType|typing\.|collections\.abc|Namespace\(|Subtypes"
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_refuses_a_hostile_value_in_one_clear_sentence(verb: str) -> None:
    record = record_of(verb)
    parser = parser_of(verb, "Does something.", record)
    for name in option_names(record):
        for value in VALUES:
            try:
                parser.parse_args([f"--{name}={value}"])
            except InputError as error:
                sentence = str(error)
            else:
                continue
            if "missing: see --help" in sentence:  # a required option; the value was accepted
                continue
            shown = f"--{name}={value}: {sentence}"
            assert name in sentence, shown
            assert not JARGON.search(sentence), shown
            assert "\n" not in sentence, shown
            assert len(sentence) < 500, shown
