"""Loading of codecs by registered names and import paths."""

from dataclasses import replace

import pytest

from gpdit_lightning.codecs import (
    CODECS,
    CodecNotAllowedError,
    PcaCodec,
    WanCodec,
    load_codec,
    load_codec_from_spec,
    register_codec,
)
from gpdit_lightning.errors import InputError

PATH = "tests.codecs.test_loading.Custom"


class Custom(PcaCodec):
    """A custom codec."""


def test_a_custom_codec_is_recorded_by_its_import_path() -> None:
    codec = load_codec(PATH)
    assert isinstance(codec, Custom)
    assert codec.spec().name == PATH
    assert load_codec_from_spec(codec.spec(), codec=PATH).spec() == codec.spec()


def test_a_file_does_not_choose_code_to_import() -> None:
    spec = replace(load_codec("pca").spec(), name="some_package.Evil")
    with pytest.raises(CodecNotAllowedError, match=r"^the manifest records the custom codec some_package\.Evil, and a"):
        load_codec_from_spec(spec)
    with pytest.raises(InputError, match=r"codec 'some_package\.Evil' cannot be imported"):  # the user names it
        load_codec_from_spec(spec, codec="some_package.Evil")


def test_the_codec_of_the_user_must_be_the_recorded_one() -> None:
    with pytest.raises(InputError, match=r"are of different codecs \(name 'tests\.codecs\.test_loading\.Custom' and"):
        load_codec_from_spec(load_codec(PATH).spec(), codec="pca")


def test_a_registered_name_needs_no_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpdit_lightning.codecs.loading.CODECS", dict(CODECS))
    monkeypatch.setattr(Custom, "name", Custom.name)
    register_codec("custom", Custom)
    assert load_codec_from_spec(load_codec("custom").spec()).name == "custom"
    with pytest.raises(InputError, match="a codec 'wan' is registered already"):
        register_codec("wan", Custom)
    assert (PcaCodec.name, WanCodec.name) == ("pca", "wan")


def test_an_unknown_name_is_rejected() -> None:
    message = r"codec 'pcs' is not known \(did you mean 'pca'\?\): choose one of pca, pca_digits, wan, sd"
    with pytest.raises(InputError, match=message):
        load_codec("pcs")
